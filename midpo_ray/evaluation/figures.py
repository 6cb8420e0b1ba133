"""Figures of an answers table, with 95% intervals: pure numpy on rows, so that a few lines recompute them from answers.csv.

A row is one answer: model, seed, set, id (of the prompt), harmful, category, and what the judges gave (reward, cost, safe,
refused, ...; None where no judge says). P prompts, S seeds. Rows of one prompt (its seeds) stay together: a prompt's value is
their mean, and it is prompts that are drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]
Triple = tuple[float, float, float]  # value, low, high
DRAWS = 2000


class Figure(NamedTuple):
    title: str
    column: str
    harmful: bool | None  # which prompts count: harmful, benign, or (None) all
    sign: float = 1.0
    share: bool = False
    better: str = "high"  # high, low, or "" where neither is


FIGURES = {
    "helpfulness": Figure("reward, benign", "reward", False),
    "reward": Figure("reward, all", "reward", None),
    "safety": Figure("safety, −cost", "cost", None, -1.0),
    "safe_rate": Figure("safe, harmful", "safe", True, share=True),
    "degenerate": Figure("degenerate", "degenerate", None, share=True, better="low"),
    "refusal_harmful": Figure("refuses harmful", "refused", True, share=True),
    "refusal_benign": Figure("refuses benign", "refused", False, share=True, better="low"),
    "joint": Figure("joint", "joint", None, share=True),
    "malformed": Figure("malformed", "malformed", None, share=True, better="low"),
    "truncated": Figure("truncated", "truncated", None, share=True, better="low"),
    "length": Figure("length, tokens", "tokens", None, better=""),
}


def value(row: Row, figure: str) -> float | None:
    """A row's part in a figure; None where the figure does not count it."""
    what = FIGURES[figure]
    given = row.get(what.column)
    if given is None or (what.harmful is not None and row.get("harmful") != what.harmful):
        return None
    number = what.sign * float(given)
    return None if math.isnan(number) else number


def prompt_values(rows: Iterable[Row], figure: str) -> np.ndarray:
    """[P] values of the prompts that the figure counts, each the mean over its rows; in the order of their first rows."""
    found: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        number = value(row, figure)
        if number is not None:
            found.setdefault((row["set"], row["id"]), []).append(number)
    return np.array([np.mean(numbers) for numbers in found.values()])


def bootstrap(
    values: Sequence[float] | np.ndarray, statistic: str = "mean", draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean (or median) over [P] values, drawn with replacement; NaN where there is none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return math.nan, math.nan
    of: Any = {"mean": np.mean, "median": np.median}[statistic]
    if np.ptp(values) == 0:
        return float(of(values)), float(of(values))
    rng = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // len(values))  # bounded memory
    shapes = [(min(at_once, draws - done), len(values)) for done in range(0, draws, at_once)]
    drawn = np.concatenate(
        [of(values[rng.integers(len(values), size=shape)], axis=1) for shape in shapes]
    )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Iterable[Row], by: Sequence[str] = ("model", "set")) -> list[dict[str, Any]]:
    """For each group, in the order of first appearance, and each figure that a judge has values for: a dict of the group's
    columns, figure, value, low, high (95% bootstrap over prompts), prompts (how many)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = []
    for names, members in groups.items():
        for figure in FIGURES:
            values = prompt_values(members, figure)
            if len(values):
                low, high = bootstrap(values)
                line = {
                    "figure": figure,
                    "value": float(values.mean()),
                    "low": low,
                    "high": high,
                    "prompts": len(values),
                }
                lines.append({**dict(zip(by, names, strict=True)), **line})
    return lines


def paired(
    a: Iterable[Row], b: Iterable[Row], figure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values of a [N], values of b [N], number of the prompt [N]) of the rows that both have, aligned by set, id and seed."""

    def keyed(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
        numbers = {(r["set"], r["id"], r["seed"]): value(r, figure) for r in rows}
        return {key: number for key, number in numbers.items() if number is not None}

    mine, theirs = keyed(a), keyed(b)
    keys = [key for key in mine if key in theirs]
    prompts: dict[tuple[Any, ...], int] = {}
    owner = [prompts.setdefault(key[:2], len(prompts)) for key in keys]
    return (
        np.array([mine[k] for k in keys]),
        np.array([theirs[k] for k in keys]),
        np.array(owner, dtype=int),
    )


def win_rate(a: Iterable[Row], b: Iterable[Row], figure: str = "reward") -> Triple:
    """Share of prompts where a's score (reward, safety or helpfulness) beats b's, ties half, with its interval over prompts."""
    mine, theirs, owner = paired(a, b, figure)
    return _over_prompts((mine > theirs) + 0.5 * (mine == theirs), owner)


def difference(a: Iterable[Row], b: Iterable[Row], figure: str) -> Triple:
    """Mean of a's values less b's on the same prompts, with its interval over prompts."""
    mine, theirs, owner = paired(a, b, figure)
    return _over_prompts(mine - theirs, owner)


def _over_prompts(values: np.ndarray, owner: np.ndarray) -> Triple:
    if not len(values):
        return math.nan, math.nan, math.nan
    each = np.bincount(owner, values) / np.bincount(owner)
    return (float(each.mean()), *bootstrap(each))


def seed_means(rows: Iterable[Row], figure: str) -> dict[Any, float]:
    """seed -> mean of the figure over the seed's prompts."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["seed"], []).append(row)
    values = {seed: prompt_values(members, figure) for seed, members in groups.items()}
    return {seed: float(v.mean()) for seed, v in values.items() if len(v)}
