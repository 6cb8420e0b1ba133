"""A score model's figures, recomputed by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from midpo_ray.evaluation.score_figures import figures, over_prompts, render


def rows(count: int = 60) -> dict[str, list]:
    draw = random.Random(0)
    made = {
        "prompt": [f"p{draw.randrange(20)}" for _ in range(count)],
        "chosen": [draw.gauss(-0.5, 1) for _ in range(count)],
        "rejected": [draw.gauss(0.5, 1) for _ in range(count)],
        "sign_chosen": [draw.choice((-1.0, 0.0)) for _ in range(count)],
        "sign_rejected": [draw.choice((1.0, -1.0)) for _ in range(count)],
    }
    made["rejected"][3] = made["chosen"][3]  # a tie
    return made


def binary(evidence: list[float]) -> tuple[float, float, float]:
    right = [1.0 if e > 0 else 0.5 if e == 0 else 0.0 for e in evidence]
    bins: dict[int, list[tuple[float, float]]] = {}
    for e, r in zip(evidence, right, strict=True):
        p = 1 / (1 + math.exp(-abs(e)))
        bins.setdefault(min(9, int((p - 0.5) * 20)), []).append((p, r))
    off = sum(abs(sum(p - r for p, r in members)) for members in bins.values())
    return (
        np.mean(right),
        np.mean([math.log1p(math.exp(-e)) for e in evidence]),
        off / len(evidence),
    )


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_figures_are_the_textbooks(kind):
    given = rows()
    got = figures(kind, given)
    sign = 1 if kind == "reward" else -1
    margin = [sign * (c - r) for c, r in zip(given["chosen"], given["rejected"], strict=True)]
    names = ("accuracy", "loss", "calibration_error")
    assert [got[n][0] for n in names] == pytest.approx(binary(margin))
    assert (got["pairs"], got["prompts"]) == (60, len(set(given["prompt"])))
    assert sum(b["count"] for b in got["reliability"]) == 60
    if kind == "reward":
        assert "sign" not in got
    else:
        costs, signs = (
            given["chosen"] + given["rejected"],
            given["sign_chosen"] + given["sign_rejected"],
        )
        evidence = [c * s for c, s in zip(costs, signs, strict=True) if s]
        assert [got["sign"][n][0] for n in names] == pytest.approx(binary(evidence))
        assert got["sign"]["responses"] == len(evidence)
    for value, low, high in (got[n] for n in names[:2]):
        assert low < value < high
    assert "accuracy" in render(kind, got)


def test_intervals_are_over_prompts_not_rows():
    right = np.array([0.0, 1.0] * 20)
    mean = lambda weight: np.average(right, weights=weight)  # noqa: E731
    _, low, high = over_prompts(mean, np.arange(40))
    _, wide_low, wide_high = over_prompts(
        mean, np.arange(40) % 4
    )  # four prompts of ten like answers each
    assert (low, high) == pytest.approx((0.35, 0.65), abs=0.03)
    assert (wide_low, wide_high) == (0.0, 1.0)
