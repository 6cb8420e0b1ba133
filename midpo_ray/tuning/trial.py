"""A trial: the stages of one point, trained side by side and measured at shares of their steps.

    <sweep>/trials/<id>/record.json             metrics at every share that was reached
    <sweep>/trials/<id>/experts/<stage>.work/   checkpoints of a trial under way

A trial's id is a digest of all that its numbers depend on: one that Tune starts again repeats what
is recorded and resumes what is not.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ..config import Config, digest
from ..errors import UserError
from ..pipeline.cluster import bundle
from ..pipeline.plan import FOLDERS
from ..pipeline.signals import Scored, stage_table, write_table
from ..pipeline.stage import Outcome, StageSpec, start_workers
from ..pipeline.watch import STOP, Faults
from ..storage import Storage
from .space import MEASURED, Point, Space, at

OBJECTIVE = "objective"  # the sum of the metrics, those to be minimised with a minus
PERCENT = "percent"  # of the steps
_SHARE = "trial.json"  # in a checkpoint of Tune: whose it is, and after which share


@dataclass(frozen=True)
class SweepSettings:
    """What all trials share.

    Args:
        config: the recipe with the space's ``set`` and files in place of built-in names.
        folder: URI of the sweep's run directory.
        key: digest of what all trials depend on.
        session: this command's, in which no two trials write to one folder.
        together: whether the cluster holds all stages of a trial at the same time; otherwise they
            run one after the other in one place.
    """

    space: Space
    config: Config
    folder: str
    key: str
    session: str
    together: bool

    def recipe(self, point: Point, seed: int) -> Config:
        """The recipe of a trial; ``seed`` is added to the recipe's training seed."""
        config = at(self.config, self.space, point, "trial")
        return config.model_copy(update={"training_seed": self.config.seed_of_training + seed})

    def trial_id(self, point: Point, seed: int) -> str:
        config = self.recipe(point, seed)
        section = config.router if "router" in self.space.stages else config.experts
        return digest(self.key, config.lora, section, config.training_seed)

    def placement(self) -> tune.PlacementGroupFactory:
        """One bundle per worker of every stage, or of the largest one where they take turns."""
        groups = [self.config.group(stage) for stage in self.space.stages]
        if not self.together:
            groups = [
                max(groups, key=lambda g: (g.min_workers, g.gpus_per_worker, g.cpus_per_worker))
            ]
        workers = [group for group in groups for _ in range(group.min_workers)]
        labels = [dict(group.label_selector) for group in workers]
        selectors = {"bundle_label_selector": labels} if any(labels) else {}
        return tune.PlacementGroupFactory([{}, *(bundle(g) for g in workers)], **selectors)


def run_trial(config: dict[str, Any], settings: SweepSettings) -> None:
    """Tune's trainable; ``config`` is {"trial": {"point": Point, "seed": int}}."""
    trial, checkpoint = _Trial(settings, **config["trial"]), tune.get_checkpoint()
    done = trial.restore(checkpoint) if checkpoint else 0.0
    for share in settings.space.scheduler.shares():
        if share > done:
            trial.train_to(share)


