"""Metrics of answers, score models, sweeps and studies, each with a 95% interval.

Intervals over prompts keep the rows of one prompt together (its seeds, its pairs) and resample
prompts; intervals over training seeds are Student's t. A null verdict (None or NaN) is excluded
from a metric, and ``summarise`` counts it.

An answers table has one row per answer: model, seed, set, id (of the prompt), harmful (True, False,
or None where unknown), category, and one column per verdict (reward, cost, safe, refused, ...).
N rows, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

DRAWS = 2000  # bootstrap samples
_ELEMENTS = 1_000_000  # values drawn at once: it bounds the memory of a bootstrap


class Estimate(NamedTuple):
    """A metric with its 95% interval. The bounds are NaN where ``n`` values cannot give one."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Metric:
    """The mean of ``sign`` times ``column`` of an answers table, over the prompts that count."""

    title: str
    column: str
    harmful: bool | None = None  # which prompts count: harmful ones, benign ones, or (None) all
    sign: float = 1.0
    share: bool = False
    better: str = "high"  # "high", "low", or "" where neither is better


METRICS = {
    "helpfulness": Metric("reward, benign", "reward", harmful=False),
    "reward": Metric("reward, all", "reward"),
    "safety": Metric("safety, −cost", "cost", sign=-1.0),
    "safe_rate": Metric("safe, harmful", "safe", harmful=True, share=True),
    "degenerate": Metric("degenerate", "degenerate", share=True, better="low"),
    "refusal_harmful": Metric("refuses harmful", "refused", harmful=True, share=True),
    "refusal_benign": Metric("refuses benign", "refused", False, share=True, better="low"),
    "joint": Metric("joint", "joint", share=True),
    "malformed": Metric("malformed", "malformed", share=True, better="low"),
    "truncated": Metric("truncated", "truncated", share=True, better="low"),
    "length": Metric("length, tokens", "tokens", better=""),
}


# --- intervals ------------------------------------------------------------------------------------


def known(values: ArrayLike) -> np.ndarray:
    """The values that are not null, as float64."""
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[~np.isnan(numbers)]


def t_interval(values: ArrayLike) -> Estimate:
    """Mean over training seeds, with its interval by Student's t; null values are excluded."""
    numbers = known(values)
    if not len(numbers):
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers))
    return Estimate(mean, mean - half, mean + half, len(numbers))


