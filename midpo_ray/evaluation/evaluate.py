"""``midpo evaluate``: models answer prompt sets, judges read the answers, and a report says what came out.

table of answers -> figures with intervals -> picture, comparisons, routing -> report.html and the files beside it
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..storage import Storage
from . import capability
from .cached import Job, compute, own_cluster
from .charts import Point
from .figures import FIGURES, difference, paired, summarise, win_rate
from .generate import (
    Contender,
    Generator,
    Options,
    VllmGenerator,
    base_of,
    folder_of,
    resolve,
    rows_of,
    uses_vllm,
)
from .judges import Judge, load_judge, rows_for
from .prompts import Prompt, load_sets, prompts_digest
from .report import write_report

ALL = "all sets"
MAPPED = 2  # examples of harmful and of benign prompts whose gates are shown token by token
CURVES = ("loss", "accuracy", "reward_margin")
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All that an evaluation is, resolved before anything heavy starts."""

    contenders: list[Contender]
    prompts: list[Prompt]
    judges: list[Judge]
    against: Contender | None
    options: Options
    seeds: tuple[int, ...]
    about: dict[str, str] = field(default_factory=dict)
    tasks: Any = None  # as capability.load_tasks gives them
    task_limit: int | None = None


def make_plan(
    whats: Sequence[str],
    sets: Sequence[str],
    *,
    against: str | None = None,
    judges: Sequence[str] = (),
    options: Options = Options(),  # noqa: B008  (frozen)
    seeds: int = 1,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    template: str = "auto",
    dtype: str = "float32",
    command: str = "",
) -> Plan:
    """Raises UserError for whatever the user named that is not there."""
    if tasks:
        capability.check_installed()
    counts = {"task-limit": task_limit, "prompts": limit, "seeds": seeds, "batch": options.batch}
    for name, count in {**counts, "max-new-tokens": options.max_new_tokens}.items():
        if count is not None and count < 1:
            raise UserError(f"--{name} {count}: at least 1 is expected")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} --top-p {options.top_p}: at least 0, and in (0, 1], are expected"
        )
    if seeds > 1 and not options.temperature:
        raise UserError(f"--seeds {seeds}: greedy answers are all alike, set --temperature above 0")
    contenders = [resolve(what, template=template, dtype=dtype) for what in whats]
    other = None
    if against is not None:
        other = (
            base_of(contenders[0])
            if against == "base"
            else resolve(against, template=template, dtype=dtype)
        )
        if all(c.fingerprint != other.fingerprint for c in contenders):
            contenders.insert(0, other)
        other = next(c for c in contenders if c.fingerprint == other.fingerprint)
    names = [c.name for c in contenders]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"two models are named {twice}: rename a folder, or leave one out")
    named = list(zip(sets, load_sets(sets, limit), strict=True))
    prompts = [p for _, found in named for p in found]
    chosen = [load_judge(spec) for spec in dict.fromkeys(["phrases", *judges])]
    about = {
        "command": command,
        "models": "\n".join(f"{c.name}: {c.fingerprint} ({c.routed or c.adapter or c.model['path']})" for c in contenders),
        "prompt sets": "\n".join(f"{name}: {len(found)} prompts, {prompts_digest(found)}" for name, found in named),
        "judges": "\n".join(f"{j.name}: {j.fingerprint}" for j in chosen),
        "generation": f"{json.dumps(asdict(options))}, seeds {list(range(seeds))}",
        "intervals": "95%, percentile bootstrap over prompts, 2000 draws",
        "versions": ", ".join([f"midpo_ray {__version__}", f"python {platform.python_version()}",
                               *(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))]),
    }  # fmt: skip
    for c in contenders:
        if c.run is not None and (Path(c.run) / "run.yaml").is_file():
            about.setdefault(
                f"configuration of {c.run}", (Path(c.run) / "run.yaml").read_text("utf-8")
            )
    loaded = capability.load_tasks(tasks) if tasks else None
    if loaded:
        few = f", the first {task_limit} examples of each" if task_limit else ""
        about["capability"] = (
            f"lm-eval {version('lm_eval')}: {', '.join(loaded['tasks'])}{few}; intervals: ± 1.96 standard errors"
        )
    return Plan(
        contenders, prompts, chosen, other, options, tuple(range(seeds)), about, loaded, task_limit
    )


