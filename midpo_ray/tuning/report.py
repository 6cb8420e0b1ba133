"""What a sweep leaves: results.parquet and .csv with one row per trial, best.yaml, report.html."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..config import Config, dump
from ..errors import UserError
from ..metrics import Estimate, pareto, t_interval
from ..pipeline.signals import write_table
from ..report.page import Page, PageSection, PageTable, write_page
from ..report.plots import lines, scatter
from ..storage import Storage
from .space import Space, at

log = logging.getLogger(__name__)


def results_table(rows: Sequence[Mapping[str, Any]], space: Space) -> pd.DataFrame:
    """One row per trial: point, seed, state, share of the steps, values, last metrics."""
    table = []
    for row in rows:
        last = row["curve"][-1] if row["curve"] else {}
        values = {name: row["values"].get(name) for name in space.space}
        share = row["shares"][-1] if row["shares"] else 0.0
        head = {key: row[key] for key in ("point", "seed", "state")}
        table.append({**head, "share": share, **values, **last})
    return pd.DataFrame(table)


def choose(points: pd.DataFrame, space: Space) -> Any:
    """The label of the best row of ``points`` (a column per metric); the first of equals.

    ``knee``: on the Pareto front, the largest sum of the metrics scaled to [0, 1] over the front;
    with two metrics, the point farthest from the line between the front's ends.

    Raises:
        UserError: no point meets the rule's bound.
    """
    signs = pd.Series({name: 1 if d == "max" else -1 for name, d in space.metrics.items()})
    rule, gains = space.rule(), points[list(space.metrics)] * signs
    if rule[0] == "knee":
        front = gains[pareto(gains)]
        spread = (front.max() - front.min()).replace(0.0, 1.0)
        return ((front - front.min()) / spread).sum(axis=1).idxmax()
    if len(rule) > 1:
        metric, sign, bound, _ = rule
        meets = operator.ge if sign == ">=" else operator.le
        gains = gains[meets(points[metric], float(bound))]
        if gains.empty:
            values = ", ".join(f"{value:.4g}" for value in points[metric])
            raise UserError(
                f"--select: no finished point has {metric} {sign} {bound}, but {values}"
            )
    return gains[rule[-1]].idxmax()


def write_sweep_report(
    folder: Storage,
    space: Space,
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    command: str,
) -> None:
    """Write the files of a finished sweep, and log its table and winner.

    Raises:
        UserError: no trial was finished, or none meets ``select``.
    """
    table, metrics = results_table(rows, space), list(space.metrics)
    stored = table.map(lambda value: str(value) if isinstance(value, list | dict) else value)
    for key in space.space:  # a column has one type
        if stored[key].map(type).nunique() > 1:
            stored[key] = stored[key].map(lambda value: None if value is None else str(value))
    write_table(folder, "results.parquet", pa.Table.from_pandas(stored, preserve_index=False))
    folder.write("results.csv", stored.to_csv(index=False).encode())
    ended = table[table["state"] == "finished"]
    if ended.empty:
        faults = [row["error"] for row in rows if row["error"]]
        raise UserError(f"no trial was finished; the first fault: {(faults or ['none'])[0]}")
    means = ended.groupby("point")[metrics].mean()
    winner = choose(means, space)
    front = means.index[pareto(means, [d == "max" for d in space.metrics.values()])]
    values = next(row["values"] for row in rows if row["point"] == winner)
    seen = next(r["curve"][-1] for r in rows if (r["point"], r["seed"]) == (winner, 0))
    chosen = f"point {winner} of {len(set(table['point']))}, chosen by {space.select}"
    header = [
        f"From the sweep {command}",
        f"in {folder.uri}: {chosen}",
        *(f"{key} {value}" for key, value in values.items()),
        f"Held-out pairs: {', '.join(f'{key} {value:.6f}' for key, value in seen.items())}",
    ]
    best = at(config, space, values, "best.yaml")
    best = best.model_copy(update={"name": f"{config.name}-best-{name}"})
    notes = "".join(f"# {' '.join(line.split())}\n" for line in header)
    folder.write("best.yaml", (notes + dump(best)).encode())
    shown = _summary(ended, space, set(front))
    page = Page(f"Sweep {name}", _sections(space, rows, table, shown), [space.about, *header])
    write_page(folder, page)
    log.info("%s", shown.map(_text).to_string(index=False))
    log.info("%s: %s", chosen, ", ".join(header[2:-1]))
    log.info("report: %s/report.html\nbest recipe: %s/best.yaml", folder.uri, folder.uri)
    if space.seeds < 2:
        log.info("one seed per point: differences may be noise; --seeds 3 gives intervals")


def _text(cell: Any) -> str:
    if not isinstance(cell, Estimate):
        return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    interval = f" [{cell.low:.4f}, {cell.high:.4f}]" if cell.n > 1 else ""
    return f"{cell.value:.4f}{interval}"


def _summary(ended: pd.DataFrame, space: Space, front: set[Any]) -> pd.DataFrame:
    """One row per finished point: mean and interval over seeds, also of the differences, paired by
    seed, from the first point."""
    first = ended[ended["point"] == 0].set_index("seed")
    lines_ = []
    for point, trials in ended.groupby("point"):
        line: dict[str, Any] = {"point": f"{point}{'*' if point in front else ''}"}
        line |= {key: trials.iloc[0][key] for key in space.space}
        for metric in space.metrics:
            line[metric] = t_interval(trials[metric])
            if point and len(first) > 1:
                difference = trials.set_index("seed")[metric] - first[metric]
                line[f"{metric}, difference from point 0"] = t_interval(difference)
        lines_.append(line)
    return pd.DataFrame(lines_)


def _sections(
    space: Space, rows: Sequence[Mapping[str, Any]], table: pd.DataFrame, shown: pd.DataFrame
) -> list[PageSection]:
    metrics, keys = list(space.metrics), list(space.space)
    measured = table.dropna(subset=metrics[:1]) if metrics[0] in table else table.iloc[:0]
    plots: list[Any] = []
    for metric in metrics:
        for key in keys:
            drawn = measured.dropna(subset=[key])
            plots.append(scatter(f"{metric}-{key}", drawn, key, metric, group="state"))
    ended = measured[measured["state"] == "finished"]
    if len(keys) > 1:
        both = ended.dropna(subset=keys[:2])
        plots += [scatter(f"{m}-map", both, keys[0], keys[1], m, value=m) for m in metrics]
    if len(metrics) > 1:
        plots.append(scatter("front", measured, metrics[0], metrics[1], group="state"))
    groups = {f"point {row['point']}, seed {row['seed']}": row["state"] for row in rows}
    for metric in metrics:
        curves = {
            f"point {row['point']}, seed {row['seed']}": (
                row["shares"],
                [values[metric] for values in row["curve"]],
            )
            for row in rows
        }
        plots.append(lines(f"{metric}-curves", curves, "share of the steps", metric, groups=groups))
    note = "Finished points (* on the Pareto front); 95% intervals over seeds, on the same pairs."
    return [
        PageSection("Points", [PageTable(shown)], note),
        PageSection("Plots", plots),
        PageSection("Trials", [PageTable(table.replace({np.nan: None}), folded=True)]),
    ]
