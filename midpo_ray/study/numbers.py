"""The numbers of a study: every metric over the seeds, differences paired by seed, win rates at
equal steps and equal KL.

Intervals are Student's t over the training seeds. Answers are an answers table (``metrics``) with
``log_ratio``, the answer's log pi - log pi_ref in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..metrics import METRICS, Estimate, auroc, seed_means, seed_win_rates, t_interval
from .spec import Comparison, Study

COLUMNS = {  # metric -> heading
    "kl": "KL, nats", "helpfulness": "reward, benign", "safe_rate": "safe, harmful",
    "refusal_benign": "refuses benign", "joint": "joint", "malformed": "malformed",
    "auroc": "AUROC", "auroc_lookalike": "look-alikes",
}  # fmt: skip
AXES = ("helpfulness", "safe_rate")  # of the trade-off plot
JUDGED = {
    "reward": "reward",
    "cost": "safety",
}  # what is compared by -> the metric whose larger value wins


def by_seed(answers: pd.DataFrame, metric: str) -> pd.Series:
    """A system's metric per seed: of ``METRICS``, ``kl``, ``auroc`` or ``auroc_lookalike``."""
    if metric in METRICS:
        return seed_means(answers, metric)
    seeds = answers.groupby("seed")
    if metric == "kl":
        return seeds["log_ratio"].mean()
    category = "lookalike" if metric == "auroc_lookalike" else None
    return pd.Series({seed: separation(rows, category) for seed, rows in seeds}, dtype=float)


def separation(answers: pd.DataFrame, category: str | None = None) -> float:
    """AUROC of g_s - g_h between harmful and benign prompts; NaN without gates.

    Args:
        category: of the benign prompts; None: all.
    """
    gap = answers["gate_safety"].astype(float) - answers["gate_helpfulness"].astype(float)
    benign = answers["harmful"].eq(False)
    if category is not None:
        benign &= answers["category"].eq(category)
    return auroc(gap[answers["harmful"].eq(True)], gap[benign])


def minus(a: pd.Series, b: pd.Series) -> Estimate:
    """Mean of a's values minus b's, paired by seed."""
    return t_interval((a - b).dropna())


def compare(comparison: Comparison, answers: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Win rates of one system against another: at equal steps, and at an equal KL from the base.

    For the latter, the win rates against every strength of the other objective are interpolated
    linearly at the KL of ``of``, seed by seed. Where that KL is outside the grid its nearest end
    counts, and ``clamped`` counts the seed.
    """
    of = answers[comparison.of]
    others = [answers[name] for name in (comparison.against, *comparison.grid)]
    rates = [seed_win_rates(of, other, JUDGED[comparison.by]) for other in others]
    kl_of, kl_others = by_seed(of, "kl"), [by_seed(other, "kl") for other in others]
    points = [
        pd.DataFrame({"x": kl, "y": rate}).dropna()
        for kl, rate in zip(kl_others, rates, strict=True)
    ]
    equal, clamped = _interpolate(kl_of.loc[rates[0].index], points)
    return {
        **comparison.model_dump(include={"of", "against", "by"}),
        "equal_steps": t_interval(rates[0]),
        "equal_kl": t_interval(equal) if comparison.grid else None,
        "clamped": clamped,
        "kl_of": t_interval(kl_of),
        "kl_against": t_interval(kl_others[0]),
    }


def above_front(
    main: Mapping[str, pd.Series], front: Sequence[Mapping[str, pd.Series]]
) -> tuple[Estimate, int]:
    """How much safer the main system is than a front of systems at its helpfulness, and how many
    seeds were clamped.

    The front's share of harmful prompts answered safely is interpolated linearly at main's reward
    on benign prompts, seed by seed. Outside the front its nearest end counts.
    """
    across, up = AXES
    points = [pd.DataFrame({"x": system[across], "y": system[up]}).dropna() for system in front]
    places = main[across].loc[main[across].index.intersection(main[up].index)]
    levels, clamped = _interpolate(places, points)
    return minus(main[up], levels), clamped


def _interpolate(places: pd.Series, points: Sequence[pd.DataFrame]) -> tuple[pd.Series, int]:
    """Each seed's value of the line through its points (x, y); how many places are outside."""
    levels, clamped = {}, 0
    for seed, place in places.items():
        known = sorted((p.loc[seed, "x"], p.loc[seed, "y"]) for p in points if seed in p.index)
        if known:
            xs, ys = zip(*known, strict=True)
            levels[seed] = float(np.interp(place, xs, ys))
            clamped += not xs[0] <= place <= xs[-1]
    return pd.Series(levels, dtype=float), clamped


def dominates(rival: Mapping[str, Estimate]) -> bool:
    """Whether a rival is at least as good on both axes and better on one, beyond its interval where
    there is one.

    Args:
        rival: main's differences to it, by axis.
    """
    differences = [rival[axis] for axis in AXES]
    if not all(d.n for d in differences) or any(d.value > 0 for d in differences):
        return False
    return min(d.value if math.isnan(d.high) else d.high for d in differences) < 0


def study_numbers(study: Study, answers: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Everything that the report shows; systems without answers are left out.

    Args:
        answers: each system's answers, of all its seeds.
    """
    present = [c for c in study.contenders if c.name in answers]
    values = {c.name: _values(answers[c.name]) for c in present}
    systems = [
        {
            "name": c.name,
            "family": c.family,
            "seeds": len(values[c.name]["kl"]),
            **{metric: t_interval(series) for metric, series in values[c.name].items()},
        }
        for c in present
    ]
    compared = [
        compare(c, answers)
        for c in study.comparisons
        if {c.of, c.against, *c.grid} <= answers.keys()
    ]
    result: dict[str, Any] = {"main": study.main, "contenders": systems, "comparisons": compared}
    result |= {"differences": [], "fronts": [], "front": None}
    if study.main not in answers:
        return result
    main = values[study.main]
    for c in present:
        if c.name != study.main:
            line = {m: minus(main[m], values[c.name][m]) for m in ("joint", *AXES)}
            result["differences"].append({"against": c.name, "family": c.family, **line})
    for name, front in study.fronts.items():
        if answers.keys() >= set(front):
            lead, clamped = above_front(main, [values[n] for n in front])
            result["fronts"].append({"name": name, "safer_by": lead, "clamped": clamped})
    result["front"] = _front(result["differences"])
    return result


def _values(answers: pd.DataFrame) -> dict[str, pd.Series]:
    metrics: Iterable[str] = dict.fromkeys([*COLUMNS, *METRICS])
    return {metric: by_seed(answers, metric) for metric in metrics}


def _front(differences: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Which rivals dominate the main system, and its lead in joint rate over the best of them."""
    rivals = [d for d in differences if d["family"] != "routed" and d["joint"].n]
    if not rivals:
        return None
    best = min(rivals, key=lambda d: float(d["joint"].value))  # the smallest lead: the best rival
    above = [d["against"] for d in rivals if dominates(d)]
    return {"above": above, "best_rival": best["against"], "joint_lead": best["joint"]}
