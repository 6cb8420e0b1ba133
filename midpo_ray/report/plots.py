"""Every plot of the package, by matplotlib: SVG for pages, PNG beside it.

The same numbers give the same bytes: ids come from a fixed salt, and no date is written. Labels are
plain text, never math.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from ..metrics import pareto

COLOURS = {
    "base": "#64748b", "expert": "#2563eb", "baseline": "#d97706", "routed": "#059669",
    "model": "#7c3aed", "harmful": "#dc2626", "benign": "#0d9488", "unknown": "#94a3b8",
    "finished": "#2563eb", "stopped": "#94a3b8", "failed": "#dc2626",
}  # fmt: skip
_OTHERS = ("#db2777", "#0891b2", "#65a30d", "#9333ea", "#b45309", "#475569")
_STYLE: Any = {
    "axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.titleweight": "bold", "font.size": 9.5, "figure.constrained_layout.use": True,
    "grid.color": "#e2e8f0", "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "midpo_ray", "text.parse_math": False,
}  # fmt: skip
_LABELLED = (
    12  # among more systems than these, only the undominated ones and the base must have a label
)


@dataclass(frozen=True)
class Plot:
    """A drawn plot; ``name`` is its file's."""

    name: str
    title: str
    svg: bytes
    png: bytes
    kind: ClassVar[str] = "plot"


def _draw(
    name: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float] = (5.6, 3.9)
) -> Plot:
    """``draw`` on new axes, with a legend below them if more than one artist has a label."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt set's or a model's name may have odd characters
        figure = Figure(figsize=size)
        axes = figure.subplots()
        axes.set_title(_text(title))
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        files = {}
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            sink = BytesIO()
            figure.savefig(sink, format=kind, dpi=150, metadata=metadata)
            files[kind] = sink.getvalue()
    return Plot(re.sub(r"[^\w.-]+", "-", name).strip("-.")[:100], title, files["svg"], files["png"])


def _text(value: Any) -> str:
    """Without the characters that XML forbids."""
    return re.sub(r"[\x00-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def _colour(groups: Sequence[str]) -> dict[str, str]:
    """group -> colour; the known groups have the same one in every plot."""
    others = [g for g in dict.fromkeys(groups) if g not in COLOURS]
    return {**COLOURS, **{g: _OTHERS[i % len(_OTHERS)] for i, g in enumerate(others)}}


def tradeoff(name: str, points: pd.DataFrame, x: str, y: str, title: str = "") -> Plot:
    """Safety against helpfulness: one dot per system, its intervals as a cross, a line through the
    undominated systems.

    Args:
        points: columns label, family, x, x_low, x_high, y, y_low, y_high; NaN bounds where there is
            no interval.
    """
    points = points.assign(front=pareto(points[["x", "y"]])).sort_values("x")
    crowded = len(points) > _LABELLED

    def draw(axes: Axes) -> None:
        colour = _colour(points["family"])
        front = points[points["front"]]
        axes.plot(front["x"], front["y"], ":", color="#94a3b8", zorder=1)
        for family, rows in points.groupby("family", sort=False):
            bars = {a: [rows[a] - rows[f"{a}_low"], rows[f"{a}_high"] - rows[a]] for a in "xy"}
            axes.errorbar(
                rows["x"], rows["y"], yerr=np.abs(bars["y"]), xerr=np.abs(bars["x"]), fmt="o",
                color=colour[family], ecolor=mpl.colors.to_rgba(colour[family], 0.35),
                label=_text(family),
            )  # fmt: skip
        axes.set(xlabel=_text(x), ylabel=_text(y))
        must = points[points["front"] | points["family"].eq("base") | (not crowded)]
        _label(axes, pd.concat([must, points.drop(must.index)]), len(must), colour)

    return _draw(name, title, draw, (11.0, 6.8) if crowded else (6.8, 5.0))


def _label(axes: Axes, points: pd.DataFrame, required: int, colour: Mapping[str, str]) -> None:
    """Label the dots where that covers nothing; the first ``required`` ones in any case."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the layout, so that places in pixels are final
    places = axes.transData.transform(points[["x", "y"]].to_numpy())
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for number, (row, (x, y)) in enumerate(zip(points.itertuples(), places, strict=True)):
        text = _text(row.label)
        width = 6.0 * len(text)
        corners = [(dx, dy) for dy in (5, -15, 17, -27) for dx in (7, -7 - width)]
        boxes = [Bbox.from_bounds(x + dx, y + dy, width, 11) for dx, dy in corners]
        covered = [
            sum(box.overlaps(other) for other in taken)
            + 9 * (not axes.bbox.contains(box.x1, box.y1))
            for box in boxes
        ]
        best = int(np.argmin(covered))
        if covered[best] and number >= required:
            continue
        taken.append(boxes[best])
        axes.annotate(
            text, (row.x, row.y), corners[best], textcoords="offset pixels", fontsize=8.5,
            color=colour[row.family],
        )  # fmt: skip


