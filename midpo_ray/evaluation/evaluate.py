"""``midpo evaluate``: models answer prompt sets, judges read the answers, a report shows it all.

answers table -> metrics with intervals -> plots, comparisons, routing -> report.html and its files
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from .. import __version__
from ..errors import UserError
from ..pipeline.cached_map import MapJob, Pool, cached_map, own_cluster
from ..storage import Storage
from . import capability
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
from .report import answers_table, write_report
from .results import (
    aligned,
    estimate_text,
    over_prompts,
    summary_text,
    training_curves,
)

log = logging.getLogger(__name__)

MAPPED = 2  # examples of harmful and of benign prompts whose gates are shown token by token
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
    table = answers_table(answers).to_pandas()
    against = plan.against.name if plan.against else None
    others = [m.name for m in plan.models if against and m.name != against]
    runs = dict.fromkeys(m.run for m in plan.models if m.run is not None)
    sets = dict.fromkeys(p.set for p in plan.prompts)
    log.info("writing %s", out)
    write_report(
        Storage(out),
        f"{', '.join(m.name for m in plan.models)} on {', '.join(sets)}",
        over_prompts(table, [(name, str(against)) for name in others]),
        table,
        routing=routing,
        curves=training_curves((Path(run).resolve().name, Storage(run)) for run in runs),
        about=about,
        capability=pd.DataFrame(tasks) if tasks else None,
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


def render(answers: Sequence[Row]) -> str:
    """The metrics as text, one line per model and set."""
    return summary_text(over_prompts(answers_table(answers).to_pandas()).summary)


def render_capability(rows: Sequence[Row]) -> str:
    """The harness's metrics as text, one line per model, task and metric."""
    table = pd.DataFrame(rows)
    numbers = table[["value", "low", "high"]].astype(float).to_numpy()
    cells = [estimate_text(*line) for line in numbers]
    return aligned(table[["model", "task", "metric"]].assign(value=cells))
