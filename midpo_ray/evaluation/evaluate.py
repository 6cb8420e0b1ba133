"""``midpo evaluate``: models answer prompt sets, judges read the answers, a report shows it all.

answers table -> metrics with intervals -> plots, comparisons, routing -> report.html and its files
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import EXPERTS
from ..errors import UserError
from ..pipeline.cached_map import MapJob, Pool, cached_map, own_cluster
from ..storage import Storage
from . import capability
from .charts import Point
from .figures import FIGURES, difference, paired, summarise, win_rate
from .generate import (
    GREEDY,
    GenerationOptions,
    Generator,
    ModelSpec,
    answer_rows,
    answers_folder,
    answers_table_rows,
    base_of,
    resolve_model,
)
from .judges import Judge, judge_answers, load_judge
from .prompts import Prompt, load_sets, prompts_digest
from .report import write_report

log = logging.getLogger(__name__)

ALL = "all sets"
MAPPED = 2  # examples of harmful and of benign prompts whose gates are shown token by token
CURVES = ("loss", "accuracy", "reward_margin")
Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationPlan:
    """All that an evaluation is, resolved before any model is loaded."""

    models: list[ModelSpec]
    prompts: list[Prompt]
    judges: list[Judge]
    against: ModelSpec | None
    options: GenerationOptions
    seeds: tuple[int, ...]
    about: dict[str, str] = field(default_factory=dict)
    tasks: Any = None  # of ``capability.load_tasks``
    task_limit: int | None = None


def make_plan(
    whats: Sequence[str],
    sets: Sequence[str],
    *,
    against: str | None = None,
    judges: Sequence[str] = (),
    options: GenerationOptions = GREEDY,
    seeds: int = 1,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    template: str = "auto",
    dtype: str = "float32",
    command: str = "",
) -> EvaluationPlan:
    """Raises UserError for whatever the user named that is missing or not allowed."""
    if tasks:
        capability.check_installed()
    _check_numbers(options, seeds, {"task-limit": task_limit, "prompts": limit})
    models = [resolve_model(what, template=template, dtype=dtype) for what in whats]
    other = None
    if against is not None:
        other = base_of(models[0])
        if against != "base":
            other = resolve_model(against, template=template, dtype=dtype)
        if all(m.fingerprint != other.fingerprint for m in models):
            models.insert(0, other)
        other = next(m for m in models if m.fingerprint == other.fingerprint)
    names = [m.name for m in models]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"two models are named {twice}: rename a folder, or leave one out")
    found = dict(zip(sets, load_sets(sets, limit), strict=True))
    chosen = [load_judge(spec) for spec in dict.fromkeys(["phrases", *judges])]
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "ray")]
    about = {
        "command": command,
        "models": "\n".join(f"{m.name}: {m.fingerprint} ({m.path})" for m in models),
        "prompt sets": "\n".join(
            f"{name}: {len(prompts)} prompts, {prompts_digest(prompts)}"
            for name, prompts in found.items()
        ),
        "judges": "\n".join(f"{j.name}: {j.fingerprint}" for j in chosen),
        "generation": f"{json.dumps(asdict(options))}, seeds {list(range(seeds))}",
        "intervals": "95%, percentile bootstrap over prompts, 2000 draws",
        "versions": f"midpo_ray {__version__}, python {platform.python_version()}, "
        + ", ".join(packages),
    }
    for run in dict.fromkeys(m.run for m in models if m.run is not None):
        recipe = Path(run) / "run.yaml"
        if recipe.is_file():
            about[f"configuration of {run}"] = recipe.read_text("utf-8")
    loaded = capability.load_tasks(tasks) if tasks else None
    if loaded:
        few = f", the first {task_limit} examples of each" if task_limit else ""
        about["capability"] = (
            f"lm-eval {version('lm_eval')}: {', '.join(loaded['tasks'])}{few}; "
            "intervals: ± 1.96 standard errors"
        )
    prompts = [p for of_set in found.values() for p in of_set]
    numbers = tuple(range(seeds))
    return EvaluationPlan(
        models, prompts, chosen, other, options, numbers, about, loaded, task_limit
    )


def _check_numbers(options: GenerationOptions, seeds: int, counts: dict[str, int | None]) -> None:
    counts = {"seeds": seeds, "batch": options.batch, **counts}
    for name, count in {**counts, "max-new-tokens": options.max_new_tokens}.items():
        if count is not None and count < 1:
            raise UserError(f"--{name} {count}: at least 1 is expected")
    if options.temperature < 0:
        raise UserError(f"--temperature {options.temperature}: at least 0 is expected")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: a number in (0, 1] is expected")
    if seeds > 1 and not options.temperature:
        raise UserError(f"--seeds {seeds}: greedy answers are all alike, set --temperature above 0")


def evaluate(
    plan: EvaluationPlan,
    out: str,
    *,
    cache: str = "runs/cache",
    address: str | None = None,
    workers: int | None = None,
) -> list[Row]:
    """Generate, judge and write the report into ``out``; nothing that is cached is done again.

    Args:
        address: of a Ray cluster, as ``pipeline.cluster.connect`` takes it.
        workers: Ray actors; None: one per GPU, or per CPU up to 8; 0: this process, without Ray.

    Returns:
        The rows of the answers table.
    """
    folder, pool = Storage(cache), Pool(address, workers)
    with own_cluster():
        answers, routing = _answers(plan, folder, pool)
        missing = judge_answers(answers, plan.prompts, plan.judges, folder, pool)
    about = plan.about | ({"answers without a verdict": "\n".join(missing)} if missing else {})
    tasks: list[Row] = []
    if plan.tasks:
        tasks = capability.measure(plan.tasks, plan.models, plan.options, folder, plan.task_limit)
        log.info("%s", render_capability(tasks))
    summary = table(answers)
    x, y = axes(answers)
    sets = dict.fromkeys(p.set for p in plan.prompts)
    log.info("writing %s", out)
    write_report(
        Storage(out),
        title=f"{', '.join(m.name for m in plan.models)} on {', '.join(sets)}",
        x_name=x[1],
        y_name=y[1],
        summary=summary,
        points=points(answers, summary, x, y),
        comparisons=comparisons(answers, plan.against.name) if plan.against else [],
        routing=routing,
        answers=answers,
        curves=training_curves(plan.models),
        about=about,
        capability=tasks,
    )
    return answers


def _answers(plan: EvaluationPlan, cache: Storage, pool: Pool) -> tuple[list[Row], dict[str, Any]]:
    """The answers table without verdicts, and what the report shows of each router's gates."""
    mapped = _mapped(plan.prompts)
    answers: list[Row] = []
    routing: dict[str, Any] = {}
    for spec in plan.models:
        given = {"spec": spec, "options": plan.options}
        job = MapJob(f"answers of {spec.name}", Generator, given, plan.options.batch)
        rows = answer_rows(plan.prompts, plan.seeds, mapped if spec.routed else frozenset())
        folders = {"answer": answers_folder(cache, spec, plan.options)}
        values = cached_map(job, list(rows.values()), folders, pool)["answer"]
        by_prompt = {key: values[row["key"]] for key, row in rows.items()}
        found, gates = answers_table_rows(plan.prompts, plan.seeds, by_prompt)
        answers += [{"model": spec.name, "family": spec.family, **row} for row in found]
        if gates is not None:
            routing[spec.name] = gates
    return answers, routing


