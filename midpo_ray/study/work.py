"""What each kind of unit does, in the worker that runs it; its record is written last."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EXPERTS, Config
from ..errors import UserError
from ..pipeline.plan import FOLDERS
from ..pipeline.signals import Scored, stage_table, write_table
from ..pipeline.stage import Outcome, StageSpec, run_alone
from ..storage import Storage
from .spec import STAGES

if TYPE_CHECKING:
    from ..evaluation.generate import GenerationOptions
    from ..evaluation.prompts import Prompt

RECORD = "record.json"


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """A unit on one worker, from its ``Unit.spec``; a warm process takes the next one."""
    started = time.monotonic()
    config, study = Config.model_validate(spec["config"]), Storage(spec["study"])
    threads(config, spec)
    do = {"worlds": score, "trainings": train, "answers": answer}[spec["kind"]]
    do(spec, config, study)
    return commit(study, spec, started)


def commit(study: Storage, spec: dict[str, Any], started: float) -> dict[str, Any]:
    record = {
        **{k: spec[k] for k in ("kind", "id", "seed", "stage")},
        "seconds": round(time.monotonic() - started, 3),
    }
    study.write(f"{spec['folder']}/{RECORD}", json.dumps(record, indent=1).encode())
    return record


def threads(config: Config, spec: dict[str, Any]) -> None:
    import torch

    cpus = (
        config.group(spec["stage"]).cpus_per_worker
        if spec["stage"]
        else config.scores.cpus_per_worker
    )
    torch.set_num_threads(max(1, int(cpus)))


def cached(config: Config, study: Storage) -> Config:
    """The configuration with its cache named: beside the study, as a run's is beside the run."""
    from ..pipeline.run import cache_folder

    return config.model_copy(update={"cache": cache_folder(config, study).uri})


def resolved(config: Config, study: Storage) -> Config:
    from ..pipeline.prepare import resolve

    return resolve(config, Storage(cached(config, study).cache or ""))


def score(spec: dict[str, Any], config: Config, study: Storage) -> None:
    """The table of frozen signals, by the pipeline; a built-in world's files first, in this process."""
    from ..pipeline.run import run

    run(
        cached(config, study),
        "auto",
        run_dir=(study / spec["folder"]).uri,
        until="score",
    )


@lru_cache(maxsize=1)
def _scored(run: str) -> Scored:
    """The table of frozen signals, read once per process."""
    return Scored.load(Storage(run) / "scored")


def prepare(spec: dict[str, Any], config: Config, study: Storage) -> Storage:
    """The training's folder as a run directory: the stage's table, and under a router the adapters that it is trained on."""
    home, stage = study / spec["folder"], spec["stage"]
    table, summary = stage_table(config, stage, _scored((study / "worlds" / spec["world"]).uri))
    write_table(
        home / "dual" if stage == "router" else home / f"{FOLDERS[stage]}.work",
        "pairs.parquet",
        table,
    )
    home.write(f"metrics/{stage}.data.json", json.dumps(summary, indent=1).encode())
    if stage == "router":
        with tempfile.TemporaryDirectory() as scratch:
            for name, unit in zip(EXPERTS, spec["needs"][1:], strict=True):
                home.upload(
                    (study / "trainings" / unit).download(FOLDERS[name], Path(scratch) / name),
                    FOLDERS[name],
                )
    return home


def train(spec: dict[str, Any], config: Config, study: Storage) -> None:
    """A stage in this process; one that was killed is resumed from its checkpoint."""
    home = prepare(spec, config, study)
    stage = StageSpec(
        resolved(config, study), spec["stage"], home.uri, spec["id"], notice=study.uri
    )
    result = run_alone(stage).raise_failure()
    if result.outcome is not Outcome.FINISHED:
        raise UserError(f"the study was stopped at step {result.step}: the same command resumes it")
    stage.work.delete()


def answer(spec: dict[str, Any], config: Config, study: Storage) -> None:
    """answers.parquet of one contender; what it says, and a router's gates, are kept for other judges."""
    from ..evaluation.generate import GenerationOptions
    from .answer import judged

    settings = dict(spec["answers"])
    prompts = prompts_of(spec["sets"], spec["split"], settings.pop("prompts"), config.seed)
    if not study.exists(spec["said"]):
        rows, routing = generated(spec, config, study, prompts, GenerationOptions(**settings))
        study.write(spec["said"], json.dumps({"rows": rows, "routing": routing}).encode())
    said = json.loads(study.read(spec["said"]))
    write_table(
        study / spec["folder"], "answers.parquet", judged(said["rows"], prompts, spec["judges"])
    )


def generated(
    spec: dict[str, Any],
    config: Config,
    study: Storage,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
) -> Any:
    from .answer import answers

    needed = dict(zip(STAGES[spec["contender"]["serve"]], spec["needs"], strict=False))
    with tempfile.TemporaryDirectory() as scratch:
        trained = {
            s: (study / "trainings" / unit).download(FOLDERS[s], Path(scratch) / s)
            for s, unit in needed.items()
        }
        if "router" in needed:  # a run directory, with the adapters that it was trained on
            trained["router"] = (study / "trainings" / needed["router"]).download(
                "", Path(scratch) / "run"
            )
        return answers(resolved(config, study), spec["contender"], trained, prompts, options)


def prompts_of(sets: Sequence[str], split: str, limit: int | None, seed: int) -> list[Prompt]:
    """Those of all sets, or of the generated world ``seed``, whose ids say so: other worlds have other prompts."""
    from ..evaluation.prompts import Prompt, load_sets
    from ..miniature.world import held_out_prompts, make_world

    if sets:
        return [p for found in load_sets(sets, limit) for p in found]
    rows = [r for r in held_out_prompts(make_world(seed), seed) if r["split"] == split][:limit]
    return [
        Prompt(f"{seed}-{i}", "miniature", r["prompt"], r["harmful"], r["kind"])
        for i, r in enumerate(rows, 1)
    ]
