"""A run: score, both experts, dual data, router. A stage runs if it is missing or has changed."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from ..config import EXPERTS, Config, Optim
from ..data.selection import require, select
from ..errors import UserError
from ..storage import Storage
from . import cluster
from .lock import run_lock
from .manifest import Manifest
from .plan import FOLDERS, Step, plan
from .prepare import build_miniature, check_models, read_and_tokenise, resolve
from .score import score
from .signals import Scored, stage_table, view_of, write_table
from .train import train, wait_for_groups

log = logging.getLogger(__name__)

_FEW_PAIRS = 200  # a router that is trained on fewer is reported loudly
_FEW_STEPS = 50


@dataclass
class RunResult:
    """What a run left: its directory, the stages that ran or were done before, a final table."""

    run_dir: str
    ran: list[str] = field(default_factory=list)
    done_before: list[str] = field(default_factory=list)
    table: dict[str, Any] | None = None


def run_directory(config: Config, run_dir: str | None) -> Storage:
    return Storage(run_dir or f"runs/{config.name}")


def cache_folder(config: Config, run: Storage) -> Storage:
    """Scores (and built-in models) of all runs: beside the run directory, or the recipe's cache."""
    return Storage(config.cache) if config.cache else run.beside("cache")


def run(
    config: Config,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    until: str | None = None,
) -> RunResult:
    """Run what is missing of the job. Progress is logged.

    Args:
        config: from ``load_config``.
        address: "local" or None for a Ray cluster of our own, "auto" or a host for one that runs.
        run_dir: a path or URI that all nodes reach; default runs/<name>.
        until: the last stage to run.

    Raises:
        UserError: bad input, or another command works in the run directory. A command that fails
            before it starts changes nothing there; finished stages stay finished.
        MachineError: Ray does not start.
    """
    storage = run_directory(config, run_dir)
    steps = _plan(config, Manifest(storage), until)
    if any(step.reason for step in steps):
        with run_lock(storage):
            manifest = Manifest(storage)  # another command may just have changed it
            steps = _plan(config, manifest, until)
            job = _Job(config, storage, manifest, steps)
            job.prepare()
            session = cluster.connect(address)
            try:
                job.check_cluster()
                manifest.claim(config)  # nothing is written before this
                job.execute()
            finally:
                if session is not None:
                    cluster.disconnect()
    else:
        stages = ", ".join(step.stage for step in steps)
        log.info("nothing to do: %s are done in %s", stages, storage.uri)
    result = RunResult(storage.uri)
    for step in steps:
        (result.ran if step.reason else result.done_before).append(step.stage)
        if step.stage == "evaluation":
            result.table = json.loads(storage.read("evaluation/table.json"))
    return result


def _plan(config: Config, manifest: Manifest, until: str | None) -> list[Step]:
    manifest.refuse_other(config)
    return plan(config, manifest, until)


def router_warnings(summary: dict[str, Any], optim: Optim) -> list[str]:
    """What makes a router's gates doubtful: few pairs, few steps, no validation pair.

    Args:
        summary: of the router's table (``signals.stage_table``).
    """
    held_out = summary["validation pairs"]
    pairs = summary["pairs"] - held_out
    steps = optim.steps or math.ceil(optim.epochs * pairs / optim.batch_size)
    doubtful = "the router's gates may hardly differ from their start"
    lines = []
    if pairs < _FEW_PAIRS:
        lines.append(
            f"router: only {pairs} training pairs, at least {_FEW_PAIRS} are usual: {doubtful}"
        )
    if steps < _FEW_STEPS:
        lines.append(f"router: only {steps} steps, at least {_FEW_STEPS} are usual: {doubtful}")
    if not held_out:
        lines.append("router: no validation pair, so overfitting will not be seen")
    return lines


