"""What a sweep leaves: results.parquet and .csv (a row a trial), best.yaml, and report.html, one file with its plots as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from ..config import Config, dump
from ..errors import UserError
from ..metrics import Estimate, t_interval
from ..pipeline.signals import write_table
from .rungs import choose
from .rungs import front as pareto_front
from .space import at
from .sweep import Say, Sweep

Row = dict[str, Any]


def rows(sweep: Sweep) -> list[Row]:
    """A row a trial that ran: point, seed, state, share of its steps that counts, the point's values, every metric there."""
    table = []
    for number, verdict in enumerate(sweep.verdicts()):
        for seed in range(sweep.space.seeds if verdict.state == "finished" else 1):
            unit = sweep.unit(number, seed)
            curve = sweep.curve(unit)[: verdict.rungs]
            state = "failed" if "failed" in sweep.records[unit.id] else verdict.state
            share = sweep.rungs[len(curve) - 1] if curve else 0.0
            keys = {k: sweep.points[number].get(k) for k in sweep.space.space}
            table.append(
                {
                    "point": number,
                    "seed": seed,
                    "state": state,
                    "share": share,
                    **keys,
                    **(curve[-1] if curve else {}),
                }
            )
    return table


def write(sweep: Sweep, config: Config, name: str, command: str, say: Say) -> None:
    """The four files; the result is told.

    Raises:
        UserError: no trial came to its end, or none meets ``select``.
    """
    table, metrics = rows(sweep), sweep.space.metrics
    arrow = pa.table({k: _column([r.get(k) for r in table]) for k in max(table, key=len)})
    write_table(sweep.run, "results.parquet", arrow)
    sink = pa.BufferOutputStream()
    pacsv.write_csv(arrow, sink)
    sweep.run.write("results.csv", sink.getvalue().to_pybytes())
    ends = {
        p: [r for r in table if r["point"] == p and r["state"] == "finished"]
        for p in range(len(sweep.points))
    }
    ends = {p: e for p, e in ends.items() if e}
    if not ends:
        faults = [
            f
            for p in range(len(sweep.points))
            if (f := sweep.records[sweep.unit(p).id].get("failed"))
        ]
        raise UserError(
            f"no trial came to its end; the first fault: {faults[0] if faults else 'none'}"
        )
    means = {p: {m: t_interval([r[m] for r in e]).value for m in metrics} for p, e in ends.items()}
    numbers = list(means)
    winner = numbers[choose(list(means.values()), metrics, sweep.space.rule())]
    front = [numbers[i] for i in pareto_front(list(means.values()), metrics)]
    lines = [_line(p, ends, sweep, p in front) for p in numbers]
    values = [f"{k} {v}" for k, v in sweep.points[winner].items()]
    says = f"winner by {sweep.space.select}: point {winner}: {', '.join(values)}"
    best = at(config, sweep.space, sweep.points[winner], "best.yaml").model_copy(
        update={"name": f"{config.name}-best-{name}"}
    )
    seen = sweep.curve(sweep.unit(winner))[-1]
    header = [
        f"From the sweep {command}",
        f"in {sweep.run.uri}: point {winner} of {len(sweep.points)}, chosen by {sweep.space.select}",
        *values,
        "Held-out pairs, as the sweep measured them: "
        + ", ".join(f"{k} {v:.6f}" for k, v in seen.items()),
    ]
    sweep.run.write(
        "best.yaml",
        "".join(f"# {' '.join(h.split())}\n" for h in header).encode() + dump(best).encode(),
    )
    sweep.run.write(
        "report.html",
        _page(name, [command, says, _clock(sweep, table)], table, lines, front, sweep).encode(),
    )
    for line in lines:
        say("  ".join(f"{k} {v}" for k, v in line.items()))
    say(
        f"{says}\n{_clock(sweep, table)}\nreport: {sweep.run.uri}/report.html\nbest recipe: {sweep.run.uri}/best.yaml"
    )
    if sweep.space.seeds < 2:
        say("one seed a point: differences may be noise; --seeds 3 gives intervals")


