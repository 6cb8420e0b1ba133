"""The files of a study: those of a report, study.json with all numbers, and study.txt."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .. import __version__
from ..evaluation.report import write_report
from ..evaluation.results import (
    ALL,
    Results,
    aligned,
    comparison,
    over_prompts,
    summary_text,
    training_curves,
)
from ..metrics import METRICS, Estimate, metric_values, prompt_means, seed_means, t_interval
from ..pipeline.signals import read_table
from ..report.page import PageSection, PageTable, jsonable
from ..storage import Storage
from .numbers import AXES, COLUMNS, study_numbers
from .plan import RECORD, StudyPlan
from .spec import Study

log = logging.getLogger(__name__)
_INTERVALS = (
    "95% by Student's t over the training seeds; differences and win rates are paired by seed"
)
_ONE_SEED = "They are of one training per system, and do not show how results vary with its seed."
_BETTER = {m.title: m.better for m in METRICS.values()} | {"AUROC": "high", "look-alikes": "high"}
_SHARES = [m.title for m in METRICS.values() if m.share]


def write_study_report(folder: Storage, study: Study, plan: StudyPlan, name: str) -> dict[str, Any]:
    """Write the files, log the numbers and return them; systems without answers are left out."""
    answers = _answers(folder, study, plan)
    if not answers:
        log.info("study %s: no model has answered yet", name)
        return {}
    result = {"study": name, "seeds": list(study.seeds), **study_numbers(study, answers)}
    result["clock"] = _clock(folder, plan)
    folder.write("study.json", json.dumps(jsonable(result), indent=1).encode())
    table = pd.concat(answers.values(), ignore_index=True)
    text = "\n".join(_lines(result))
    if len(study.seeds) == 1:
        pairs = [(study.main, n) for n in answers if n != study.main and study.main in answers]
        pairs += [
            (c.of, c.against) for c in study.comparisons if {c.of, c.against} <= answers.keys()
        ]
        results = over_prompts(table, dict.fromkeys(pairs))
        text += f"\n\n{summary_text(results.summary)}"
    else:
        results = _over_seeds(answers, result)
    folder.write("study.txt", f"{text}\n".encode())
    about = {"study": name, "about": study.about, "recipe": study.recipe}
    about |= {"seeds": ", ".join(map(str, study.seeds)), "version": __version__, "numbers": text}
    if len(study.seeds) == 1:
        about["seed variance"] = _ONE_SEED
    write_report(
        folder,
        f"Study {name}",
        results,
        table,
        routing=_routing(folder, study, plan),
        curves=training_curves(_trainings(folder, study, plan)),
        about=about,
        sections=[PageSection("Systems", _tables(result), study.about)],
    )
    log.info("%s", text)
    log.info("report: %s/report.html, every number: %s/study.json", folder.uri, folder.uri)
    return result


def _answers(folder: Storage, study: Study, plan: StudyPlan) -> dict[str, pd.DataFrame]:
    """Each system's answers of all seeds that are finished."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for (name, _), unit in plan.answers.items():
        if folder.exists(f"answers/{unit}/{RECORD}"):
            table = read_table(folder / "answers" / unit, "answers.parquet").to_pandas()
            named = table.assign(model=name, family=study.contender(name).family)
            parts.setdefault(name, []).append(named)
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def _over_seeds(answers: Mapping[str, pd.DataFrame], result: Mapping[str, Any]) -> Results:
    """The report's numbers with intervals over the training seeds."""
    summary = []
    for name, rows in answers.items():
        sets = rows["set"].unique()
        for metric in METRICS:
            estimate = t_interval(seed_means(rows, metric))
            if estimate.n:
                line = {"model": name, "set": sets[0] if len(sets) == 1 else ALL, "metric": metric}
                line |= {k: getattr(estimate, k) for k in ("value", "low", "high")}
                nulls = int(metric_values(rows, metric)["value"].isna().sum())
                line |= {
                    "prompts": len(prompt_means(rows, metric)),
                    "nulls": nulls,
                    "category": None,
                }
                summary.append(line)
    points = []
    for system in result["contenders"]:
        x, y = (system[axis] for axis in AXES)
        if x.n and y.n:
            ends = {
                "x": x.value,
                "x_low": x.low,
                "x_high": x.high,
                "y": y.value,
                "y_low": y.low,
                "y_high": y.high,
            }
            points.append(
                {"label": system["name"], "family": system["family"], "set": "all seeds", **ends}
            )
    axes = ("reward on benign prompts →", "harmful prompts answered safely →")
    compared = [line for line in _comparisons(result) if line["n"]]
    columns = ["label", "family", "set", "x", "x_low", "x_high", "y", "y_low", "y_high"]
    names = ["name", "value", "low", "high", "n", "over", "reference"]
    return Results(
        pd.DataFrame(summary),
        pd.DataFrame(points, columns=columns),
        pd.DataFrame(compared, columns=names),
        axes,
        _INTERVALS,
    )


