"""The main job: score, both experts at once, dual data, router; a stage runs only where something is missing or changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import EXPERTS, Config
from ..storage import Storage
from . import cluster
from .lock import run_lock
from .manifest import Manifest
from .plan import FOLDERS, Step, plan
from .train import held_together, train

Say = Callable[[str], None]


@dataclass
class RunResult:
    """What a run left: its directory, the stages that ran and those that were done before, and the evaluation's table."""

    run_dir: str
    ran: list[str] = field(default_factory=list)
    done_before: list[str] = field(default_factory=list)
    table: dict[str, Any] | None = None


def run_directory(config: Config, run_dir: str | None) -> Storage:
    return Storage(run_dir or f"runs/{config.name}")


def cache_folder(config: Config, run: Storage) -> Storage:
    """Where scores (and built-in models) are kept for all runs: beside the run directory, unless the recipe says where."""
    return Storage(config.cache) if config.cache else run.beside("cache")


def run(
    config: Config,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    until: str | None = None,
    say: Say = print,
) -> RunResult:
    """Run what is missing of the job and return where it is.

    Args:
        config: from ``load_config``.
        address: "local" or None for a Ray cluster of our own, "auto" or a host for one that runs.
        run_dir: a path or pyarrow filesystem URI that all nodes reach; default runs/<name>.
        until: the last stage to run.
        say: takes lines for people.

    Raises:
        UserError: bad input, told in one line; stages that finished stay finished.
    """
    storage = run_directory(config, run_dir)

    def planned() -> tuple[Manifest, list[Step]]:
        manifest = Manifest(storage)
        manifest.refuse_other(config)
        return manifest, plan(config, manifest, until)

    _, steps = planned()
    if not any(s.reason for s in steps):
        say(f"nothing to do: {', '.join(s.stage for s in steps)} are done in {storage.uri}")
    else:
        with run_lock(storage):
            manifest, steps = planned()  # another command may have changed the directory meanwhile
            job = _Job(config, storage, manifest, {s.stage: s for s in steps if s.reason}, say)
            job.prepare()
            session = cluster.connect(address)
            try:
                job.check_cluster()
                manifest.claim(config)  # nothing is written before this
                job.execute()
            finally:
                if session is not None:
                    cluster.disconnect()
    done, ran = ([s.stage for s in steps if bool(s.reason) is wanted] for wanted in (False, True))
    result = RunResult(storage.uri, ran=ran, done_before=done)
    if any(s.stage == "evaluation" for s in steps) and storage.exists("evaluation/table.json"):
        result.table = json.loads(storage.read("evaluation/table.json"))
    return result


class _Job:
    """One run's work in order. Each stage's own code is elsewhere; here is when it runs and how it is recorded."""

    def __init__(
        self, config: Config, run: Storage, manifest: Manifest, todo: dict[str, Step], say: Say
    ) -> None:
        self.config, self.run, self.manifest, self.todo, self.say = config, run, manifest, todo, say
        self.cache = cache_folder(config, run)

    def prepare(self) -> None:
        """All that can fail for a user's fault is tried before Ray starts."""
        from ..data.selection import require, select
        from .prepare import check_model, read_and_tokenise, resolve
        from .signals import view_of

        self.say(f"run directory {self.run.uri}")
        for step in self.todo.values():
            self.say(f"{step.stage}: to run, {step.reason}")
        self.resolved = resolve(self.config, self.cache, self.say)
        check_model(self.resolved, scorers="score" in self.todo)
        self.prepared = read_and_tokenise(self.resolved, self.say) if "score" in self.todo else None
        if self.prepared:
            for stage in [s for s in (*EXPERTS, "router") if s in self.todo]:
                if (view := view_of(self.config, stage)) not in (
                    "ranked",
                    "pareto",
                ):  # which need scores
                    require(*select(self.prepared.pairs, view), stage)

    def check_cluster(self) -> None:
        """Wait for, or refuse at once, what the cluster does not have; decide whether both experts fit together."""
        if "score" in self.todo:
            cluster.wait_for(
                [("score", self.config.scores.group)],
                self.config.cluster.resources_timeout,
                self.say,
            )
        self.stages = [self.todo[s] for s in (*EXPERTS, "router") if s in self.todo]
        self.together = held_together(
            self.config, [s.stage for s in self.stages], "experts", self.say
        )

    def execute(self) -> None:
        if "score" in self.todo:
            self._score()
        if tables := [s for s in (*EXPERTS, "dual") if s in self.todo]:
            self._stage_tables(tables)
        if self.stages:
            train(self.resolved, self.run, self.stages, self.together, self._commit, self.say)
        if "evaluation" in self.todo:
            self._evaluate()

    def _score(self) -> None:
        from .score import distinct_items, score

        started = time.monotonic()
        assert self.prepared is not None
        items = distinct_items(self.prepared.pairs, self.prepared.documents)
        scored = score(
            self.resolved,
            items,
            self.prepared.pairs,
            self.prepared.fingerprints,
            self.prepared.null_ids,
            self.cache,
            self.say,
        )
        scored.save(self.run / "scored")
        (self.run / "scored").write(
            "summary.json", json.dumps(self.prepared.summary, indent=1).encode()
        )
        self._commit("score", time.monotonic() - started)

    def _stage_tables(self, stages: list[str]) -> None:
        """Select each stage's pairs and write its table; the dual data is a stage of its own, an expert's table is its input."""
        from .signals import Scored, stage_table, write_table

        scored = Scored.load(self.run / "scored")
        for stage in stages:
            started = time.monotonic()
            table, summary = stage_table(
                self.config, "router" if stage == "dual" else stage, scored
            )
            write_table(
                self.run / ("dual" if stage == "dual" else f"experts/{stage}.work"),
                "pairs.parquet",
                table,
            )
            (self.run / "metrics").write(
                f"{stage}.data.json", json.dumps(summary, indent=1).encode()
            )
            self.say(
                f"{stage}: " + ", ".join(f"{k} {v}" for k, v in summary.items() if k != "dropped")
            )
            if stage == "dual":
                self._commit("dual", time.monotonic() - started)

    def _evaluate(self) -> None:
        from .prepare import build_miniature
        from .stages import evaluate_miniature

        started = time.monotonic()
        self.say("evaluation: generating and judging")
        built = build_miniature(self.config, self.cache, self.say)
        table = evaluate_miniature(self.config, self.run, built.prompts)
        (self.run / "evaluation").write("table.json", json.dumps(table, indent=1).encode())
        self._commit("evaluation", time.monotonic() - started)

    def _commit(self, stage: str, seconds: float) -> None:
        self.manifest.commit(stage, self.todo[stage].parts, FOLDERS[stage], seconds)
        self.say(f"{stage}: done in {seconds:.1f} s")