def _column(values: list[Any]) -> pa.Array:
    """A column of numbers, or of texts where a value is something else."""
    plain = all(
        v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values
    )
    if plain and any(isinstance(v, float) for v in values):
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array(values) if plain else pa.array([None if v is None else str(v) for v in values])


def _line(point: int, ends: dict[int, list[Row]], sweep: Sweep, front: bool) -> dict[str, str]:
    """A finished point: its values, its metrics as mean ± half interval, and against the first point, paired by seed."""
    mine = ends[point]
    line = {
        "point": f"{point}{'*' if front else ''}",
        **{k: _number(mine[0][k]) for k in sweep.space.space},
    }
    first = {r["seed"]: r for r in ends.get(0, ())}
    for metric in sweep.space.metrics:
        line[metric] = _pm(t_interval([r[metric] for r in mine]))
        pairs = [r[metric] - first[r["seed"]][metric] for r in mine if r["seed"] in first]
        if len(pairs) > 1 and point:
            line[f"{metric} against point 0"] = _pm(t_interval(pairs))
    return line


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _pm(estimate: Estimate) -> str:
    half = estimate.high - estimate.value
    return f"{estimate.value:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def _clock(sweep: Sweep, table: Sequence[Row]) -> str:
    """What start-up took of the trials' time."""
    clocks = [
        c
        for r in table
        if "stepped"
        in (c := sweep.records[sweep.unit(r["point"], r["seed"]).id].get("clock") or [{}])[0]
    ]
    starts = [c[0]["stepped"] - c[0]["asked"] for c in clocks]
    whole = sum(max(e["ended"] for e in c) - c[0]["asked"] for c in clocks)
    if not starts:
        return ""
    return (f"{len(clocks)} trials, {whole:.0f} s; from request to first step {sum(starts) / len(starts):.1f} s (at most "
            f"{max(starts):.1f} s), {sum(starts) / whole:.0%} of the time")  # fmt: skip


COLOURS = {"finished": "#1f77b4", "stopped": "#bbbbbb", "failed": "#d62728"}


def _page(
    name: str,
    notes: list[str],
    table: list[Row],
    lines: list[dict[str, str]],
    front: list[int],
    sweep: Sweep,
) -> str:
    metrics, keys = list(sweep.space.metrics), list(sweep.space.space)
    ended = [r for r in table if metrics[0] in r]
    plots = []
    for metric in metrics:
        for key in keys:
            marks = [
                ([(r[key], r[metric])], COLOURS[r["state"]]) for r in ended if r[key] is not None
            ]
            plots.append(chart(f"{metric} against {key}", marks, key, metric))
    for metric in metrics if len(keys) > 1 else ():
        shown = [
            r for r in ended if r["state"] == "finished" and None not in (r[keys[0]], r[keys[1]])
        ]
        values = [r[metric] for r in shown]
        if not values:
            continue
        marks = [([(r[keys[0]], r[keys[1]])], _heat(r[metric], values)) for r in shown]
        plots.append(
            chart(
                f"{metric}, light to dark: {min(values):.4g} to {max(values):.4g}",
                marks,
                keys[0],
                keys[1],
                size=9,
            )
        )
    if len(metrics) > 1:
        x, y = metrics[:2]
        marks = [([(r[x], r[y])], COLOURS[r["state"]]) for r in ended]
        tops = sorted((r[x], r[y]) for r in ended if r["point"] in front and r["seed"] == 0)
        plots.append(chart("Pareto front", [*marks, (tops, "#d62728")], x, y))
    for metric in metrics:
        curves = []
        for row in ended:
            curve = sweep.curve(sweep.unit(row["point"], row["seed"]))
            points = [
                (s, v[metric])
                for s, v in zip(sweep.rungs, curve, strict=False)
                if s <= row["share"]
            ]
            curves.append((points, COLOURS[row["state"]]))
        plots.append(chart("learning curves (grey: stopped)", curves, "share of the steps", metric))
    axes = [a for a in (*keys, *metrics) if any(r[a] is not None for r in ended)]
    scales = {a: scale([r[a] for r in ended if r[a] is not None]) for a in axes}
    marks = [
        ([(a, scales[a][0](r[a])) for a in axes if r[a] is not None], COLOURS[r["state"]])
        for r in ended
    ]
    plots.append(
        chart(
            "parallel coordinates (each axis from its least to its most)",
            marks,
            "",
            "",
            width=140 * len(axes) + 90,
        )
    )
    heads = list(dict.fromkeys(h for line in lines for h in line))
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(line.get(h, ''))}</td>" for h in heads) + "</tr>"
        for line in lines
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{escape(name)}</title><style>body{{font:14px sans-serif;margin:2em}}"
        "td,th{padding:2px 10px;text-align:right}svg{margin:6px}</style>"
        f"<h1>Sweep {escape(name)}</h1><p>{escape(sweep.space.about)}</p>{''.join(f'<p>{escape(n)}</p>' for n in notes)}"
        "<p>Finished points (* on the Pareto front); ± is half a 95% interval over training seeds, on the same pairs.</p>"
        f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr>{cells}</table>{''.join(plots)}"
    )