def evaluate(
    plan: Plan,
    out: str,
    *,
    cache: str = "runs/cache",
    address: str | None = None,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Generate, judge, write the report into ``out``; returns the rows of the answers table. Whatever is cached is not redone."""
    where: dict[str, Any] = {"address": address, "workers": workers, "say": say}
    with own_cluster():
        answers, routing = _answers(plan, Storage(cache), where)
        _judge(plan, answers, Storage(cache), where)
    tasks: list[Row] = []
    if plan.tasks:
        tasks = capability.measure(
            plan.tasks, plan.contenders, plan.options, Storage(cache), plan.task_limit, say
        )
        say(render_capability(tasks))
    summary = table(answers)
    x, y = axes(answers)
    say(f"writing {out}")
    write_report(
        Storage(out),
        title=f"{', '.join(c.name for c in plan.contenders)} on {', '.join(dict.fromkeys(p.set for p in plan.prompts))}",
        x_name=x[1],
        y_name=y[1],
        summary=summary,
        points=points(answers, summary, x, y),
        comparisons=comparisons(answers, plan.against.name) if plan.against else [],
        routing=routing,
        answers=answers,
        curves=training_curves(plan.contenders),
        about=plan.about,
        capability=tasks,
    )
    return answers


def _answers(plan: Plan, cache: Storage, where: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """The answers table without verdicts, and what the report shows of the gates."""
    mapped = _mapped(plan.prompts)
    answers: list[Row] = []
    routing: dict[str, Any] = {}
    for c in plan.contenders:
        make = VllmGenerator if uses_vllm(c) else Generator
        options = {"contender": asdict(c), "options": asdict(plan.options)}
        job = Job(f"answers of {c.name}", make, options, plan.options.batch)
        folder = folder_of(cache, c, plan.options)
        work = rows_of(plan.prompts, plan.seeds, mapped if c.routed else frozenset())
        made = compute(
            job, list(work.values()), folder / "vllm" if uses_vllm(c) else folder, **where
        )
        gates: dict[str, Any] = {"rows": [], "examples": []}
        for seed in plan.seeds:
            for p in plan.prompts:
                value = made[work[p.set, p.id, seed]["key"]]
                row = {
                    "model": c.name,
                    "family": c.family,
                    "seed": seed,
                    "set": p.set,
                    "id": p.id,
                    "prompt": p.text,
                }
                row |= {"harmful": p.harmful, "category": p.category}
                row |= {k: value[k] for k in ("response", "tokens", "truncated")}
                if "gates" in value:
                    row |= {
                        f"gate_{e}": sum(layers) / len(layers)
                        for e, layers in value["gates"].items()
                    }
                    if seed == plan.seeds[0]:
                        gates["rows"].append({"harmful": p.harmful, **value["gates"]})
                if "map" in value:
                    gates["examples"].append(
                        {"title": f"{p.set} {p.id}", "harmful": p.harmful, **value["map"]}
                    )
                answers.append(row)
        if gates["rows"]:
            routing[c.name] = gates
    return answers, routing


def _mapped(prompts: Sequence[Prompt]) -> frozenset[tuple[str, str]]:
    """(set, id) of a few short prompts, harmful and benign, drawn by content."""
    ordered = sorted(
        prompts, key=lambda p: (len(p.text) > 300, hashlib.sha256(p.text.encode()).digest())
    )
    return frozenset(
        (p.set, p.id)
        for harmful in (True, False)
        for p in [p for p in ordered if p.harmful is harmful][:MAPPED]
    )


def _judge(plan: Plan, answers: list[Row], cache: Storage, where: dict[str, Any]) -> None:
    """Put every judge's columns into the rows; ``safe`` is cost below 0 where no judge says."""
    turns = {(p.set, p.id): p.turns for p in plan.prompts}
    work = rows_for(answers, turns)
    ordered = sorted(
        work, key=lambda w: len(w["response"])
    )  # of like length together: less padding for models
    for judge in plan.judges:
        verdicts = compute(judge.job, ordered, cache / f"judged-{judge.fingerprint}", **where)
        for row, w in zip(answers, work, strict=True):
            row.update(verdicts[w["key"]])
    for row in answers:
        if row.get("cost") is not None:
            row.setdefault("safe", row["cost"] < 0)


# --- what the report shows --------------------------------------------------------------------------------------------------


def table(answers: Sequence[Row]) -> list[Row]:
    """Figures by model and set, over all sets together, and by category."""
    lines = summarise(answers)
    if len({r["set"] for r in answers}) > 1:
        lines += [{**r, "set": ALL} for r in summarise(answers, ("model",))]
    if any(r["category"] for r in answers):
        lines += [r for r in summarise(answers, ("model", "set", "category")) if r["category"]]
    return lines


def axes(answers: Sequence[Row]) -> tuple[tuple[str, str], tuple[str, str]]:
    """((figure, name) of x, the same of y): by reward and cost where judges gave them, else by refusals alone."""
    has = {name: any(r.get(name) is not None for r in answers) for name in ("reward", "safe")}
    benign = any(r["harmful"] is False for r in answers)
    x = (
        "helpfulness" if benign else "reward",
        f"reward on {'benign' if benign else 'all'} prompts →",
    )
    x = x if has["reward"] else ("refusal_benign", "benign prompts not refused →")
    y = (
        ("safe_rate", "safe on harmful prompts →")
        if has["safe"]
        else ("refusal_harmful", "harmful prompts refused →")
    )
    return x, y


def points(
    answers: Sequence[Row], summary: Sequence[Row], x: tuple[str, str], y: tuple[str, str]
) -> list[Point]:
    """A point a model on each set that has both figures."""
    families = {r["model"]: r["family"] for r in answers}
    found = {(r["model"], r["set"], r["figure"]): r for r in summary if "category" not in r}
    made = []
    for model, name, figure in found:
        across, up = found.get((model, name, x[0])), found[model, name, figure]
        if figure != y[0] or across is None:
            continue
        spans = [(r["value"], r["low"], r["high"]) for r in (across, up)]
        if x[0] == "refusal_benign":
            value, low, high = spans[0]
            spans[0] = (1 - value, 1 - high, 1 - low)
        made.append(Point(model, families[model], name, *spans[0], *spans[1]))
    order = list(dict.fromkeys(r["set"] for r in summary))
    return sorted(made, key=lambda p: order.index(p.set))


def comparisons(answers: Sequence[Row], against: str) -> list[Row]:
    """Win rates and differences of each model against one, by set and over all sets."""
    sets = list(dict.fromkeys(r["set"] for r in answers))
    lines = []
    for model in dict.fromkeys(r["model"] for r in answers if r["model"] != against):
        for name in [*sets, *([ALL] if len(sets) > 1 else [])]:
            a, b = (
                [r for r in answers if r["model"] == m and name in (r["set"], ALL)]
                for m in (model, against)
            )
            for kind, measure, reference, figures in (
                ("win rate", win_rate, 0.5, ("reward", "helpfulness", "safety")),
                (
                    "difference",
                    difference,
                    0.0,
                    ("safe_rate", "refusal_harmful", "refusal_benign", "joint"),
                ),
            ):
                for figure in figures:
                    prompts = len(set(paired(a, b, figure)[2].tolist()))
                    if prompts:
                        value, low, high = measure(a, b, figure)
                        title = f"{model} against {against}: {kind}, {FIGURES[figure].title}"
                        over = f"prompts of {name}"
                        lines.append(
                            {
                                "name": title,
                                "value": value,
                                "low": low,
                                "high": high,
                                "n": prompts,
                                "over": over,
                            }
                        )
                        lines[-1] |= {"reference": reference, "better": FIGURES[figure].better}
    return lines


def training_curves(contenders: Sequence[Contender]) -> dict[str, list[tuple[float, float]]]:
    """ "STAGE of RUN: METRIC" -> (step, value) of the training split, at most some 200 points each."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in dict.fromkeys(c.run for c in contenders if c.run is not None):
        for stage in ("safety", "helpfulness", "router"):
            file = Path(run) / "metrics" / f"{stage}.jsonl"
            lines = (
                [json.loads(line) for line in file.read_text("utf-8").splitlines()]
                if file.is_file()
                else []
            )
            lines = [line for line in lines if line.get("split") == "train"]
            for metric in CURVES:
                seen = [
                    (float(line["step"]), float(line[metric]))
                    for line in lines
                    if isinstance(line.get(metric), int | float)
                ]
                if seen:
                    curves[f"{stage} of {Path(run).resolve().name}: {metric}"] = seen[
                        :: math.ceil(len(seen) / 200)
                    ]
    return curves


def render(answers: Sequence[Row]) -> str:
    """The main table as text: a row a model and set."""
    summary = [r for r in table(answers) if "category" not in r]
    names = [f for f in FIGURES if any(r["figure"] == f for r in summary)]
    keys = list(dict.fromkeys((r["model"], r["set"]) for r in summary))
    at = {(r["model"], r["set"], r["figure"]): r for r in summary}
    heads = ["model", "set", *(FIGURES[f].title for f in names)]
    cells = [
        [model, name, *(_cell(at.get((model, name, f))) for f in names)] for model, name in keys
    ]
    return _aligned([heads, *cells])


def render_capability(rows: Sequence[Row]) -> str:
    """The harness' figures as text: a row a model, task and metric."""
    return _aligned(
        [
            ["model", "task", "metric", "value"],
            *([r["model"], r["task"], r["metric"], _cell(r)] for r in rows),
        ]
    )


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(line: Row | None) -> str:
    if line is None or line["low"] is None:
        return "" if line is None else f"{line['value']:.3g}"
    return f"{line['value']:.3g} [{line['low']:.3g}, {line['high']:.3g}]"
