"""Which trials go on, and which point wins: pure functions of the trials' values.

Successive halving, asynchronous as ASHA (Li et al., arXiv 1810.05934) is, with one change (ours): a trial is compared at a rung
with the trials *before it in the sweep's order*, not with those that happened to be there. So the outcome is a function of the
values alone: neither the number of workers, nor their speed, nor a kill and resume changes it. Where a trial before is late, one
runs on undecided; if it turns out to be stopped at a rung, what it did after that does not count.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError
from ..metrics import pareto

Values = Mapping[str, float]
Directions = Mapping[str, Literal["max", "min"]]  # the sweep's metrics, in order
State = Literal["waiting", "undecided", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class Verdict:
    state: State  # waiting: is not at its next rung yet; undecided: is at one that a trial before it is not at yet
    rungs: int  # values that count


def beats(a: Values, b: Values, metrics: Directions) -> bool:
    """Whether a is at least as good as b in every metric, and better in one: for one metric, whether it is better."""
    gains = [a[m] - b[m] if d == "max" else b[m] - a[m] for m, d in metrics.items()]
    return min(gains) >= 0 and max(gains) > 0


def goes_on(mine: Values, before: Sequence[Values], metrics: Directions, reduction: int) -> bool:
    """Whether fewer than 1/reduction of those before beat this one; the first ``reduction`` trials always go on."""
    return len(before) < reduction or sum(
        beats(b, mine, metrics) for b in before
    ) * reduction < len(before)


def judge(
    curves: Sequence[Sequence[Values]],
    failed: Sequence[bool],
    rungs: int,
    reduction: int,
    metrics: Directions,
) -> list[Verdict]:
    """The verdict on every trial, in the sweep's order.

    Args:
        curves: each trial's values at its rungs so far, the last rung being its end.
        failed: whether it ended by a fault of its own.
    """
    seen: list[list[Values]] = [[] for _ in range(rungs)]
    complete = [
        True
    ] * rungs  # every trial so far has told its value at the rung, or is known to end before it
    verdicts = []
    for curve, fault in zip(curves, failed, strict=True):
        verdict = None
        for rung, value in enumerate(curve):
            before = list(seen[rung])
            seen[rung].append(value)
            if rung == rungs - 1:
                verdict = Verdict("finished", rungs)
            elif not complete[rung]:
                verdict = Verdict("undecided", rung + 1)
                complete[rung + 1 :] = [False] * (rungs - rung - 1)
            elif not goes_on(value, before, metrics, reduction):
                verdict = Verdict("stopped", rung + 1)
            if verdict:
                break
        if verdict is None:
            verdict = Verdict("failed" if fault else "waiting", len(curve))
            if not fault:
                complete[len(curve) :] = [False] * (rungs - len(curve))
        verdicts.append(verdict)
    return verdicts


def front(points: Sequence[Values], metrics: Directions) -> list[int]:
    """Numbers of the points on the Pareto front."""
    values = [[point[m] for m in metrics] for point in points]
    return np.flatnonzero(pareto(values, [d == "max" for d in metrics.values()])).tolist()


def choose(points: Sequence[Values], metrics: Directions, rule: Sequence[str]) -> int:
    """The winner's number among the finished points; the first of equals.

    ``knee``: of the Pareto front, the largest sum of the metrics scaled to [0, 1] over the front: for two metrics, the point
    farthest from the line between the front's ends.

    Raises:
        UserError: no point meets the rule's bound.
    """

    def gain(number: int, metric: str) -> float:
        return points[number][metric] * (1 if metrics[metric] == "max" else -1)

    if rule[0] != "knee":
        candidates = list(range(len(points)))
        if len(rule) > 1:
            metric, sign, bound, _ = rule
            meets = operator.ge if sign == ">=" else operator.le
            candidates = [i for i in candidates if meets(points[i][metric], float(bound))]
            if not candidates:
                told = ", ".join(f"{p[metric]:.4g}" for p in points)
                raise UserError(
                    f"--select: no finished point has {metric} {sign} {bound}; they have {told}"
                )
        return max(candidates, key=lambda i: (gain(i, rule[-1]), -i))
    on_front = front(points, metrics)

    def scaled(number: int, metric: str) -> float:
        values = [gain(i, metric) for i in on_front]
        return (gain(number, metric) - min(values)) / ((max(values) - min(values)) or 1.0)

    return max(on_front, key=lambda i: (sum(scaled(i, m) for m in metrics), -i))
