"""Metrics against scipy, scikit-learn and closed forms, and their intervals against what is known of them."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score, roc_curve

from midpo_ray import metrics as m


def row(id, harmful=None, seed=0, model="m", set="s", **verdicts):
    keys = {"model": model, "set": set, "id": str(id), "seed": seed, "category": ""}
    return {**keys, "harmful": harmful, **verdicts}


# --- intervals ------------------------------------------------------------------------------------


def test_t_interval():
    values = [0.5, 0.7, 0.4, 0.9, 0.6]
    half = 2.776445105 * statistics.stdev(values) / math.sqrt(5)  # 4 degrees of freedom, 97.5%
    assert m.t_interval([*values, math.nan]) == pytest.approx((0.62, 0.62 - half, 0.62 + half, 5))
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert m.t_interval(values)[1:3] == pytest.approx(tuple(expected))
    assert m.t_interval([0.5])[::3] == (0.5, 1)
    assert math.isnan(m.t_interval([0.5]).low)
    assert m.t_interval([]).n == 0


def test_bootstrap_is_numpys_percentile():
    values = np.random.default_rng(3).normal(size=37)
    drawn = values[np.random.default_rng(0).integers(37, size=(2000, 37))]
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    assert m.bootstrap([*values, None]) == pytest.approx((values.mean(), low, high, 37))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    assert m.bootstrap(values, np.median)[1:3] == pytest.approx((low, high))


def test_bootstrap_covers():
    """The interval of a mean of 200 normal values contains the truth 95 times of 100, and has the width of theory."""
    rng = np.random.default_rng(1)
    found = [m.bootstrap(rng.normal(size=200), draws=400) for _ in range(300)]
    assert 0.91 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.98
    width = np.mean([e.high - e.low for e in found])
    assert width == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.05)


def test_bootstrap_of_few_values():
    assert math.isnan(m.bootstrap([]).value)
    one = m.bootstrap([2.0])
    assert (one.value, one.n) == (2.0, 1)
    assert math.isnan(one.low)


def test_weighted_bootstrap_draws_prompts_not_rows():
    right = np.array([0.0, 1.0] * 20)

    def mean(weight):
        return float(np.average(right, weights=weight))

    value, low, high, n = m.bootstrap_weighted(mean, np.arange(40))
    assert (value, n) == (0.5, 40)
    assert (low, high) == pytest.approx(m.bootstrap(right)[1:3])
    wide = m.bootstrap_weighted(mean, np.arange(40) % 4)  # four prompts, ten like rows each
    assert tuple(wide) == (0.5, 0.0, 1.0, 4)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (20, 20), (7, 30)])
def test_wilson_in_closed_form(successes, n):
    z, p = stats.norm.ppf(0.975), successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert m.wilson(successes, n) == pytest.approx((p, middle - half, middle + half, n), abs=1e-12)


# --- of an answers table --------------------------------------------------------------------------


def test_which_rows_count_and_nulls_are_counted():
    table = pd.DataFrame(
        [
            row(1, True, reward=5.0, cost=-1.0, safe=True, refused=True),
            row(2, False, reward=1.0, cost=2.0, safe=False, refused=False),
            row(3, None, reward=3.0, cost=None, safe=None, refused=True),
            row(4, True, reward=math.nan, cost=None, safe=None, refused=False),
        ]
    )
    lines = m.summarise(table).set_index("metric")
    assert lines["value"].to_dict() == {
        "helpfulness": 1.0, "reward": 3.0, "safety": -0.5, "safe_rate": 1.0,
        "refusal_harmful": 0.5, "refusal_benign": 0.0,
    }  # fmt: skip
    assert lines["prompts"].to_dict() == {
        "helpfulness": 1, "reward": 3, "safety": 2, "safe_rate": 1, "refusal_harmful": 2, "refusal_benign": 1,
    }  # fmt: skip
    assert lines["nulls"].to_dict() == {
        "helpfulness": 0, "reward": 1, "safety": 2, "safe_rate": 1, "refusal_harmful": 0, "refusal_benign": 0,
    }  # fmt: skip
    assert tuple(lines.loc["refusal_harmful", ["low", "high"]]) == m.wilson(1, 2)[1:3]


def test_rows_of_a_prompt_stay_together():
    rows = [row(i, False, seed=s, reward=float(i)) for i in range(10) for s in range(5)]
    table = pd.DataFrame(rows)
    assert m.prompt_means(table, "reward").tolist() == [float(i) for i in range(10)]
    line = m.summarise(table).set_index("metric").loc["reward"]
    assert tuple(line[["value", "low", "high", "prompts"]]) == m.bootstrap(np.arange(10.0))


def test_groups_keep_their_order():
    rows = [row(1, model=model, set=s, reward=1.0) for model in ("z", "a") for s in ("q", "b")]
    table = m.summarise(pd.DataFrame(rows))
    assert table[["model", "set"]].values.tolist() == [
        ["z", "q"],
        ["z", "b"],
        ["a", "q"],
        ["a", "b"],
    ]


def test_win_rate_and_difference_are_paired():
    a = pd.DataFrame([row(i, reward=v) for i, v in enumerate([1.0, 2.0, 3.0, None])])
    b = pd.DataFrame([row(i, reward=v) for i, v in [*enumerate([0.0, 2.0, 5.0, 9.0]), (9, 1.0)]])
    assert m.win_rate(a, b)[::3] == (0.5, 3)
    assert m.difference(a, b, "reward").value == pytest.approx((1 + 0 - 2) / 3)
    assert m.difference(a, b, "reward")[1:3] == m.bootstrap([1.0, 0.0, -2.0])[1:3]
    assert m.win_rate(a, b.iloc[:0]).n == 0
    cheap, dear = (pd.DataFrame([row(1, cost=cost)]) for cost in (-1.0, 2.0))
    assert m.win_rate(cheap, dear, "safety").value == 1.0


def test_by_seed():
    rows = [row(i, False, seed=s, reward=float(s + i)) for i in range(3) for s in (1, 2)]
    table = pd.DataFrame(rows)
    assert m.seed_means(table, "helpfulness").to_dict() == {1: 2.0, 2: 3.0}
    assert m.seed_means(table, "safety").empty
    other = table.assign(reward=[1.0, 9.0, 1.0, 9.0, 5.0, 0.0])  # seed 1: a tie, a win, a loss
    assert m.seed_win_rates(table, other, "reward").to_dict() == {1: 0.5, 2: 1 / 3}


# --- classification and calibration ---------------------------------------------------------------


def test_auroc_and_tpr_are_sklearns():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 50), rng.integers(0, 7, 40)
    truth, scores = [1] * 50 + [0] * 40, [*positive, *negative]
    assert m.auroc(positive, negative) == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    for fpr in (0.0, 0.01, 0.1, 0.25, 0.5, 1.0):
        assert m.tpr_at_fpr(positive, negative, fpr) == pytest.approx(true[false <= fpr].max())
    assert m.auroc([2, None, 3], [1, 1.5]) == 1.0
    assert m.auroc([1, 1], [1, 1]) == 0.5
    assert math.isnan(m.auroc([], [1]))


def test_calibration_is_sklearns():
    rng = np.random.default_rng(0)
    sure = rng.random(300)
    right = (rng.random(300) < sure**2).astype(float)
    share, confidence = calibration_curve(right, sure, n_bins=10)
    table = m.reliability(sure, right)
    assert table["right"].tolist() == pytest.approx(share.tolist())
    assert table["confidence"].tolist() == pytest.approx(confidence.tolist())
    expected = np.average(abs(share - confidence), weights=table["count"])
    assert m.calibration_error(sure, right) == pytest.approx(expected)
    doubled = m.calibration_error([*sure, *sure], [*right, *right])
    assert m.calibration_error(sure, right, np.full(300, 2)) == pytest.approx(doubled)


def test_pareto():
    points = [(1.0, 0.0), (0.8, 0.8), (0.0, 1.0), (0.5, 0.5), (0.8, 0.8), (math.nan, 2.0)]
    assert m.pareto(points).tolist() == [True, True, True, False, True, False]
    assert m.pareto(points, [True, False]).tolist() == [True] + [False] * 5
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 4, (12, 3))
        dominated = [any((q >= p).all() and (q > p).any() for q in values) for p in values]
        assert m.pareto(values).tolist() == [not d for d in dominated]


# --- of score models ------------------------------------------------------------------------------


def pairs(count: int = 60) -> dict[str, list]:
    draw = random.Random(0)
    columns = {
        "prompt": [f"p{draw.randrange(20)}" for _ in range(count)],
        "chosen": [draw.gauss(-0.5, 1) for _ in range(count)],
        "rejected": [draw.gauss(0.5, 1) for _ in range(count)],
        "sign_chosen": [draw.choice((-1.0, 0.0)) for _ in range(count)],
        "sign_rejected": [draw.choice((1.0, -1.0)) for _ in range(count)],
    }
    columns["rejected"][3] = columns["chosen"][3]  # a tie
    return columns


def binary(evidence: list[float]) -> tuple[float, float, float]:
    right = [1.0 if e > 0 else 0.5 if e == 0 else 0.0 for e in evidence]
    bins: dict[int, list[tuple[float, float]]] = {}
    for e, r in zip(evidence, right, strict=True):
        p = 1 / (1 + math.exp(-abs(e)))
        bins.setdefault(min(9, int((p - 0.5) * 20)), []).append((p, r))
    off = sum(abs(sum(p - r for p, r in members)) for members in bins.values())
    loss = np.mean([math.log1p(math.exp(-e)) for e in evidence])
    return np.mean(right), loss, off / len(evidence)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_score_metrics(kind):
    given = pairs()
    got = m.score_metrics(kind, given)
    sign = 1 if kind == "reward" else -1
    margin = [sign * (c - r) for c, r in zip(given["chosen"], given["rejected"], strict=True)]
    names = ("accuracy", "loss", "calibration_error")
    assert [got[n][0] for n in names] == pytest.approx(binary(margin))
    assert (got["pairs"], got["prompts"]) == (60, len(set(given["prompt"])))
    assert sum(b["count"] for b in got["reliability"]) == 60
    assert ("sign" in got) == (kind == "cost")
    if kind == "cost":
        costs = given["chosen"] + given["rejected"]
        signs = given["sign_chosen"] + given["sign_rejected"]
        evidence = [c * s for c, s in zip(costs, signs, strict=True) if s]
        assert [got["sign"][n][0] for n in names] == pytest.approx(binary(evidence))
        assert got["sign"]["responses"] == len(evidence)
    assert all(low < value < high for value, low, high in (got[n] for n in names[:2]))
    assert "accuracy" in m.describe_score_metrics(kind, got)
