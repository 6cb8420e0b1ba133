"""What a unit of a study does, in the Ray task that runs it; its record is written last."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import EXPERTS, Config
from ..errors import UserError
from ..evaluation.prompts import Prompt, load_sets
from ..miniature.world import held_out_prompts, make_world
from ..pipeline.plan import FOLDERS
from ..pipeline.prepare import resolve
from ..pipeline.run import cache_folder
from ..pipeline.run import run as run_pipeline
from ..pipeline.signals import Scored, stage_table, write_table
from ..pipeline.stage import Outcome, StageSpec, launch, run_alone
from ..storage import Storage
from .plan import RECORD, StudyUnit
from .spec import Study

# torch, transformers and Ray are imported inside functions: the driver starts without them.


class Preempted(RuntimeError):
    """The node is about to go, and a checkpoint is written: Ray runs the task again elsewhere."""


def run_unit(unit: StudyUnit, study: Study, folder: str, *_: Any) -> str:
    """Run a unit and write its record; a warm process runs others afterwards.

    Args:
        folder: URI of the study.
        _: results of the units that it needs, for which Ray has waited.

    Returns:
        The unit's id.
    """
    import torch

    started, home = time.monotonic(), Storage(folder)
    torch.set_num_threads(max(1, int(unit.group.cpus_per_worker)))
    if unit.kind == "scores":
        _score(unit, home)
    elif unit.kind == "trainings":
        _train(unit, home)
    else:
        _answer(unit, study, home)
    record = {"kind": unit.kind, "id": unit.id, "seed": unit.seed, "stage": unit.stage}
    record["seconds"] = round(time.monotonic() - started, 3)
    home.write(f"{unit.folder}/{RECORD}", json.dumps(record, indent=1).encode())
    return unit.id


def scores_alone(unit: StudyUnit) -> bool:
    """Whether a unit of scores runs in its own process, with its worker's resources."""
    return unit.config.scores.workers == 1


def _score(unit: StudyUnit, study: Storage) -> None:
    """The table of frozen signals, by the pipeline."""
    config = unit.config
    if scores_alone(unit):
        scores = config.scores.model_copy(update={"workers": 0})
        config = config.model_copy(update={"scores": scores})
    config = config.model_copy(update={"cache": cache_folder(config, study).uri})
    run_pipeline(config, "auto", run_dir=(study / unit.folder).uri, until="score")


def _resolved(config: Config, study: Storage) -> Config:
    return resolve(config, cache_folder(config, study))


@lru_cache(maxsize=1)
def _scored(run: str) -> Scored:
    """The table of frozen signals, read once per process."""
    return Scored.load(Storage(run) / "scored")


def _train(unit: StudyUnit, study: Storage) -> None:
    """One stage, in this process or on its group of workers; resumed from its checkpoint."""
    home, stage = study / unit.folder, unit.stage
    spec = StageSpec(_resolved(unit.config, study), stage, home.uri, unit.id, notice=study.uri)
    table, summary = stage_table(
        unit.config, stage, _scored((study / "scores" / unit.needs[0]).uri)
    )
    write_table(home / "dual" if stage == "router" else spec.work, "pairs.parquet", table)
    home.write(f"metrics/{stage}.data.json", json.dumps(summary, indent=1).encode())
    if stage == "router":
        for expert, training in zip(EXPERTS, unit.needs[1:], strict=True):
            with tempfile.TemporaryDirectory() as scratch:
                adapter = _download(study, training, FOLDERS[expert], Path(scratch) / expert)
                home.upload(adapter, FOLDERS[expert])
    if unit.group.max_workers > 1:
        import ray

        result = ray.get(launch(spec))
    else:
        result = run_alone(spec).raise_failure()
    if result.outcome is Outcome.PREEMPTED:
        raise Preempted(f"{unit.about}: the node is about to go, at step {result.step}")
    if result.outcome is not Outcome.FINISHED:
        raise UserError(f"the study was stopped at step {result.step}: the same command resumes it")
    spec.work.delete()


def _download(study: Storage, training: str, folder: str, target: Path) -> Path:
    return (study / "trainings" / training).download(folder, target)


def _answer(unit: StudyUnit, study: Study, folder: Storage) -> None:
    """answers.parquet; the answers before they are judged are kept for other judges."""
    from ..evaluation.generate import GenerationOptions
    from .answer import answer_prompts, judged

    assert unit.contender is not None
    settings = study.answers.model_dump(exclude={"prompts"})
    prompts = prompts_of(study, unit.config.seed)
    if not folder.exists(unit.generation):
        config = _resolved(unit.config, folder)
        with tempfile.TemporaryDirectory() as scratch:
            trained = {}
            for stage, training in zip(unit.contender.stages, unit.needs[1:], strict=True):
                whole = stage == "router"  # a run directory, with the adapters below the router
                source = "" if whole else FOLDERS[stage]
                trained[stage] = _download(folder, training, source, Path(scratch) / stage)
            options = GenerationOptions(**settings)
            rows, routing = answer_prompts(config, unit.contender, trained, prompts, options)
        content = {"rows": rows, "routing": routing}
        folder.write(unit.generation, json.dumps(content).encode())
    rows = json.loads(folder.read(unit.generation))["rows"]
    write_table(folder / unit.folder, "answers.parquet", judged(rows, prompts, study.judges))


def prompts_of(study: Study, seed: int) -> Sequence[Prompt]:
    """The prompts of all sets, or else those of the miniature of this seed, whose ids name it."""
    limit = study.answers.prompts
    if study.sets:
        return [prompt for prompts in load_sets(study.sets, limit) for prompt in prompts]
    rows = [r for r in held_out_prompts(make_world(seed), seed) if r["split"] == study.split]
    return [
        Prompt(f"{seed}-{i}", "miniature", r["prompt"], r["harmful"], r["kind"])
        for i, r in enumerate(rows[:limit], 1)
    ]