def _comparisons(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    main, found = result["main"], []
    for d in result["differences"]:
        for metric in ("joint", *AXES):
            name = f"{METRICS[metric].title}: {main} minus {d['against']}"
            found.append(comparison(name, d[metric], "seeds", 0.0))
    for front in result["fronts"]:
        name = f"safe, harmful: {main} above the front of {front['name']} at equal reward, benign"
        found.append(comparison(name, front["safer_by"], "seeds", 0.0))
    for c in result["comparisons"]:
        for key, when in (("equal_steps", "equal steps"), ("equal_kl", "equal KL from the base")):
            if c[key] is not None:
                name = f"win rate by {c['by']}: {c['of']} against {c['against']}, at {when}"
                found.append(comparison(name, c[key], "seeds", 0.5))
    return found


def _routing(folder: Storage, study: Study, plan: StudyPlan) -> dict[str, Any]:
    """The main system's gates on the first seed's prompts."""
    name = plan.units[plan.answers[study.main, study.seeds[0]]].generation
    found = json.loads(folder.read(name))["routing"] if folder.exists(name) else None
    return {study.main: found} if found else {}


def _trainings(folder: Storage, study: Study, plan: StudyPlan) -> list[tuple[str, Storage]]:
    """The run directories of the main system's trainings, first seed."""
    needs = [plan.units[n] for n in plan.units[plan.answers[study.main, study.seeds[0]]].needs]
    return [("", folder / unit.folder) for unit in needs if unit.stage]


def _clock(folder: Storage, plan: StudyPlan) -> dict[str, dict[str, float]]:
    """Kind of unit -> how many are finished, and the sum of their seconds."""
    records = []
    for unit in plan.units.values():
        if folder.exists(f"{unit.folder}/{RECORD}"):
            seconds = json.loads(folder.read(f"{unit.folder}/{RECORD}"))["seconds"]
            records.append({"kind": f"{unit.kind} {unit.stage}".strip(), "seconds": seconds})
    kinds = pd.DataFrame(records).groupby("kind", sort=False)["seconds"]
    return {str(kind): {"units": len(s), "seconds": round(s.sum(), 1)} for kind, s in kinds}


# --- tables ---------------------------------------------------------------------------------------


def _tables(result: Mapping[str, Any]) -> list[PageTable]:
    """The numbers that only a study has; estimates are the cells."""
    systems = [
        {"model": c["name"]} | {title: c[metric] for metric, title in COLUMNS.items()}
        for c in result["contenders"]
    ]
    tables = [PageTable(pd.DataFrame(systems), better=_BETTER, shares=_SHARES)]
    differences = [
        {"against": d["against"]} | {METRICS[m].title: d[m] for m in (*AXES, "joint")}
        for d in result["differences"]
    ]
    if differences:
        title = f"{result['main']} minus the others, paired by seed"
        tables.append(PageTable(pd.DataFrame(differences), title))
    compared = [
        {"of": c["of"], "against": c["against"], "by": c["by"], "at equal steps": c["equal_steps"],
         "at equal KL": c["equal_kl"], "KL of": c["kl_of"], "KL against": c["kl_against"],
         "clamped seeds": c["clamped"]}
        for c in result["comparisons"]
    ]  # fmt: skip
    if compared:
        title = "Win rates over the same prompts, at equal steps and at an equal KL from the base"
        tables.append(PageTable(pd.DataFrame(compared), title))
    return tables


def _lines(result: Mapping[str, Any]) -> list[str]:
    """The study as text."""
    seeds = len(result["seeds"])
    text = [
        f"± is half of a 95% t-interval over {seeds} seeds"
        if seeds > 1
        else "intervals over prompts are below"
    ]
    for table in _tables(result):
        text += ["", *([table.title] if table.title else []), aligned(table.frame.map(_cell))]
    if front := result["front"]:
        above = ", ".join(front["above"]) or "no other model"
        text += ["", f"front: {above} is at least as good on both axes and better on one"]
        text.append(
            f"joint rate above that of the best rival, {front['best_rival']}: "
            f"{_signed(front['joint_lead'])}"
        )
    for front in result["fronts"]:
        text.append(
            f"safe on harmful prompts, above the front of {front['name']} at equal reward on "
            "benign prompts: "
            f"{_signed(front['safer_by'])}; {front['clamped']} seed(s) are outside the front"
        )
    spent = [f"{kind} {v['units']} in {v['seconds']:.0f} s" for kind, v in result["clock"].items()]
    return [*text, "", f"work: {', '.join(spent)}"]


def _cell(value: Any) -> str:
    if isinstance(value, Estimate):
        if math.isnan(value.value):
            return ""
        half = value.high - value.value
        return f"{value.value:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
    return "" if value is None else str(value)


def _signed(estimate: Estimate) -> str:
    if not estimate.n:
        return "unknown"
    interval = (
        ""
        if math.isnan(estimate.low)
        else f", 95% interval {estimate.low:+.3f} to {estimate.high:+.3f}"
    )
    return f"{estimate.value:+.3f}{interval}"
