"""Charts as SVG text, drawn by hand: nothing to install, and every label is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..metrics import pareto

FAMILIES = {
    "base": "#64748b",
    "expert": "#2563eb",
    "baseline": "#d97706",
    "routed": "#059669",
    "model": "#7c3aed",
}
MORE = ("#db2777", "#0891b2", "#65a30d", "#9333ea", "#b45309", "#475569")
HARMFUL, BENIGN, INK, FAINT = "#dc2626", "#0d9488", "#1e293b", "#e2e8f0"
CROWD = 12
FONT = "font-family=\"system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif\" font-size=\"12\""


@dataclass(frozen=True)
class Point:
    """One model on one set's picture, with its intervals (NaN bounds: none)."""

    label: str
    family: str
    set: str
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float


def text_of(value: Any) -> str:
    """Escaped, and without the characters that XML forbids."""
    return escape(
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))
    )


def colours(families: Sequence[str]) -> dict[str, str]:
    """family -> colour; the same for the known ones in every chart."""
    others = [f for f in dict.fromkeys(families) if f not in FAMILIES]
    return {**FAMILIES, **{f: MORE[i % len(MORE)] for i, f in enumerate(others)}}


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * f for f in (1, 2, 5, 10, 20) if (high - low) / (step * f) <= count)
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


