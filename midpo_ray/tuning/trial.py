"""A trial: the training of one point with one seed, rung by rung, from the sweep's table of frozen signals.

    <sweep>/trials/<id>/record.json    values at every rung reached, and the clock's; rewritten whole at each
    <sweep>/trials/<id>/<stage>/       checkpoints of a trial under way: a killed one goes on from there

One worker trains in the trial's own process, which Tune keeps for the next trial with all its imports; more are a TorchTrainer's.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import Config, Group
from ..errors import UserError
from ..pipeline.cluster import scaling
from ..pipeline.signals import Scored, stage_table
from ..pipeline.stage import StageSpec, build
from ..storage import Storage
from .space import MEASURED

Report = Callable[[dict[str, Any]], None]
free_since = 0.0  # when this process ended its last trial
LOOK = 2.0  # seconds between a group's looks for an order to stop


def stop_order(trial: str) -> str:
    """The file that asks a trial of several workers to end by itself.

    Were it killed, as Tune ends the trial of a single worker, its workers' placement group would keep their resources: Ray
    frees it when the whole job ends, or by way of the dashboard, which not every cluster has.
    """
    return f"trials/{trial}/stop"


def trial(spec: dict[str, Any]) -> None:
    """Tune's function. ``spec``: id, config (the recipe at the point), stages, rungs, workers, run, asked (a time)."""
    from ray import tune

    if spec["workers"] == 1:
        return alone(spec, tune.report)
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    group = group_of(Config.model_validate(spec["config"]), spec["stages"])
    TorchTrainer(
        _member,
        train_loop_config=spec,
        scaling_config=scaling(group, spec["workers"]),
        run_config=RunConfig(
            name=f"{spec['id']}-{spec['asked']:.0f}",
            storage_path=(Storage(spec["run"]) / "logs/train").uri,
            callbacks=[TuneReportCallback()],
        ),
    ).fit()
    return None


def group_of(config: Config, stages: list[str]) -> Group:
    """Where a trial's workers run: as the largest group of its stages does."""
    return max(
        (config.group(s) for s in stages),
        key=lambda g: (g.min_workers, g.gpus_per_worker, g.cpus_per_worker),
    )


def alone(spec: dict[str, Any], report: Report) -> None:
    """In this process: DeepSpeed gets a process group of one, which must stay for the trials that follow (DeepSpeed keeps it)."""
    import torch
    import torch.distributed as dist

    global free_since
    on_gpu = group_of(Config.model_validate(spec["config"]), spec["stages"]).gpus_per_worker > 0
    os.environ["LOCAL_RANK"] = "0"
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    try:
        train(spec, torch.device("cuda" if on_gpu else "cpu"), report)
    finally:  # also where Tune stops the trial, which it does within ``report``
        free_since = time.time()


def _member(spec: dict[str, Any]) -> None:
    from ray.train import report
    from ray.train.torch import get_device

    train(spec, get_device(), report)


def train(spec: dict[str, Any], device: Any, report: Report) -> None:
    """From the newest recorded rung to the last; the values of all stages are recorded and reported together at each."""
    import torch
    import torch.distributed as dist

    config, run = Config.model_validate(spec["config"]), Storage(spec["run"])
    looked = time.monotonic()

    def ordered() -> bool:
        nonlocal looked
        if spec["workers"] == 1 or time.monotonic() - looked < LOOK:
            return False
        looked = time.monotonic()
        return run.exists(stop_order(spec["id"]))

    torch.set_num_threads(max(1, int(group_of(config, spec["stages"]).cpus_per_worker)))
    record = read_record(run, spec["id"]) or {"rungs": {}, "clock": []}
    clock = {"asked": max(spec["asked"], free_since)}

    def tell(told: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            run.write(f"trials/{spec['id']}/record.json", json.dumps(record, indent=1).encode())
        report({"trial": spec["id"], **told})

    try:
        with tempfile.TemporaryDirectory() as scratch:
            stages = [
                Training(config, s, run, spec["id"], device, Path(scratch)) for s in spec["stages"]
            ]
            for share in (s for s in spec["rungs"] if str(s) not in record["rungs"]):
                values: dict[str, float] = {}
                for stage in stages:
                    for (
                        other
                    ) in stages:  # of two stages, the one whose turn it is not leaves the memory
                        other.unload(unless=stage)
                    measured = stage.until(share, clock, ordered)
                    if measured is None:
                        return
                    values |= measured
                record["rungs"][str(share)] = values
                record["clock"].append({**clock, "ended": time.time()})
                tell({"rung": share, **values})
    except (
        UserError
    ) as error:  # this point's own fault, a loss that is not finite say: an outcome as others are
        record["failed"] = str(error)
        tell({"failed": str(error)})


def read_record(run: Storage, trial: str) -> dict[str, Any] | None:
    name = f"trials/{trial}/record.json"
    return json.loads(run.read(name)) if run.exists(name) else None


@lru_cache(maxsize=1)
def scored(run: str) -> Scored:
    """The table of frozen signals: read once by each process."""
    return Scored.load(Storage(run) / "scored")


class Training:
    """One stage of a trial, taken from rung to rung."""

    def __init__(
        self, config: Config, stage: str, run: Storage, trial: str, device: Any, scratch: Path
    ) -> None:
        from ..training.checkpoint import Checkpoints
        from ..training.table import StageTable

        self.config, self.stage, self.optim = config, stage, config.optim(stage)
        self.table, self.held_out = StageTable(
            stage_table(config, stage, scored(run.uri))[0]
        ).split()
        if not len(self.held_out):
            raise UserError(
                f"{stage}: no pair is held out, so no trial can be measured: set data.validation"
            )
        self.checkpoints = Checkpoints(
            run / f"trials/{trial}/{stage}", keep=config.checkpoint.keep, digest=trial
        )
        self.build = lambda: build(StageSpec(config, stage, run.uri, trial), device, scratch)
        self.loaded: tuple[Any, Any, Any] | None = None

    def unload(self, unless: Training) -> None:
        if self is not unless and self.loaded:
            self.loaded = None
            gc.collect()

    def until(
        self, share: float, clock: dict[str, float], should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Train to a share of the steps, and measure the held-out pairs; ``clock`` is told of the trial's first step.

        None where it was told to stop before.
        """
        from ..training.loop import fit, validate
        from ..training.metrics import means

        self.loaded = self.loaded or self.build()
        _, engine, step = self.loaded
        result = fit(
            engine=engine,
            step=step,
            table=self.table,
            optim=self.optim,
            seed=self.config.seed_of_training,
            checkpoints=self.checkpoints,
            metrics=None,
            checkpoint=self.config.checkpoint,
            logging=self.config.logging,
            dtype=self.config.model.dtype,
            heartbeat=lambda _, name: (
                clock.update(stepped=clock.get("stepped", time.time())) if name == "train" else None
            ),
            should_stop=should_stop,
            share=share,
        )
        if not result.finished:
            return None
        values = means(validate(engine, step, self.held_out, self.optim))
        return {f"{self.stage}.{name}": values[name] for name in MEASURED}