def _heat(value: float, values: Sequence[float]) -> str:
    share = (value - min(values)) / ((max(values) - min(values)) or 1.0)
    return f"hsl(210,80%,{90 - 70 * share:.0f}%)"


def scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], dict[str, float]]:
    """(value -> place in [0, 1], ticks): numbers by size, by logarithm where they span a factor of 20, infinity at the end;
    anything else in order of appearance."""
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        names = list(dict.fromkeys(map(str, values)))
        places = {n: i / max(1, len(names) - 1) for i, n in enumerate(names)}
        return (lambda v: places[str(v)]), places
    finite = sorted({float(v) for v in values if math.isfinite(v)}) or [0.0]
    above = [v for v in finite if v > 0]
    log = finite[0] >= 0 and bool(above) and above[-1] >= 20 * above[0]
    low, high = (math.log(above[0]), math.log(above[-1])) if log else (finite[0], finite[-1])

    def place(value: Any) -> float:
        if not math.isfinite(value):
            return 1.0
        if log and value <= 0:
            return 0.0
        return 0.1 + 0.8 * (
            ((math.log(value) if log else value) - low) / (high - low) if high > low else 0.5
        )

    ends = {
        finite[0],
        *(above[:1] if log else ()),
        finite[-1],
        *(v for v in values if not math.isfinite(v)),
    }
    return place, {f"{v:.3g}": place(v) for v in sorted(ends)}


def chart(
    title: str,
    series: Sequence[tuple[Sequence[tuple[Any, Any]], str]],
    x: str,
    y: str,
    *,
    size: int = 4,
    width: int = 460,
) -> str:
    """An SVG of points, joined where a series has several: series are (points, colour); x and y name the axes."""
    points = [p for s, _ in series for p in s]
    place_x, ticks_x = scale([p[0] for p in points])
    place_y, ticks_y = scale([p[1] for p in points])
    height, left, low = 300, 70, 250

    def at_x(value: Any) -> float:
        return left + (width - left - 30) * place_x(value)

    def at_y(value: Any) -> float:
        return low - (low - 35) * place_y(value)

    parts = [f"<text x='{left}' y='18' font-weight='bold'>{escape(title)}</text>",
             f"<path d='M{left},30V{low}H{width - 20}' fill='none' stroke='black'/>",
             f"<text x='{width / 2}' y='{height - 8}' text-anchor='middle'>{escape(x)}</text>",
             f"<text transform='translate(14,{low / 2}) rotate(-90)' text-anchor='middle'>{escape(y)}</text>"]  # fmt: skip
    for text, place in ticks_x.items():
        across = left + (width - left - 30) * place
        parts.append(
            f"<text x='{across:.1f}' y='{low + 16}' text-anchor='middle'>{escape(text)}</text>"
        )
    for text, place in ticks_y.items():
        parts.append(
            f"<text x='{left - 5}' y='{low - (low - 35) * place + 4:.1f}' text-anchor='end'>{escape(text)}</text>"
        )
    for line, colour in series:
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in line)
        if len(line) > 1:
            parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}'/>")
        parts += [
            f"<circle cx='{at_x(a):.1f}' cy='{at_y(b):.1f}' r='{size}' fill='{colour}'/>"
            for a, b in line
        ]
    return f"<svg width='{width}' height='{height}' font-size='11'>{''.join(parts)}</svg>"