class Chart:
    """Axes on which the caller draws: ``x`` and ``y`` place values, ``add`` takes SVG."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x: str,
        y: str,
        *,
        title: str = "",
        size: tuple[int, int] = (460, 300),
    ) -> None:
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = 58, size[0] - 18, 34, size[1] - 44
        self.x_range, self.y_range = _range(xs), _range(ys)
        self.parts: list[str] = []
        for tick in ticks(*self.x_range):
            self.line(tick, self.y_range[0], tick, self.y_range[1], FAINT)
            self.add(
                f'<text x="{self.x(tick):.1f}" y="{self.bottom + 16}" text-anchor="middle" fill="{INK}">{tick:g}</text>'
            )
        for tick in ticks(*self.y_range):
            self.line(self.x_range[0], tick, self.x_range[1], tick, FAINT)
            self.add(
                f'<text x="{self.left - 7}" y="{self.y(tick) + 4:.1f}" text-anchor="end" fill="{INK}">{tick:g}</text>'
            )
        middle = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        self.add(
            f'<text x="{middle[0]:.0f}" y="{self.height - 8}" text-anchor="middle" fill="{INK}">{text_of(x)}</text>'
        )
        self.add(
            f'<text transform="translate(14,{middle[1]:.0f}) rotate(-90)" text-anchor="middle" fill="{INK}">{text_of(y)}</text>'
        )
        self.add(
            f'<text x="{self.left}" y="20" font-weight="600" font-size="13" fill="{INK}">{text_of(title)}</text>'
        )

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def add(self, svg: str) -> None:
        self.parts.append(svg)

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        colour: str,
        width: float = 1,
        more: str = "",
    ) -> None:
        ends = f'x1="{self.x(x1):.1f}" y1="{self.y(y1):.1f}" x2="{self.x(x2):.1f}" y2="{self.y(y2):.1f}"'
        self.add(f'<line {ends} stroke="{colour}" stroke-width="{width}" {more}/>')

    def path(self, points: Sequence[tuple[float, float]], colour: str, more: str = "") -> None:
        places = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.add(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round" {more}/>'
        )

    def key(self, names: Sequence[tuple[str, str]]) -> None:
        """(name, colour) pairs in one line at the top right."""
        at = self.right
        for name, colour in reversed(names):
            at -= 7 * len(name)
            self.add(f'<text x="{at:.0f}" y="20" fill="{INK}">{text_of(name)}</text>')
            self.add(f'<circle cx="{at - 8:.0f}" cy="16" r="4.5" fill="{colour}"/>')
            at -= 24

    def svg(self) -> str:
        box = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        ground = '<rect width="100%" height="100%" fill="#fff"/>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" {FONT}>{ground}{"".join(self.parts)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    pad = 0.07 * (high - low) or max(0.05, 0.1 * abs(low))
    return low - pad, high + pad


def picture(points: Sequence[Point], x_name: str, y_name: str, title: str = "") -> str:
    """Safety against helpfulness: a dot a model, its intervals as a cross, the undominated models joined.

    Among more than ``CROWD`` models a label is shown on these, on the base, and where it has room; all on pointing at a dot.
    """
    crowded = len(points) > CROWD
    spans = [(p.x, p.x_low, p.x_high, p.y, p.y_low, p.y_high) for p in points]
    size = (1120, 700) if crowded else (640, 440)
    chart = Chart(
        [v for s in spans for v in s[:3]],
        [v for s in spans for v in s[3:]],
        x_name,
        y_name,
        title=title,
        size=size,
    )
    colour = colours([p.family for p in points])
    chart.key([(f, colour[f]) for f in dict.fromkeys(p.family for p in points)])
    on_front = pareto([(p.x, p.y) for p in points])
    front = sorted((p for p, on in zip(points, on_front, strict=True) if on), key=lambda p: p.x)
    if len(front) > 1:
        chart.path([(p.x, p.y) for p in front], "#94a3b8", 'stroke-dasharray="3 5"')
    cross = (1, 'stroke-opacity=".3"') if crowded else (2, 'stroke-opacity=".5"')
    for p in points:
        if math.isfinite(p.x_low):
            chart.line(p.x_low, p.y, p.x_high, p.y, colour[p.family], *cross)
        if math.isfinite(p.y_low):
            chart.line(p.x, p.y_low, p.x, p.y_high, colour[p.family], *cross)
    for p in points:
        told = f"<title>{text_of(p.label)}: {p.x:.3g}, {p.y:.3g}</title>"
        place = f'cx="{chart.x(p.x):.1f}" cy="{chart.y(p.y):.1f}"'
        chart.add(
            f'<circle {place} r="5.5" fill="{colour[p.family]}" stroke="#fff">{told}</circle>'
        )
    named = [p for p in points if p in front or p.family == "base"] if crowded else points
    _labels(chart, sorted(points, key=lambda p: p not in named), colour, len(named))
    return chart.svg()


def _labels(chart: Chart, points: Sequence[Point], colour: dict[str, str], always: int) -> None:
    """Each label where it covers least: dots, crosses, labels placed before, the edge; behind the first ``always`` points' only
    those that cover next to nothing."""
    taken = []
    for p in points:
        x, y = chart.x(p.x), chart.y(p.y)
        taken.append((x - 7, y - 7, x + 7, y + 7))
        if math.isfinite(p.x_low):
            taken.append((chart.x(p.x_low), y - 2, chart.x(p.x_high), y + 2))
        if math.isfinite(p.y_low):
            taken.append((x - 2, chart.y(p.y_high), x + 2, chart.y(p.y_low)))
    for number, p in enumerate(points):
        x, y, width = chart.x(p.x), chart.y(p.y), 7.2 * len(p.label)
        places = [(left, y + dy) for dy in (-8, 14, -22, 28) for left in (x + 9, x - 9 - width)]

        def cost(place: tuple[float, float], width: float = width) -> float:
            a, b, c, d = place[0], place[1] - 10, place[0] + width, place[1] + 3
            covered = sum(
                max(0, min(c, r) - max(a, l)) * max(0, min(d, u) - max(b, o))
                for l, o, r, u in taken
            )
            outside = (
                max(0, chart.left - a)
                + max(0, c - chart.right)
                + max(0, chart.top - b)
                + max(0, d - chart.bottom)
            )
            return covered + 50 * outside

        best = min(places, key=cost)
        if number >= always and cost(best) > 40:  # square pixels: a thin cross or two
            continue
        taken.append((best[0], best[1] - 10, best[0] + width, best[1] + 3))
        more = 'font-weight="600" stroke="#fff" stroke-width="3" paint-order="stroke"'
        chart.add(
            f'<text x="{best[0]:.1f}" y="{best[1]:.1f}" fill="{colour[p.family]}" {more}>{text_of(p.label)}</text>'
        )


def line_chart(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], x: str, y: str, title: str = ""
) -> str:
    """Named lines on common axes."""
    kept = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in lines]
    shown = [(name, points) for name, points in kept if points]
    xs, ys = ([p[i] for _, points in shown for p in points] for i in (0, 1))
    chart = Chart(xs, ys, x, y, title=title)
    palette = (
        [HARMFUL, BENIGN]
        if [n for n, _ in shown] == ["harmful", "benign"]
        else [*FAMILIES.values(), *MORE][1:]
    )
    named = [(name, palette[i % len(palette)]) for i, (name, _) in enumerate(shown)]
    for (_, points), (_, colour) in zip(shown, named, strict=True):
        chart.path(points, colour)
        if len(points) < 40:
            for a, b in points:
                chart.add(
                    f'<circle cx="{chart.x(a):.1f}" cy="{chart.y(b):.1f}" r="2.6" fill="{colour}"/>'
                )
    if len(named) > 1:
        chart.key(named)
    return chart.svg()


def histogram(
    groups: Sequence[tuple[str, Sequence[float], str]], x: str, title: str, bins: int = 25
) -> str:
    """Shares of values in [0, 1] by bin, for each (name, values, colour)."""
    heights = []
    for _, values, _ in groups:
        counts = [0] * bins
        for v in values:
            counts[min(bins - 1, max(0, int(v * bins)))] += 1
        heights.append([c / max(1, len(values)) for c in counts])
    chart = Chart(
        [0.04, 0.96], [0.0, max(max(h) for h in heights)], x, "share of prompts", title=title
    )
    for (_, _, colour), shares in zip(groups, heights, strict=True):
        for i, share in enumerate(shares):
            if share:
                left, right, top = chart.x(i / bins), chart.x((i + 1) / bins), chart.y(share)
                box = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" height="{chart.y(0) - top:.1f}"'
                chart.add(f'<rect {box} fill="{colour}" fill-opacity=".5"/>')
    chart.key([(name, colour) for name, _, colour in groups])
    return chart.svg()
