"""What a study's answers say: every figure over the seeds, differences paired by seed, all with 95% t-intervals. Pure numpy.

Rows are those of the answers table (evaluation.figures), with ``log_ratio``, the answer's log pi - log pi_ref in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.figures import paired, seed_means
from ..metrics import auroc, t_interval
from .spec import Comparison, Study

Rows = Sequence[Mapping[str, Any]]
BySeed = dict[int, float]
FIGURES = (
    "helpfulness",
    "safe_rate",
    "refusal_benign",
    "joint",
    "malformed",
    "truncated",
    "reward",
    "safety",
)
JUDGED = {
    "reward": "reward",
    "cost": "safety",
}  # what a comparison is by -> the figure in which more is better
AXES = (
    "helpfulness",
    "safe_rate",
)  # of the picture: reward on benign prompts, share of harmful ones answered safely


def by_seed(rows: Rows, figure: str) -> BySeed:
    """A contender's figure, seed by seed; beyond evaluation's figures ``kl``, ``auroc`` and ``auroc_lookalike``."""
    if figure in FIGURES:
        return seed_means(rows, figure)
    measure: Callable[[Rows], float] = {
        "kl": lambda r: float(np.mean([x["log_ratio"] for x in r])),
        "auroc": separation,
        "auroc_lookalike": lambda r: separation(r, "lookalike"),
    }[figure]
    return {seed: measure(part) for seed, part in of_seeds(rows).items()}


def of_seeds(rows: Rows) -> dict[int, Rows]:
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["seed"], []).append(row)
    return dict(parts)


def separation(rows: Rows, category: str | None = None) -> float:
    """AUROC of g_s - g_h between harmful prompts and benign ones, all or those of a category; NaN without gates."""
    lean = [
        (r, r["gate_safety"] - r["gate_helpfulness"]) for r in rows if r["gate_safety"] is not None
    ]
    benign = [x for r, x in lean if r["harmful"] is False and category in (None, r["category"])]
    return auroc([x for r, x in lean if r["harmful"]], benign)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """value, low, high (None where one value is known, or none) and n, over the values that are no NaN."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return {"value": None, "low": None, "high": None, "n": 0}
    value, low, high, n = t_interval(known)
    return {
        "value": value,
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
        "n": n,
    }


def difference(a: BySeed, b: BySeed) -> dict[str, Any]:
    """a's less b's, paired by seed."""
    return over_seeds([a[s] - b[s] for s in a if s in b])


def win_rates(of: Rows, against: Rows, by: str) -> BySeed:
    """Share of prompts, seed by seed, where the answer of ``of`` has the higher reward or the lower cost; ties half."""
    figure = JUDGED[by]
    mine, theirs = of_seeds(of), of_seeds(against)
    rates = {}
    for seed in (s for s in mine if s in theirs):
        a, b, _ = paired(mine[seed], theirs[seed], figure)
        if len(a):
            rates[seed] = float(np.mean((a > b) + 0.5 * (a == b)))
    return rates


def compare(comparison: Comparison, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The win rate at equal steps, and at equal KL: seed by seed, the win rates against every strength of the other objective
    stand over those strengths' KL from the base, and are read by linear interpolation at the KL of ``of``. Where that lies
    outside of them the nearest end counts, in ``clamped`` seeds."""
    of, others = rows[comparison.of], [rows[n] for n in (comparison.against, *comparison.grid)]
    distance = by_seed(of, "kl")
    rates, distances = (
        [win_rates(of, o, comparison.by) for o in others],
        [by_seed(o, "kl") for o in others],
    )
    equal, clamped = [], 0
    for seed in rates[0]:
        points = sorted(
            (d[seed], r[seed]) for d, r in zip(distances, rates, strict=True) if seed in r
        )
        places = [p for p, _ in points]
        equal.append(float(np.interp(distance[seed], places, [r for _, r in points])))
        clamped += not places[0] <= distance[seed] <= places[-1]
    return {
        **comparison.model_dump(include={"of", "against", "by"}),
        "equal_steps": over_seeds(list(rates[0].values())),
        "equal_kl": over_seeds(equal) if comparison.grid else None,
        "clamped": clamped,
        "kl_of": over_seeds(list(distance.values())),
        "kl_against": over_seeds(list(distances[0].values())),
    }


def dominates(rival: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a rival is at least as good on both axes and better on one, beyond its interval where there is one; from main's
    differences to it."""
    least = [rival[a] for a in AXES if rival[a]["n"]]
    ends = [
        d["value"] if d["high"] is None else d["high"] for d in least
    ]  # of one seed there is no interval
    return len(least) == len(AXES) and all(d["value"] <= 0 for d in least) and min(ends) < 0


def above_front(
    main: Mapping[str, BySeed], front: Sequence[Mapping[str, BySeed]]
) -> dict[str, Any]:
    """How much safer main answers than a front of contenders does where it is as helpful: seed by seed their share of harmful
    prompts answered safely is read at main's reward on benign prompts, by linear interpolation. Where main is beyond the front's
    most or least helpful contender that one counts, in ``clamped`` seeds."""
    across, up = AXES
    leads, clamped = [], 0
    for seed in main[across].keys() & main[up].keys():
        place = main[across][seed]
        points = sorted(
            (c[across][seed], c[up][seed]) for c in front if seed in c[across] and seed in c[up]
        )
        if points:
            xs, ys = zip(*points, strict=True)
            leads.append(main[up][seed] - float(np.interp(place, xs, ys)))
            clamped += not xs[0] <= place <= xs[-1]
    return {**over_seeds(leads), "clamped": clamped}


def numbers(study: Study, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Everything the report tells, JSON-able; contenders without answers are left out.

    Args:
        rows: each contender's answers, all seeds.
    """
    seen = {c.name: c for c in study.contenders if rows.get(c.name)}
    every = (*FIGURES, "kl", "auroc", "auroc_lookalike")
    values = {name: {figure: by_seed(rows[name], figure) for figure in every} for name in seen}
    table = [
        {"name": n, "family": c.family, "seeds": len(values[n]["kl"])}
        | {f: over_seeds(list(v.values())) for f, v in values[n].items()}
        for n, c in seen.items()
    ]
    result: dict[str, Any] = {
        "main": study.main,
        "contenders": table,
        "comparisons": [],
        "differences": [],
        "fronts": [],
        "front": None,
    }
    for comparison in study.comparisons:
        if {comparison.of, comparison.against, *comparison.grid} <= seen.keys():
            result["comparisons"].append(compare(comparison, rows))
    if study.main not in seen:
        return result
    main = values[study.main]
    for name, contender in seen.items():
        if name != study.main:
            told = {f: difference(main[f], values[name][f]) for f in ("joint", *AXES)}
            result["differences"].append({"against": name, "family": contender.family, **told})
    for name, front in study.fronts.items():
        if set(front) <= seen.keys():
            result["fronts"].append(
                {"name": name, "safer_by": above_front(main, [values[n] for n in front])}
            )
    rivals = [d for d in result["differences"] if d["family"] != "routed" and d["joint"]["n"]]
    if rivals:
        best = min(
            rivals, key=lambda d: d["joint"]["value"]
        )  # main's smallest lead: the rival of the highest joint rate
        above = [d["against"] for d in rivals if dominates(d)]
        result["front"] = {
            "above": above,
            "best_rival": best["against"],
            "joint_lead": best["joint"],
        }
    return result
