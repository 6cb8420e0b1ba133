"""What a study leaves: the report's files (report.html, answers.csv, ...), study.json with all numbers, study.txt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..evaluation import evaluate as over_prompts
from ..evaluation.figures import FIGURES, paired, prompt_values, seed_means, win_rate
from ..evaluation.report import Point, write_report
from ..pipeline.signals import read_table
from ..storage import Storage
from .numbers import AXES, JUDGED, numbers, over_seeds
from .plan import Plan
from .spec import Study
from .work import RECORD

COLUMNS = {  # figure -> heading
    "kl": "KL, nats", "helpfulness": "reward, benign", "safe_rate": "safe, harmful", "refusal_benign": "refuses benign",
    "joint": "joint", "malformed": "malformed", "auroc": "AUROC", "auroc_lookalike": "look-alikes",
}  # fmt: skip
INTERVALS = "95% by Student's t over the seeds; differences and win rates are paired by seed"
OVER_PROMPTS = "95%, percentile bootstrap over prompts, 2000 draws: of one training each, they say nothing of training's luck"


def write(
    folder: Storage, study: Study, plan: Plan, name: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The files; the table is told. Contenders whose answers are not there yet are left out."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for (contender, _), unit in plan.answers.items():
        if folder.exists(f"answers/{unit}/{RECORD}"):
            named = {"model": contender, "family": study.contender(contender).family}
            table = read_table(folder / "answers" / unit, "answers.parquet").to_pylist()
            rows.setdefault(contender, []).extend({**row, **named} for row in table)
    if not rows:
        say("study: no contender has answered yet")
        return {}
    result = {
        "study": name,
        "seeds": list(study.seeds),
        **numbers(study, rows),
        "clock": clock(folder, plan),
    }
    folder.write("study.json", json.dumps(result, indent=1).encode())
    answers = [row for part in rows.values() for row in part]
    one = len(study.seeds) == 1  # no interval over seeds: over prompts, as an evaluation's
    text = "\n".join([*lines(result), *(["", over_prompts.render(answers)] if one else [])])
    folder.write("study.txt", f"{text}\n".encode())
    where = {
        "study": name,
        "about": study.about,
        "recipe": study.recipe,
        "seeds": ", ".join(map(str, study.seeds)),
    }
    write_report(
        folder,
        title=f"Study {name}",
        **(shown_by_prompt(study, answers) if one else shown_by_seed(rows, result)),
        routing=routing(folder, study, plan),
        answers=answers,
        curves=curves(folder, study, plan),
        about={
            **where,
            "intervals": OVER_PROMPTS if one else INTERVALS,
            "version": __version__,
            "numbers": text,
        },
    )
    say(text)
    say(
        f"report: {folder.uri}/report.html, every number: {folder.uri}/study.json, every answer: {folder.uri}/answers.csv"
    )
    return result


def shown_by_seed(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], result: Mapping[str, Any]
) -> dict[str, Any]:
    """What the report shows with intervals over seeds."""
    return {
        "x_name": "reward on benign prompts",
        "y_name": "share of harmful prompts answered safely",
        "summary": summary(rows),
        "points": points(result["contenders"]),
        "comparisons": comparisons(result),
    }


def shown_by_prompt(study: Study, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same with intervals over prompts."""
    x, y = over_prompts.axes(answers)
    table = over_prompts.table(answers)
    return {
        "x_name": x[1],
        "y_name": y[1],
        "summary": table,
        "points": over_prompts.points(answers, table, x, y),
        "comparisons": by_prompt(study, answers),
    }