def lines(
    name: str,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    x: str,
    y: str,
    title: str = "",
    *,
    integers: bool = False,
    groups: Mapping[str, str] | None = None,
) -> Plot:
    """Lines (x values, y values) by name.

    Args:
        integers: x is a layer, a step or another count, whose ticks are integers.
        groups: the colour's group of each line, where the legend is of groups and not of lines.
    """

    def draw(axes: Axes) -> None:
        group = groups or {label: label for label in series}
        colour = _colour([group[label] for label in series])
        shown: set[str] = set()
        for label, (xs, ys) in series.items():
            marker = "." if len(np.asarray(xs)) < 40 else ""
            legend = "_" if group[label] in shown else _text(group[label]).lstrip("_")
            axes.plot(xs, ys, marker=marker, color=colour[group[label]], label=legend, lw=1.4)
            shown.add(group[label])
        axes.set(xlabel=_text(x), ylabel=_text(y))
        if integers:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw(name, title, draw)


def histogram(name: str, groups: Mapping[str, ArrayLike], x: str, title: str = "") -> Plot:
    """Share of each group's values in [0, 1] by bin."""

    def draw(axes: Axes) -> None:
        colour = _colour([*groups])
        for group, values in groups.items():
            weights = np.full(len(np.asarray(values)), 1 / max(1, len(np.asarray(values))))
            axes.hist(
                values,
                np.linspace(0, 1, 26).tolist(),
                weights=weights,
                alpha=0.5,
                color=colour[group],
                label=group,
            )
        axes.set(xlabel=_text(x), ylabel="share of prompts", xlim=(0, 1))

    return _draw(name, title, draw)


def scatter(
    name: str,
    table: pd.DataFrame,
    x: str,
    y: str,
    title: str = "",
    *,
    group: str | None = None,
    value: str | None = None,
) -> Plot:
    """Column y against column x. Colours are those of the column ``group``, or a scale of the
    numbers in ``value``.

    Numbers that span a factor of 20 are on a logarithmic axis; an axis with infinities or texts has
    one place per value.
    """

    def draw(axes: Axes) -> None:
        rows = table.dropna(subset=[x, y])
        xs, ys = _place(axes.xaxis, rows[x]), _place(axes.yaxis, rows[y])
        if value is not None:
            dots = axes.scatter(xs, ys, c=rows[value].astype(float), cmap="viridis", s=60)
            axes.figure.colorbar(dots, label=_text(value))
        else:
            names = rows[group].astype(str) if group else pd.Series("all", rows.index)
            colour = _colour([*names])
            for label in dict.fromkeys(names):
                axes.scatter(
                    xs[names == label], ys[names == label], color=colour[label], label=_text(label)
                )
        axes.set(xlabel=_text(x), ylabel=_text(y))

    return _draw(name, title, draw)


def _place(axis: Any, values: pd.Series) -> pd.Series:
    """Where the values are on an axis, whose scale or ticks are set."""
    numbers = pd.to_numeric(values, errors="coerce")
    if values.map(lambda v: isinstance(v, bool)).any() or not np.isfinite(numbers).all():
        names = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        axis.set_ticks(range(len(names)), [_text("∞" if v == math.inf else v) for v in names])
        return values.map({v: float(i) for i, v in enumerate(names)})
    if len(numbers) and numbers.min() > 0 and numbers.max() >= 20 * numbers.min():
        axis._set_axes_scale("log")
    return numbers


def forest(name: str, estimates: pd.DataFrame, reference: float, title: str = "") -> Plot:
    """One interval per row (columns name, value, low, high) beside the line of no difference."""

    def draw(axes: Axes) -> None:
        places = -np.arange(len(estimates))
        bars = [estimates["value"] - estimates["low"], estimates["high"] - estimates["value"]]
        axes.axvline(reference, color="#94a3b8", lw=1)
        axes.errorbar(
            estimates["value"], places, xerr=np.abs(bars), fmt="o", color=COLOURS["expert"]
        )
        axes.set_yticks(places, [_text(n) for n in estimates["name"]])
        axes.grid(axis="y", visible=False)

    return _draw(name, title, draw, (9.0, 1.1 + 0.26 * len(estimates)))
