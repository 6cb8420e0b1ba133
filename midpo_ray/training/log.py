"""Metrics of a stage: what is the same in every run of a recipe in one file, what the clock says in another.

    <run>/metrics/<stage>.jsonl         step, split, loss, accuracy, ...: a killed and resumed run ends with the same file
    <run>/metrics/<stage>.time.jsonl    tokens/s, start and end of every step, nodes

TensorBoard, W&B and MLflow get the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .. import config
from ..errors import UserError
from ..storage import Storage

Number = float | int


class Metrics:
    """Writes one stage's metrics; only one process (rank 0) has it.

    Args:
        folder: ``<run>/metrics``.
        tensorboard: a folder for TensorBoard's event files, where the configuration asks for them.
        run: how W&B and MLflow name the run.

    Raises:
        UserError: a service is asked for whose package is not installed.
    """

    def __init__(
        self,
        folder: Storage,
        stage: str,
        logging: config.Logging,
        *,
        tensorboard: str | None = None,
        run: str = "midpo",
    ) -> None:
        self.folder, self.stage, self.logging = folder, stage, logging
        self.file, self.time_file = f"{stage}.jsonl", f"{stage}.time.jsonl"
        self._tensorboard, self._writer = tensorboard if logging.tensorboard else None, None
        self._sinks: list[Callable[[dict[str, Number], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        name = f"{run}-{stage}"
        if logging.wandb:
            wandb = _package("wandb", "logging.wandb")
            job = wandb.init(project=logging.wandb, name=name, id=name, resume="allow")
            self._sinks.append(lambda values, step: job.log(values, step=step))
            self._closers.append(job.finish)
        if logging.mlflow:
            mlflow = _package("mlflow", "logging.mlflow")
            mlflow.set_experiment(logging.mlflow)
            mlflow.start_run(run_name=name)
            self._sinks.append(lambda values, step: mlflow.log_metrics(values, step=step))
            self._closers.append(mlflow.end_run)

    def resume(self, step: int) -> None:
        """Cuts both files behind ``step``: what follows is done again."""
        for left in self.folder.names():
            if left.startswith(
                (f"{self.file}.tmp-", f"{self.time_file}.tmp-")
            ):  # of a killed process
                self.folder.delete(left)
        for name in (self.file, self.time_file):
            if self.folder.exists(name):
                old = self.folder.read(name)
                kept = lines_until(old, step)
                if kept != old:
                    self.folder.write(name, kept)
        if self._tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(self._tensorboard, purge_step=step + 1)

    def write(self, record: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """One line of metrics (``step``, ``split``, numbers), and one of the clock's."""
        self.folder.append(self.file, _line(record))
        if timing is not None:
            self.folder.append(self.time_file, _line(timing))
        step, split = int(record["step"]), str(record["split"])
        numbers = {
            k: v
            for k, v in {**record, **(timing or {})}.items()
            if isinstance(v, Number) and k != "step"
        }
        values = {f"{split}/{key}": value for key, value in numbers.items()}
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        for sink in self._sinks:
            sink(values, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for close in self._closers:
            close()


def lines_until(content: bytes, step: int) -> bytes:
    """The whole lines of steps up to ``step``; a torn last line goes."""
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    return b"".join(kept)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _package(name: str, key: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"{key} is set, but the package {name} is not installed: pip install {name}, or unset {key}"
        ) from None
