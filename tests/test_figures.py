"""Figures against their definitions, and their intervals against what is known of them."""

import math

import numpy as np
import pytest

from midpo_ray.evaluation.figures import (
    bootstrap,
    difference,
    prompt_values,
    seed_means,
    summarise,
    win_rate,
)


def row(id, harmful=None, seed=0, model="m", set="s", **scores):
    return {
        "model": model,
        "set": set,
        "id": str(id),
        "seed": seed,
        "harmful": harmful,
        "category": "",
        **scores,
    }


def test_which_rows_count():
    rows = [
        row(1, True, reward=5.0, cost=-1.0, safe=True, refused=True),
        row(2, False, reward=1.0, cost=2.0, safe=False, refused=False),
        row(3, None, reward=3.0, cost=None, safe=None, refused=True),
    ]
    at = {r["figure"]: r for r in summarise(rows)}
    assert {f: r["value"] for f, r in at.items()} == {
        "helpfulness": 1.0,
        "reward": 3.0,
        "safety": -0.5,
        "safe_rate": 1.0,
        "refusal_harmful": 1.0,
        "refusal_benign": 0.0,
    }
    assert at["reward"]["prompts"] == 3
    assert at["safety"]["prompts"] == 2
    assert at["helpfulness"]["low"] == at["helpfulness"]["high"] == 1.0


def test_rows_of_a_prompt_stay_together():
    rows = [row(i, False, seed=s, reward=float(i)) for i in range(10) for s in range(5)]
    assert prompt_values(rows, "reward").tolist() == [float(i) for i in range(10)]
    [line] = [r for r in summarise(rows) if r["figure"] == "reward"]
    assert (line["low"], line["high"]) == bootstrap(np.arange(10.0))
    assert line["prompts"] == 10


def test_bootstrap_covers():
    """The interval of a mean of 200 normal values holds the truth 95 times of 100, and is as wide as theory says."""
    rng = np.random.default_rng(1)
    held, widths = 0, []
    for _ in range(300):
        low, high = bootstrap(rng.normal(size=200), draws=400)
        held += low <= 0 <= high
        widths.append(high - low)
    assert 0.91 <= held / 300 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.05)
    assert bootstrap([1.0, 2.0, 5.0]) == bootstrap([1.0, 2.0, 5.0])
    assert all(map(math.isnan, bootstrap([])))
    low, high = bootstrap(np.arange(101.0), "median")
    assert low < 50 < high


def test_win_rate_and_difference():
    a = [row(i, reward=v) for i, v in enumerate([1.0, 2.0, 3.0, None])]
    b = [row(i, reward=v) for i, v in enumerate([0.0, 2.0, 5.0, 9.0])] + [row(9, reward=1.0)]
    assert win_rate(a, b)[0] == 0.5
    assert difference(a, b, "reward")[0] == pytest.approx((1 + 0 - 2) / 3)
    assert all(map(math.isnan, win_rate(a, [])))
    cost = win_rate([row(1, cost=-1.0)], [row(1, cost=2.0)], "safety")
    assert cost == (1.0, 1.0, 1.0)


def test_seed_means():
    rows = [row(i, False, seed=s, reward=float(s + i)) for i in range(3) for s in (1, 2)]
    assert seed_means(rows, "helpfulness") == {1: 2.0, 2: 3.0}
    assert seed_means(rows, "safety") == {}
