"""The numbers of a report: metrics with intervals, points of the trade-off plot, comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..config import EXPERTS
from ..metrics import METRICS, Estimate, difference, summarise, win_rate
from ..storage import Storage

ALL = "all sets"
CURVES = ("loss", "accuracy", "reward_margin")
_WIN_RATES = ("reward", "helpfulness", "safety")
_DIFFERENCES = ("safe_rate", "refusal_harmful", "refusal_benign", "joint")


@dataclass(frozen=True)
class Results:
    """The numbers of a report.

    Attributes:
        summary: as ``metrics.summarise`` gives it, by model, set and (NaN for all of them)
            category.
        points: as ``plots.tradeoff`` takes them, with their set.
        comparisons: columns name, value, low, high, n, over (what the interval is over), reference
            (0.5 for a win rate, 0 for a difference).
        axes: titles of x and of y.
        intervals: how the intervals were made, in one sentence.
    """

    summary: pd.DataFrame
    points: pd.DataFrame
    comparisons: pd.DataFrame
    axes: tuple[str, str]
    intervals: str


def over_prompts(answers: pd.DataFrame, pairs: Iterable[tuple[str, str]] = ()) -> Results:
    """Metrics with intervals over prompts; the first of each of ``pairs`` against the second."""
    summary = [summarise(answers)]
    if answers["set"].nunique() > 1:
        summary.append(summarise(answers, ["model"]).assign(set=ALL))
    if answers["category"].fillna("").ne("").any():
        by_category = summarise(answers, ["model", "set", "category"])
        summary.append(by_category[by_category["category"].fillna("").ne("")])
    table = pd.concat(summary, ignore_index=True)
    if "category" not in table:
        table["category"] = None
    x, y = _axes(answers)
    lines = [line for of, against in pairs for line in _comparisons(answers, of, against)]
    return Results(
        table,
        _points(answers, table, x[0], y[0]),
        pd.DataFrame(lines, columns=["name", "value", "low", "high", "n", "over", "reference"]),
        (x[1], y[1]),
        "95% over prompts: Wilson for rates of one seed, else percentile bootstrap of 2000 draws",
    )


def _axes(answers: pd.DataFrame) -> tuple[tuple[str, str], tuple[str, str]]:
    """(metric, title) of x and of y: reward and safety where judges gave them, else refusals."""

    def known(column: str) -> bool:
        return column in answers and bool(answers[column].notna().any())

    x = ("refusal_benign", "benign prompts not refused →")
    if known("reward"):
        benign = bool(answers["harmful"].eq(False).any())
        x = (
            ("helpfulness", "reward on benign prompts →")
            if benign
            else ("reward", "reward on all prompts →")
        )
    y = ("refusal_harmful", "harmful prompts refused →")
    return x, ("safe_rate", "safe on harmful prompts →") if known("safe") else y


def _points(answers: pd.DataFrame, summary: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    whole = summary[summary["category"].isna()].set_index(["model", "set"])
    sides = []
    for axis, metric in (("x", x), ("y", y)):
        side = whole.loc[whole["metric"] == metric, ["value", "low", "high"]]
        if metric == "refusal_benign":  # shown the other way round, so that up and right is better
            side = (1 - side).rename(columns={"low": "high", "high": "low"})
        sides.append(
            side.rename(columns={"value": axis, "low": f"{axis}_low", "high": f"{axis}_high"})
        )
    points = sides[0].join(sides[1], how="inner").reset_index().rename(columns={"model": "label"})
    families = answers.drop_duplicates("model").set_index("model")["family"]
    return points.assign(family=points["label"].map(families))


def _comparisons(answers: pd.DataFrame, of: str, against: str) -> list[dict[str, Any]]:
    """Win rates and differences of one model against another, by set and over all sets."""
    sets = list(dict.fromkeys(answers["set"]))
    lines = []
    for name in [*sets, ALL] if len(sets) > 1 else sets:
        rows = answers if name == ALL else answers[answers["set"] == name]
        a, b = rows[rows["model"] == of], rows[rows["model"] == against]
        for metric in _WIN_RATES:
            title = f"{of} against {against}: win rate, {METRICS[metric].title}"
            lines.append(comparison(title, win_rate(a, b, metric), f"prompts of {name}", 0.5))
        for metric in _DIFFERENCES:
            title = f"{of} minus {against}: {METRICS[metric].title}"
            lines.append(comparison(title, difference(a, b, metric), f"prompts of {name}", 0.0))
    return [line for line in lines if line["n"]]


def comparison(name: str, estimate: Estimate, over: str, reference: float) -> dict[str, Any]:
    """A row of ``Results.comparisons``."""
    return {"name": name, **estimate._asdict(), "over": over, "reference": reference}


def training_curves(runs: Iterable[tuple[str, Storage]]) -> dict[str, list[tuple[float, float]]]:
    """ "STAGE of RUN: METRIC" -> (step, value) of training, at most some 200 points each.

    Args:
        runs: the name of each run, and its directory.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, folder in runs:
        for stage in (*EXPERTS, "router"):
            file = f"metrics/{stage}.jsonl"
            if not folder.exists(file):
                continue
            log = pd.DataFrame([json.loads(line) for line in folder.read(file).splitlines()])
            log = log[log["split"] == "train"]
            for metric in (m for m in CURVES if m in log):
                known = log[log[metric].notna()].iloc[:: math.ceil(len(log) / 200)]
                points = [
                    (float(s), float(v)) for s, v in zip(known["step"], known[metric], strict=True)
                ]
                curves[f"{stage}{name and f' of {name}'}: {metric}"] = points
    return curves


def summary_text(summary: pd.DataFrame) -> str:
    """The summary as text, one line per model and set."""
    table = summary[summary["category"].isna()]
    cells = table.assign(
        cell=[
            estimate_text(*line)
            for line in zip(table["value"], table["low"], table["high"], strict=True)
        ]
    )
    wide = cells.pivot(index=["model", "set"], columns="metric", values="cell")
    wide = wide.loc[list(dict.fromkeys(zip(table["model"], table["set"], strict=True)))]
    wide = wide[[m for m in METRICS if m in wide]].rename(
        columns={m: METRICS[m].title for m in METRICS}
    )
    return aligned(wide.reset_index())


def estimate_text(value: float, low: float, high: float) -> str:
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def aligned(table: pd.DataFrame) -> str:
    """A table as text; what is missing is blank."""
    return str(table.to_string(index=False, na_rep="", justify="right"))