class _Trial:
    def __init__(self, settings: SweepSettings, point: Point, seed: int) -> None:
        self.settings, self.is_prepared = settings, False
        point = settings.space.active(point)
        self.recipe = settings.recipe(point, seed)
        self.home = Storage(settings.folder) / f"trials/{settings.trial_id(point, seed)}"
        own = f"{settings.session} {tune.get_context().get_trial_id()}"
        claim = self.home.read("claim").decode() if self.home.exists("claim") else own
        if claim != own and claim.startswith(settings.session):  # a searcher drew it twice
            self.home = Storage(f"{self.home.uri}-{own.split()[1]}")
        self.home.write("claim", own.encode())

    def restore(self, checkpoint: tune.Checkpoint) -> float:
        """The share after which this trial continues.

        A population-based scheduler gives a trial another's checkpoint: its numbers are then no
        function of its own configuration, so it gets a folder of its own.
        """
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / _SHARE).read_text())
            if state["home"].startswith(self.home.uri):
                self.home = Storage(state["home"])
                return state["share"]
            name = f"{self.home.uri}-{tune.get_context().get_trial_id()}"
            self.home = Storage(name)
            self.home.delete()
            for stage in self.settings.space.stages:
                inherited = Path(folder) / stage
                if inherited.exists():
                    self.home.upload(inherited, f"{FOLDERS[stage]}.work/checkpoints")
        return state["share"]

    def train_to(self, share: float) -> None:
        """Train all stages to a share of their steps, record their metrics, report to Tune."""
        record: dict[str, Any] = {"shares": {}}
        if self.home.exists("record.json"):
            record = json.loads(self.home.read("record.json"))
        if str(share) not in record["shares"] and "failed" not in record:
            try:
                record["shares"][str(share)] = self._train(share)
            except UserError as error:  # this point's own fault, an infinite loss for example
                record["failed"] = str(error)
            self.home.write("record.json", json.dumps(record, indent=1).encode())
        if str(share) not in record["shares"]:
            raise UserError(record["failed"])
        values = record["shares"][str(share)]
        objective = sum(
            values[name] * (1 if direction == "max" else -1)
            for name, direction in self.settings.space.metrics.items()
        )
        with tempfile.TemporaryDirectory() as folder:
            state = {"home": self.home.uri, "share": share}
            (Path(folder) / _SHARE).write_text(json.dumps(state))
            self._copy_checkpoints(Path(folder))
            tune.report(
                {PERCENT: 100 * share, OBJECTIVE: objective, **values},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )

    def _train(self, share: float) -> dict[str, float]:
        self._prepare()
        placement, faults = ray.util.get_current_placement_group(), Faults(self.home)
        running: list[Any] = []
        values: dict[str, float] = {}
        for spec in self._stages(share):
            first = sum(len(workers) for _, workers in running) if self.settings.together else 0
            running.append((spec, start_workers(spec, placement, first)))
            if not self.settings.together:
                ray.wait(running[-1][1])
        for spec, workers in running:
            try:
                result = ray.get(workers)[0].raise_failure()
            except ray.exceptions.RayError as error:
                lines = faults.new()
                raise RuntimeError("; ".join(lines) or f"{spec.stage}: {error}") from error
            if result.outcome is not Outcome.FINISHED:
                self._wait_for_the_end()
                raise RuntimeError(f"{spec.stage}: stopped at step {result.step}")
            values |= {f"{spec.stage}.{name}": result.values[name] for name in MEASURED}
        return values

    def _stages(self, share: float) -> Iterator[StageSpec]:
        settings = self.settings
        for stage in settings.space.stages:
            yield StageSpec(
                self.recipe, stage, self.home.uri, settings.key, experts=settings.folder,
                notice=settings.folder, share=share, log=False,
            )  # fmt: skip

    def _prepare(self) -> None:
        if self.is_prepared:
            return
        for stage in self.settings.space.stages:
            table, _ = stage_table(self.recipe, stage, _scored(self.settings.folder))
            folder = "dual" if stage == "router" else f"{FOLDERS[stage]}.work"
            write_table(self.home / folder, "pairs.parquet", table)
        self.is_prepared = True

    def _copy_checkpoints(self, folder: Path) -> None:
        for stage in self.settings.space.stages:
            checkpoints = self.home / f"{FOLDERS[stage]}.work/checkpoints"
            for name in checkpoints.files():
                path = folder / stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(checkpoints.read(name))

    def _wait_for_the_end(self) -> None:
        """After a notice to the sweep: Tune is about to end, and must not see a failed trial."""
        while Storage(self.settings.folder).exists(STOP):
            time.sleep(1.0)


@lru_cache(maxsize=1)
def _scored(folder: str) -> Scored:
    """The table of frozen signals, read once per process."""
    return Scored.load(Storage(folder) / "scored")
