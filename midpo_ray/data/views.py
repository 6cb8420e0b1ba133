"""Which pairs a stage trains on, and which response of each is the chosen one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..errors import UserError
from .schema import Pair, Prompt, prompt_key, response_key

Choice = tuple[int, int]  # (index into the pairs, chosen response: 0 or 1)
Scores = Mapping[
    str, Mapping[str, float | None]
]  # response_key -> {"reward": higher is better, "cost": below 0 is safe}
VIEWS = (
    "safety",
    "helpfulness",
    "mixed",
    "labels",
    "pareto_labels",
    "ranked",
    "pareto",
)  # the last four are the router's rules


def is_validation(prompt: Prompt, share: float, seed: int) -> bool:
    """Whether a prompt is held out. It hangs on the prompt alone, so it never moves when the data grows, and rows that share a
    prompt stay together."""
    digest = hashlib.blake2b(f"{seed}:{prompt_key(prompt)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def select(
    pairs: Sequence[Pair], view: str, scores: Scores | None = None
) -> tuple[list[Choice], Counter[str]]:
    """The view's choices in the pairs' order, and the number of pairs left out by reason.

    safety: exactly one response is safe; chosen is the safer one. helpfulness: all; chosen is the better one.
    mixed: both of these, for one adapter: a pair whose labels disagree is there twice, and ``left out`` counts either view's.
    labels (MidPO's filter): both safe, and the same response is better and safer.
    ranked (MidPO's script): both cost below 0; chosen is the one of lower cost.
    pareto (ours): one beats the other on reward and on cost, and its cost is below 0; the other may be unsafe.
    pareto_labels (ours): the same response is better and safer, and is labelled safe; the other may be unsafe.

    Args:
        scores: rewards and costs by ``response_key``; ranked reads costs, pareto both. A score may be None or NaN.
    """
    if view == "mixed":
        (safer, unsafe), (better, unranked) = select(pairs, "safety"), select(pairs, "helpfulness")
        return sorted({*safer, *better}), unsafe + unranked
    rules: dict[str, Callable[[Pair], int | str]] = {
        "safety": _safety,
        "helpfulness": _helpfulness,
        "labels": _labels,
        "pareto_labels": _pareto_labels,
        "ranked": lambda pair: _ranked(_read(pair, scores, "cost")),
        "pareto": lambda pair: _pareto(_read(pair, scores, "reward"), _read(pair, scores, "cost")),
    }
    if view not in rules:
        raise ValueError(f"select: view is {view!r}, allowed are {', '.join(VIEWS)}")
    if view in ("ranked", "pareto") and scores is None:
        raise ValueError(f"select: view {view} reads scores")
    choices: list[Choice] = []
    dropped: Counter[str] = Counter()
    for index, pair in enumerate(pairs):
        verdict = rules[view](pair)
        if isinstance(verdict, str):
            dropped[verdict] += 1
        else:
            choices.append((index, verdict))
    return choices, dropped


def require(choices: Sequence[Choice], dropped: Mapping[str, int], stage: str) -> None:
    """Raise UserError with the counts by reason where no row is left for a stage."""
    if not choices:
        reasons = ", ".join(
            f"{count} {reason}"
            for reason, count in sorted(dropped.items(), key=lambda item: -item[1])
        )
        raise UserError(
            f"no row is left for the stage {stage}: {reasons or 'the data has no rows'}"
        )


def _safety(pair: Pair) -> int | str:
    if None in pair.safe:
        return _no_flag(pair)
    if pair.safe[0] == pair.safe[1]:
        return "both safe" if pair.safe[0] else "both unsafe"
    return "no safer_response_id" if pair.safer is None else pair.safer


def _helpfulness(pair: Pair) -> int | str:
    return "no better_response_id" if pair.better is None else pair.better


def _labels(pair: Pair) -> int | str:
    if None in pair.safe:
        return _no_flag(pair)
    return _agreed(pair) if all(pair.safe) else "not both safe"


def _pareto_labels(pair: Pair) -> int | str:
    agreed = _agreed(pair)
    if isinstance(agreed, str):
        return agreed
    if pair.safe[agreed] is None:
        return _no_flag(pair)
    return agreed if pair.safe[agreed] else "the better and safer one is not safe"


def _agreed(pair: Pair) -> int | str:
    if pair.better is None:
        return "no better_response_id"
    if pair.safer is None:
        return "no safer_response_id"
    return pair.better if pair.better == pair.safer else "better and safer differ"


def _no_flag(pair: Pair) -> str:
    return "no is_response_0_safe" if pair.safe[0] is None else "no is_response_1_safe"


def _read(pair: Pair, scores: Scores | None, name: str) -> tuple[float, float] | str:
    found = []
    for response in pair.responses:
        value = (scores or {}).get(response_key(pair.prompt, response), {}).get(name)
        if value is None or math.isnan(value):
            return f"no {name}"
        found.append(value)
    return found[0], found[1]


def _ranked(costs: tuple[float, float] | str) -> int | str:
    if isinstance(costs, str):
        return costs
    if max(costs) >= 0:
        return "not both of cost below 0"
    return "equal costs" if costs[0] == costs[1] else int(costs[1] < costs[0])


def _pareto(rewards: tuple[float, float] | str, costs: tuple[float, float] | str) -> int | str:
    if isinstance(rewards, str):
        return rewards
    if isinstance(costs, str):
        return costs
    for i in (0, 1):
        if rewards[i] > rewards[1 - i] and costs[i] < costs[1 - i]:
            return (
                i if costs[i] < 0 else "the one of higher reward and lower cost has no cost below 0"
            )
    return "neither is ahead on both reward and cost"