def summary(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every figure of every contender over the seeds, as the report's table has it."""
    told = []
    for name, mine in rows.items():
        sets = mine[0]["set"] if len({r["set"] for r in mine}) == 1 else over_prompts.ALL
        for figure in FIGURES:
            if by_seed := seed_means(mine, figure):
                values = over_seeds(list(by_seed.values()))
                bounds = {
                    k: math.nan if values[k] is None else values[k]
                    for k in ("value", "low", "high")
                }
                told.append(
                    {
                        "model": name,
                        "set": sets,
                        "figure": figure,
                        **bounds,
                        "prompts": len(prompt_values(mine, figure)),
                    }
                )
    return told


def points(contenders: Sequence[Mapping[str, Any]]) -> list[Point]:
    x, y = AXES
    shown = [c for c in contenders if c[x]["value"] is not None and c[y]["value"] is not None]
    ends = [
        [math.nan if c[a][k] is None else c[a][k] for a in AXES for k in ("value", "low", "high")]
        for c in shown
    ]
    return [Point(c["name"], c["family"], "all", *e) for c, e in zip(shown, ends, strict=True)]


def comparisons(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences of the main contender and win rates, as the report lists them."""
    told: list[dict[str, Any]] = []

    def add(name: str, figure: Mapping[str, Any] | None, reference: float) -> None:
        if figure and figure["value"] is not None:
            bounds = {
                k: math.nan if figure[k] is None else figure[k] for k in ("value", "low", "high")
            }
            told.append(
                {"name": name, **bounds, "n": figure["n"], "over": "seeds", "reference": reference}
            )

    for d in result["differences"]:
        for figure in ("joint", *AXES):
            add(f"{FIGURES[figure].title}: {result['main']} less {d['against']}", d[figure], 0.0)
    for front in result["fronts"]:
        add(
            f"safe, harmful: {result['main']} above {front['name']}'s front at equal reward on benign",
            front["safer_by"],
            0.0,
        )
    for c in result["comparisons"]:
        for key, when in (
            ("equal_steps", "at equal steps"),
            ("equal_kl", "at equal KL from the base"),
        ):
            add(f"win rate by {c['by']}: {c['of']} against {c['against']}, {when}", c[key], 0.5)
    return told


def by_prompt(study: Study, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The main contender against each other one, and the study's win rates, with intervals over prompts."""
    told = []
    for against in dict.fromkeys(r["model"] for r in answers if r["model"] != study.main):
        told += over_prompts.comparisons(
            [r for r in answers if r["model"] in (study.main, against)], against
        )
    for c in study.comparisons:
        of, against = ([r for r in answers if r["model"] == name] for name in (c.of, c.against))
        figure = JUDGED[c.by]
        if prompts := len(set(paired(of, against, figure)[2].tolist())):
            value, low, high = win_rate(of, against, figure)
            told.append(
                {
                    "name": f"win rate by {c.by}: {c.of} against {c.against}",
                    "value": value,
                    "low": low,
                    "high": high,
                }
            )
            told[-1] |= {"n": prompts, "over": "prompts", "reference": 0.5}
    return told


def routing(folder: Storage, study: Study, plan: Plan) -> dict[str, Any]:
    """The main contender's gates on the first seed's prompts."""
    name = plan.units[plan.answers[study.main, study.seeds[0]]].said
    found = json.loads(folder.read(name))["routing"] if folder.exists(name) else None
    return {study.main: found} if found else {}


def curves(folder: Storage, study: Study, plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """Loss, accuracy and reward margin of the main contender's trainings, first seed."""
    told: dict[str, list[tuple[float, float]]] = {}
    for need in plan.units[plan.answers[study.main, study.seeds[0]]].needs:
        unit = plan.units[need]
        name = f"{unit.folder}/metrics/{unit.stage}.jsonl"
        for line in folder.read(name).splitlines() if unit.stage and folder.exists(name) else ():
            record = json.loads(line)
            for metric in (
                ("loss", "accuracy", "reward_margin") if record["split"] == "train" else ()
            ):
                told.setdefault(f"{unit.stage}: {metric}", []).append(
                    (record["step"], record[metric])
                )
    return told


def clock(folder: Storage, plan: Plan) -> dict[str, dict[str, float]]:
    """Seconds of the units by kind: how many, and their sum, each on its own workers."""
    spent: dict[str, list[float]] = {}
    for unit in plan.units.values():
        if folder.exists(f"{unit.folder}/{RECORD}"):
            record = json.loads(folder.read(f"{unit.folder}/{RECORD}"))
            spent.setdefault(f"{unit.kind} {unit.stage}".strip(), []).append(record["seconds"])
    return {kind: {"units": len(s), "seconds": round(sum(s), 1)} for kind, s in spent.items()}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The study in text: ± is half a 95% t-interval over the seeds."""
    seeds = len(result["seeds"])
    told = grid(
        [
            ["model", *COLUMNS.values()],
            *([c["name"], *(_pm(c[f]) for f in COLUMNS)] for c in result["contenders"]),
        ]
    )
    told += [
        "",
        f"± is half of a 95% t-interval over {seeds} seeds"
        if seeds > 1
        else "one seed: intervals over prompts are below",
    ]
    if result["differences"]:
        told += ["", f"{result['main']} less the others, paired by seed"]
        heads = ["against", "reward, benign", "safe, harmful", "joint"]
        keys = ("helpfulness", "safe_rate", "joint")
        told += grid(
            [
                heads,
                *([d["against"], *(_pm(d[k], True) for k in keys)] for d in result["differences"]),
            ]
        )
    if front := result["front"]:
        above = ", ".join(front["above"]) or "no other"
        beyond = " beyond its interval" if seeds > 1 else ""
        told += ["", f"front: {above} is at least as good on both axes and better on one{beyond}",
                 f"joint rate above the best other's ({front['best_rival']}): {_range(front['joint_lead'])}"]  # fmt: skip
    for front in result["fronts"]:
        lead = front["safer_by"]
        told.append(f"safe on harmful, above {front['name']}'s front at equal reward on benign: {_range(lead)}; "
                    f"in {lead['clamped']} seed(s) beyond its end, which then counts")  # fmt: skip
    if result["comparisons"]:
        told += [
            "",
            "win rates over the same prompts, at equal steps and at equal KL from the base",
        ]
        heads = ["of", "against", "by", "equal steps", "equal KL", "KL of", "KL against", "clamped"]
        cells = []
        for c in result["comparisons"]:
            figures = (
                _pm(c["equal_steps"]),
                _pm(c["equal_kl"]),
                _pm(c["kl_of"]),
                _pm(c["kl_against"]),
                str(c["clamped"]),
            )
            cells.append([c["of"], c["against"], c["by"], *figures])
        told += grid([heads, *cells])
    spent = ", ".join(
        f"{kind} {v['units']} in {v['seconds']:.0f} s" for kind, v in result["clock"].items()
    )
    return [*told, "", f"work: {spent}"]


def grid(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            c.ljust(w) if not i else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _pm(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    if not figure or figure["value"] is None:
        return ""
    value = f"{figure['value']:+.3f}" if sign else f"{figure['value']:.3f}"
    return value if figure["high"] is None else f"{value} ± {figure['high'] - figure['value']:.3f}"


def _range(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "not known"
    between = (
        ""
        if figure["low"] is None
        else f", 95% interval {figure['low']:+.3f} to {figure['high']:+.3f}"
    )
    return f"{figure['value']:+.3f}{between}"