def _mapped(prompts: Sequence[Prompt]) -> frozenset[tuple[str, str]]:
    """(set, id) of a few short prompts, harmful and benign, drawn by content."""

    def order(p: Prompt) -> tuple[bool, bytes]:
        return len(p.text) > 300, hashlib.sha256(p.text.encode()).digest()

    chosen: list[Prompt] = []
    for harmful in (True, False):
        chosen += sorted((p for p in prompts if p.harmful is harmful), key=order)[:MAPPED]
    return frozenset((p.set, p.id) for p in chosen)


# --- what the report shows ------------------------------------------------------------------------


def table(answers: Sequence[Row]) -> list[Row]:
    """Figures by model and set, over all sets together, and by category."""
    lines = summarise(answers)
    if len({r["set"] for r in answers}) > 1:
        lines += [{**r, "set": ALL} for r in summarise(answers, ("model",))]
    if any(r["category"] for r in answers):
        lines += [r for r in summarise(answers, ("model", "set", "category")) if r["category"]]
    return lines


def axes(answers: Sequence[Row]) -> tuple[tuple[str, str], tuple[str, str]]:
    """(metric, title) of x and of y: reward and cost where judges gave them, else refusals."""
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


def training_curves(models: Sequence[ModelSpec]) -> dict[str, list[tuple[float, float]]]:
    """ "STAGE of RUN: METRIC" -> (step, value) of training, some 200 points each at most."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in dict.fromkeys(m.run for m in models if m.run is not None):
        for stage in (*EXPERTS, "router"):
            file = Path(run) / "metrics" / f"{stage}.jsonl"
            if not file.is_file():
                continue
            lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            lines = [line for line in lines if line.get("split") == "train"]
            for metric in CURVES:
                known = [line for line in lines if isinstance(line.get(metric), int | float)]
                points = [(float(line["step"]), float(line[metric])) for line in known]
                if points:
                    name = f"{stage} of {Path(run).resolve().name}: {metric}"
                    curves[name] = points[:: math.ceil(len(points) / 200)]
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