class _Job:
    """The work of one run in its order; each stage's own code is elsewhere."""

    def __init__(self, config: Config, run: Storage, manifest: Manifest, steps: list[Step]) -> None:
        self.config, self.run, self.manifest, self.steps = config, run, manifest, steps
        self.cache = cache_folder(config, run)
        self.todo = {step.stage: step for step in steps if step.reason}
        self.training = [self.todo[s] for s in (*EXPERTS, "router") if s in self.todo]

    def prepare(self) -> None:
        """Everything that can fail because of the user's input, before Ray starts."""
        log.info("run directory %s", self.run.uri)
        for step in self.todo.values():
            log.info("%s: to run, %s", step.stage, step.reason)
        self.resolved = resolve(self.config, self.cache)
        check_models(self.resolved, "score" in self.todo, "router" in self.todo)
        if "score" not in self.todo:
            return
        self.prepared = read_and_tokenise(self.resolved)
        for step in self.training:
            view = view_of(self.config, step.stage)
            if view not in ("ranked", "pareto"):  # which need scores
                require(*select(self.prepared.pairs, view), step.stage)

    def check_cluster(self) -> None:
        """Wait for, or refuse by name, what the cluster lacks for any stage."""
        if "score" in self.todo:
            groups = [("score", self.config.scores.group)]
            cluster.wait_for(groups, self.config.cluster.resources_timeout)
        wait_for_groups(self.config, [step.stage for step in self.training])

    def execute(self) -> None:
        for step in self.steps:
            if step.reason is None:  # left behind by a command that was killed after its commit
                self._work_of(step.stage).delete()
        if "score" in self.todo:
            self._score()
        tables = [stage for stage in (*EXPERTS, "dual") if stage in self.todo]
        if tables:
            self._stage_tables(tables)
        if "router" in self.todo:
            summary = json.loads(self.run.read("metrics/dual.data.json"))
            for line in router_warnings(summary, self.config.router.optim):
                log.warning(line)
        if self.training:
            train(self.resolved, self.run, self.training, self._commit_training)
        if "evaluation" in self.todo:
            self._evaluate()

    def _score(self) -> None:
        started = time.monotonic()
        prepared = self.prepared
        scored = score(
            self.resolved,
            prepared.pairs,
            prepared.documents,
            prepared.fingerprints,
            prepared.null_ids,
            self.cache,
        )
        folder = self.run / "scored"
        scored.save(folder)
        folder.write("summary.json", json.dumps(prepared.summary, indent=1).encode())
        self._commit("score", time.monotonic() - started)

    def _stage_tables(self, stages: list[str]) -> None:
        """Write each stage's table; the dual data is a stage, an expert's table is its input."""
        scored = Scored.load(self.run / "scored")
        for stage in stages:
            started = time.monotonic()
            trained = "router" if stage == "dual" else stage
            table, summary = stage_table(self.config, trained, scored)
            folder = self.run / "dual" if stage == "dual" else self._work_of(stage)
            write_table(folder, "pairs.parquet", table)
            metrics = self.run / "metrics"
            metrics.write(f"{stage}.data.json", json.dumps(summary, indent=1).encode())
            shown = ", ".join(f"{k} {v}" for k, v in summary.items() if k != "dropped")
            log.info("%s: %s", stage, shown)
            if stage == "dual":
                self._commit("dual", time.monotonic() - started)

    def _evaluate(self) -> None:
        started = time.monotonic()
        log.info("evaluation: generating and judging")
        built = build_miniature(self.config, self.cache)
        table = _evaluate_miniature(self.config, self.run, str(built.prompts))
        (self.run / "evaluation").write("table.json", json.dumps(table, indent=1).encode())
        self._commit("evaluation", time.monotonic() - started)

    def _work_of(self, stage: str) -> Storage:
        """The folder of a training stage's table and checkpoints, which is deleted at its end."""
        return self.run / f"{FOLDERS[stage]}.work"

    def _commit(self, stage: str, seconds: float) -> None:
        self.manifest.commit(stage, self.todo[stage].parts, FOLDERS[stage], seconds)
        log.info("%s: done in %.1f s", stage, seconds)

    def _commit_training(self, stage: str, seconds: float) -> None:
        self._commit(stage, seconds)
        self._work_of(stage).delete()  # not before: a kill in between would repeat the stage


def _evaluate_miniature(config: Config, run: Storage, prompts: str) -> dict[str, Any]:
    """The miniature's table (``evaluation.miniature``), computed by a Ray task on one core."""
    import ray  # after ``cluster.connect``

    if run.local is None or config.evaluate is None:
        raise UserError(f"{run.uri}: the miniature's table needs a local or shared run directory")
    task = ray.remote(num_cpus=1)(_evaluation_task)
    return ray.get(task.remote(str(run.local), prompts, config.evaluate.model_dump()))


def _evaluation_task(run: str, prompts: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch  # not in the driver

    from ..evaluation.miniature import evaluate_run  # a layer above this one

    torch.set_num_threads(1)
    return evaluate_run(run, prompts, **options)