def bootstrap(
    values: ArrayLike, statistic: Callable[..., Any] = np.mean, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """``statistic(values, axis=...)`` of [P] prompts' values, with its percentile interval."""
    numbers = known(values)
    if not len(numbers):
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(statistic(numbers, axis=0))
    if len(numbers) < 2:
        return Estimate(value, math.nan, math.nan, 1)
    low, high = stats.bootstrap(
        (numbers,),
        statistic,
        n_resamples=draws,
        batch=max(1, _ELEMENTS // len(numbers)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(low), float(high), len(numbers))


def bootstrap_weighted(
    statistic: Callable[[np.ndarray], float], prompts: ArrayLike, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """``statistic`` of row weights [N], with its percentile interval over draws of whole prompts.

    Args:
        prompts: [N], which prompt each row belongs to; ``Estimate.n`` is the number of prompts.
    """
    names, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    value = float(statistic(np.ones(len(prompt))))
    if len(names) < 2:
        return Estimate(value, math.nan, math.nan, len(names))

    def of_draw(chosen: np.ndarray) -> float:
        return statistic(np.bincount(chosen, minlength=len(names))[prompt])

    low, high = stats.bootstrap(
        (np.arange(len(names)),),
        of_draw,
        n_resamples=draws,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(low), float(high), len(names))


def wilson(successes: float, n: int) -> Estimate:
    """The rate successes / n with its Wilson score interval, which is not empty at 0 and at 1."""
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    interval = stats.binomtest(round(successes), n).proportion_ci(method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


# --- of an answers table --------------------------------------------------------------------------


def metric_values(answers: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Columns set, id, seed, value of the prompts that count; NaN where a verdict is null."""
    what = METRICS[metric]
    rows = answers if what.harmful is None else answers[answers["harmful"].eq(what.harmful)]
    values = rows[what.column].astype("float64") * what.sign if what.column in rows else math.nan
    return rows[["set", "id", "seed"]].assign(value=values)


def prompt_means(answers: pd.DataFrame, metric: str) -> pd.Series:
    """One value per prompt, the mean over its rows without nulls; indexed by set and id."""
    rows = metric_values(answers, metric).dropna(subset="value")
    return rows.groupby(["set", "id"], sort=False)["value"].mean()


def _over_prompts(values: pd.Series, share: bool = False) -> Estimate:
    """Mean of [P] values: Wilson's interval for a rate of yes and no, otherwise a bootstrap."""
    if share and values.isin((0.0, 1.0)).all():
        return wilson(values.sum(), len(values))
    return bootstrap(values)


def summarise(answers: pd.DataFrame, by: Sequence[str] = ("model", "set")) -> pd.DataFrame:
    """Every metric of every group, in the order of the groups' first rows.

    Returns:
        The columns of ``by``, metric, value, low, high, prompts (P), nulls (rows without a
        verdict). A metric for which a group has no verdict at all is left out.
    """
    lines = []
    for names, rows in answers.groupby(list(by), sort=False, dropna=False):
        for metric, what in METRICS.items():
            means = prompt_means(rows, metric)
            if len(means):
                value, low, high, prompts = _over_prompts(means, what.share)
                nulls = int(metric_values(rows, metric)["value"].isna().sum())
                lines.append((*names, metric, value, low, high, prompts, nulls))
    columns = [*by, "metric", "value", "low", "high", "prompts", "nulls"]
    return pd.DataFrame(lines, columns=columns)


def paired(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Columns a and b of the rows that both tables have values for, indexed by set, id and seed."""
    sides = [
        metric_values(rows, metric).dropna(subset="value").set_index(["set", "id", "seed"])
        for rows in (a, b)
    ]
    joined = sides[0].join(sides[1], lsuffix="_a", rsuffix="_b", how="inner")
    return joined.set_axis(["a", "b"], axis=1)


def win_rate(a: pd.DataFrame, b: pd.DataFrame, metric: str = "reward") -> Estimate:
    """Share of prompts on which a's value is above b's (ties half), with its interval."""
    both = paired(a, b, metric)
    return _of_pairs(_wins(both))


def difference(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> Estimate:
    """Mean of a's values minus b's on the same prompts, with its interval."""
    both = paired(a, b, metric)
    return _of_pairs(both["a"] - both["b"])


def _wins(both: pd.DataFrame) -> pd.Series:
    return (both["a"] > both["b"]) + 0.5 * (both["a"] == both["b"])


def _of_pairs(values: pd.Series) -> Estimate:
    return bootstrap(values.groupby(level=["set", "id"]).mean())


def seed_means(answers: pd.DataFrame, metric: str) -> pd.Series:
    """The metric of each seed, indexed by seed: the mean over the seed's prompts."""
    rows = metric_values(answers, metric).dropna(subset="value")
    return rows.groupby("seed")["value"].mean()


def seed_win_rates(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> pd.Series:
    """The win rate of each seed that both tables have, indexed by seed."""
    return _wins(paired(a, b, metric)).groupby(level="seed").mean()


# --- classification and calibration ---------------------------------------------------------------


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Probability that a positive's score exceeds a negative's, ties half; NaN if one is empty."""
    high, low = known(positive), known(negative)
    if not len(high) or not len(low):
        return math.nan
    return float(stats.mannwhitneyu(high, low).statistic / (len(high) * len(low)))


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float) -> float:
    """The highest true positive rate of thresholds whose false positive rate is at most ``fpr``."""
    high, low = known(positive), np.sort(known(negative))[::-1]
    if not len(high) or not len(low):
        return math.nan
    allowed = math.floor(fpr * len(low) + 1e-9)
    return 1.0 if allowed >= len(low) else float((high > low[allowed]).mean())


def calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    bins: int = 10,
    start: float = 0.0,
) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599) over equal bins of [start, 1]."""
    sure, right = np.asarray(confidence, float), np.asarray(correct, float)
    weight = np.ones(len(sure)) if weights is None else np.asarray(weights, float)
    gaps = np.bincount(_bins(sure, bins, start), weight * (sure - right), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


def reliability(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 10, start: float = 0.0
) -> pd.DataFrame:
    """The bins that are not empty: from, to, count, mean confidence, share that is right."""
    sure = np.asarray(confidence, float)
    rows = pd.DataFrame({"confidence": sure, "right": np.asarray(correct, float)})
    groups = rows.groupby(_bins(sure, bins, start))
    table = groups.mean().assign(count=groups.size())
    width = (1 - start) / bins
    table = table.assign(**{"from": start + table.index * width})
    return table.assign(to=table["from"] + width)[["from", "to", "count", "confidence", "right"]]


def _bins(sure: np.ndarray, bins: int, start: float) -> np.ndarray:
    return np.clip(((sure - start) / (1 - start) * bins).astype(int), 0, bins - 1)


def pareto(values: ArrayLike, maximize: Sequence[bool] | None = None) -> np.ndarray:
    """Which of [N, M] points no other dominates (as good in all columns, better in one); bool [N].

    Args:
        maximize: per column, whether larger is better; default: all.

    A point with a null value is not on the front.
    """
    points = np.asarray(values, dtype=np.float64)
    signs = np.ones(points.shape[1]) if maximize is None else np.where(maximize, 1.0, -1.0)
    gains = points * signs
    at_least = (gains[:, None] >= gains[None]).all(-1)
    better = (gains[:, None] > gains[None]).any(-1)
    dominated = (at_least & better).any(axis=0)
    return np.asarray(~dominated & ~np.isnan(gains).any(axis=1))


# --- of score models ------------------------------------------------------------------------------


def score_metrics(kind: str, pairs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """How well a reward or cost model orders held-out pairs, with intervals over prompts.

    Args:
        pairs: columns prompt, chosen and rejected (scores; chosen is the better or safer
            response), sign_chosen and sign_rejected (+1 unsafe, -1 safe, 0 unknown).

    Returns:
        JSON-able: pairs, prompts, mean_score, std_score, accuracy (ties half), loss in nats (ln 2
        is chance), calibration_error and reliability of sigmoid(|margin|); for a cost model also
        ``sign``, the same of each response's sign. Estimates are [value, low, high].
    """
    table = pd.DataFrame(pairs)
    margin = (
        table["chosen"] - table["rejected"]
        if kind == "reward"
        else table["rejected"] - table["chosen"]
    )
    scores = pd.concat([table["chosen"], table["rejected"]])
    result = {
        "pairs": len(table),
        "prompts": table["prompt"].nunique(),
        "mean_score": float(scores.mean()),
        "std_score": float(scores.std(ddof=0)),
        **_of_evidence(margin.to_numpy(float), table["prompt"].to_numpy()),
    }
    if kind == "cost":
        signs = pd.concat([table["sign_chosen"], table["sign_rejected"]])
        labelled = (signs != 0).to_numpy()
        evidence = (scores * signs).to_numpy(float)[labelled]
        if len(evidence):
            prompts = pd.concat([table["prompt"], table["prompt"]]).to_numpy()[labelled]
            result["sign"] = {"responses": len(evidence), **_of_evidence(evidence, prompts)}
    return result


def _of_evidence(evidence: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """``evidence`` [N]: log-odds that the model gives to the truth; positive where it is right."""
    right = (evidence > 0) + 0.5 * (evidence == 0)
    sure = 1 / (1 + np.exp(-np.abs(evidence)))
    loss = np.logaddexp(0, -evidence)
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "accuracy": lambda weight: float(np.average(right, weights=weight)),
        "loss": lambda weight: float(np.average(loss, weights=weight)),
        "calibration_error": lambda weight: calibration_error(sure, right, weight, start=0.5),
    }
    estimates = {name: list(bootstrap_weighted(f, prompts)[:3]) for name, f in statistics.items()}
    return {**estimates, "reliability": reliability(sure, right, start=0.5).to_dict("records")}


def describe_score_metrics(kind: str, result: Mapping[str, Any]) -> str:
    """``score_metrics`` as text, one line per metric."""
    lines = [
        f"{kind} model on {result['pairs']} held-out pairs of {result['prompts']} prompts, "
        "95% intervals over prompts"
    ]
    titles = {
        "accuracy": "accuracy",
        "loss": "loss (chance 0.693)",
        "calibration_error": "calibration error",
    }
    for prefix, part in (("", result), ("sign: ", result.get("sign", {}))):
        for name, title in titles.items():
            if name in part:
                value, low, high = part[name]
                lines.append(f"  {prefix + title:28}{value:.3f}  [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)
