"""Selection rules: which pairs a stage trains on, and which response of each is the chosen one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import UserError
from .schema import Pair, Prompt, prompt_key

Selected = tuple[int, int]  # (index into the pairs, chosen response: 0 or 1)
# response_key -> {"reward": higher is better, "cost": below 0 is safe}
ResponseScores = Mapping[str, Mapping[str, float | None]]
LABEL_RULES = ("safety", "helpfulness", "labels", "pareto_labels", "safe_first")
SCORE_RULES = ("ranked", "pareto")
RULES = (*LABEL_RULES, *SCORE_RULES, "mixed")


def is_validation(prompt: Prompt, share: float, seed: int) -> bool:
    """Return True if the prompt is in the validation split.

    The split is a hash of the prompt, so it is stable when data is added, and all pairs of a
    prompt are in one split.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt_key(prompt)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def select(
    pairs: Sequence[Pair], rule: str, scores: ResponseScores | None = None
) -> tuple[list[Selected], Counter[str]]:
    """Return what a rule selects, in order, and how many pairs it drops by reason.

    * safety: exactly one response is safe; the safer one is chosen.
    * helpfulness: all pairs; the better response is chosen.
    * mixed: both of these, for a single adapter. A pair whose labels disagree is selected twice.
    * labels (MidPO's filter): both are safe, and the same response is better and safer.
    * ranked (MidPO's script): both costs are below 0; the response of lower cost is chosen.
    * pareto (ours): one response wins on reward and on cost, and its cost is below 0.
    * pareto_labels (ours): the same response is better and safer, and it is safe.
    * safe_first (ours): exactly one response is safe: that one; both are safe: the better one.

    Args:
        scores: rewards and costs by ``response_key``; ranked reads costs, pareto reads both.
            A score may be None or NaN, then the pair is dropped.
    """
    if rule == "mixed":
        safety, no_safety = select(pairs, "safety")
        helpfulness, no_helpfulness = select(pairs, "helpfulness")
        return sorted({*safety, *helpfulness}), no_safety + no_helpfulness
    label_rules: dict[str, Callable[[Pair], int | str]] = {
        "safety": _safety,
        "helpfulness": _better,
        "labels": _labels,
        "pareto_labels": _pareto_labels,
        "safe_first": _safe_first,
    }
    if rule not in RULES:
        raise ValueError(f"select: rule is {rule!r}, allowed are {', '.join(RULES)}")
    if rule in SCORE_RULES and scores is None:
        raise ValueError(f"select: rule {rule} reads scores")
    selected: list[Selected] = []
    dropped: Counter[str] = Counter()
    for index, pair in enumerate(pairs):
        if rule in label_rules:
            outcome = label_rules[rule](pair)
        else:
            outcome = (_ranked if rule == "ranked" else _pareto)(pair, scores or {})
        if isinstance(outcome, str):
            dropped[outcome] += 1
        else:
            selected.append((index, outcome))
    return selected, dropped


def require(selected: Sequence[Selected], dropped: Mapping[str, int], stage: str) -> None:
    """Raise UserError with the counts by reason where a stage has no pairs."""
    if not selected:
        ordered = sorted(dropped.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{count} {reason}" for reason, count in ordered)
        raise UserError(
            f"no row is left for the stage {stage}: {reasons or 'the data has no rows'}"
        )


def risk_of_prompts(
    pairs: Iterable[Pair], costs: Mapping[str, float | None] | None = None
) -> dict[Prompt, int]:
    """r(x) of every prompt whose risk is known.

    A prompt has risk 1 if any response to it in all pairs is unsafe, 0 if all responses whose
    safety is known are safe, and is absent if nothing is known.

    Args:
        costs: cost by ``response_key``, read where a response has no label; above 0 is unsafe.
    """
    risk: dict[Prompt, int] = {}
    for pair in pairs:
        for label, key in zip(pair.safe, pair.keys, strict=True):
            safe = label
            if safe is None:
                cost = (costs or {}).get(key)
                if cost is None or math.isnan(cost):
                    continue
                safe = cost <= 0
            risk[pair.prompt] = max(risk.get(pair.prompt, 0), int(not safe))
    return risk


# Each rule returns the chosen response, or the reason why the pair is dropped.


def _safety(pair: Pair) -> int | str:
    if None in pair.safe:
        return _no_flag(pair)
    if pair.safe[0] == pair.safe[1]:
        return "both safe" if pair.safe[0] else "both unsafe"
    return "no safer_response_id" if pair.safer is None else pair.safer


def _better(pair: Pair) -> int | str:
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


def _safe_first(pair: Pair) -> int | str:
    if None in pair.safe:
        return _no_flag(pair)
    if pair.safe[0] != pair.safe[1]:
        return 0 if pair.safe[0] else 1
    return _better(pair) if pair.safe[0] else "both unsafe"


def _agreed(pair: Pair) -> int | str:
    if pair.better is None:
        return "no better_response_id"
    if pair.safer is None:
        return "no safer_response_id"
    return pair.better if pair.better == pair.safer else "better and safer differ"


def _no_flag(pair: Pair) -> str:
    return "no is_response_0_safe" if pair.safe[0] is None else "no is_response_1_safe"


def _scores(pair: Pair, scores: ResponseScores, name: str) -> tuple[float, float] | None:
    values = [scores.get(key, {}).get(name) for key in pair.keys]
    first, second = (math.nan if value is None else value for value in values)
    return None if math.isnan(first) or math.isnan(second) else (first, second)


def _ranked(pair: Pair, scores: ResponseScores) -> int | str:
    costs = _scores(pair, scores, "cost")
    if costs is None:
        return "no cost"
    if max(costs) >= 0:
        return "not both of cost below 0"
    return "equal costs" if costs[0] == costs[1] else int(costs[1] < costs[0])


def _pareto(pair: Pair, scores: ResponseScores) -> int | str:
    rewards, costs = _scores(pair, scores, "reward"), _scores(pair, scores, "cost")
    if rewards is None or costs is None:
        return "no reward" if rewards is None else "no cost"
    for i in (0, 1):
        if rewards[i] > rewards[1 - i] and costs[i] < costs[1 - i]:
            if costs[i] < 0:
                return i
            return "the one of higher reward and lower cost has no cost below 0"
    return "neither is ahead on both reward and cost"
