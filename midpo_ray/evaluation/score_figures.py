"""How good a score model is on held-out pairs: order, sign, calibration, each with an interval over prompts. Pure numpy.

N pairs (or responses), P prompts. Pairs of one prompt stay together: an interval is of 2,000 bootstrap draws of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
BINS, DRAWS = 10, 2000


def figures(kind: str, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The figures of a reward or a cost model.

    Args:
        rows: columns of the held-out pairs: prompt (its key), chosen and rejected (scores; chosen is the better or safer one),
            sign_chosen and sign_rejected (+1 unsafe, -1 safe, 0 not known).

    Returns:
        accuracy of the order (ties half), loss in nats (ln 2 is chance), calibration_error and reliability bins of
        sigmoid(|margin|) as the probability that the order is right; of a cost also the same of its sign, over responses.
    """
    chosen, rejected = np.asarray(rows["chosen"], float), np.asarray(rows["rejected"], float)
    owner = np.unique(np.asarray(rows["prompt"]), return_inverse=True)[1]
    margin = chosen - rejected if kind == "reward" else rejected - chosen
    both = np.concatenate([chosen, rejected])
    result = {
        "pairs": len(margin),
        "prompts": int(owner.max()) + 1,
        "mean_score": float(both.mean()),
        "std_score": float(both.std()),
        **_binary(margin, owner),
    }
    if kind == "cost":
        sign = np.concatenate(
            [np.asarray(rows["sign_chosen"], float), np.asarray(rows["sign_rejected"], float)]
        )
        known = sign != 0
        if known.any():
            result["sign"] = {
                "responses": int(known.sum()),
                **_binary((both * sign)[known], np.concatenate([owner, owner])[known]),
            }
    return result


def _binary(evidence: Array, owner: Array) -> dict[str, Any]:
    """``evidence``: log-odds that the model gives the truth, [N]; its sign says whether the model is right."""
    right = (evidence > 0) + 0.5 * (evidence == 0)
    sure = 1 / (1 + np.exp(-np.abs(evidence)))
    loss = np.logaddexp(0, -evidence)
    return {
        "accuracy": over_prompts(lambda weight: np.average(right, weights=weight), owner),
        "loss": over_prompts(lambda weight: np.average(loss, weights=weight), owner),
        "calibration_error": over_prompts(
            lambda weight: calibration_error(sure, right, weight), owner
        ),
        "reliability": reliability(sure, right),
    }


def over_prompts(
    statistic: Callable[[Array], float], owner: Array, draws: int = DRAWS, seed: int = 0
) -> list[float]:
    """[value, low, high]: ``statistic`` of weights [N], with its 95% percentile interval over draws of prompts.

    Args:
        owner: [N], the number of each row's prompt.
    """
    owner = np.unique(owner, return_inverse=True)[1]
    prompts, rng = int(owner.max()) + 1, np.random.default_rng(seed)
    drawn = [
        statistic(np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)[owner])
        for _ in range(draws)
    ]
    return [float(statistic(np.ones(len(owner)))), *map(float, np.percentile(drawn, [2.5, 97.5]))]


def _bin(sure: Array) -> Array:
    return np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)


def calibration_error(sure: Array, right: Array, weight: Array) -> float:
    """Expected calibration error: mean |confidence - accuracy| of ten equal bins of [0.5, 1], by their weight."""
    off = np.bincount(_bin(sure), weight * (sure - right), minlength=BINS)
    return float(np.abs(off).sum() / weight.sum())


def reliability(sure: Array, right: Array) -> list[dict[str, float]]:
    """The bins that hold something: from, to, how many, mean confidence, share that is right."""
    at = _bin(sure)
    return [
        {
            "from": 0.5 + b / (2 * BINS),
            "to": 0.5 + (b + 1) / (2 * BINS),
            "count": int((at == b).sum()),
            "confidence": float(sure[at == b].mean()),
            "right": float(right[at == b].mean()),
        }
        for b in range(BINS)
        if (at == b).any()
    ]


def render(kind: str, told: Mapping[str, Any]) -> str:
    """The figures for people, a line each."""

    def line(name: str, triple: Sequence[float]) -> str:
        return f"  {name:28}{triple[0]:.3f}  [{triple[1]:.3f}, {triple[2]:.3f}]"

    lines = [
        f"{kind} model on {told['pairs']} held-out pairs of {told['prompts']} prompts, 95% intervals over prompts"
    ]
    for part, where in (("", told), ("sign: ", told.get("sign"))):
        if where:
            names = (
                ("accuracy", "accuracy"),
                ("loss", "loss (chance 0.693)"),
                ("calibration_error", "calibration error"),
            )
            lines += [line(part + title, where[name]) for name, title in names]
    return "\n".join(lines)
