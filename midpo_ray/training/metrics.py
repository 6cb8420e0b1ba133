"""Metrics of a stage: sums between two logs, and where the numbers are written.

    <run>/metrics/<stage>.jsonl         step, split, loss, ...: the same in every run of a recipe,
                                        also in one that was killed and resumed
    <run>/metrics/<stage>.time.jsonl    tokens/s, start and end of every step, nodes

TensorBoard, W&B and MLflow get the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import config
from ..errors import UserError
from ..storage import Storage
from .engine import ProcessGroup
from .steps import PER_TOKEN

Sums = dict[str, float]


class MetricAccumulator:
    """A rank's sums since the last log, in float64, so that a resumed run has the same."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._sums: dict[str, Tensor] = {}
        self._checked: list[tuple[int, list[int], Tensor]] = []  # (step, rows, loss or norm)

    def add(
        self,
        step: int,
        rows: Sequence[int],
        values: Mapping[str, Tensor | float],
        checked: Tensor | float,
    ) -> None:
        """Add to the sums. ``read`` names the rows whose ``checked`` loss or norm is not finite."""
        for name, value in values.items():
            value = torch.as_tensor(value, device=self.group.device).double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        checked = torch.as_tensor(checked, device=self.group.device).detach().double()
        self._checked.append((step, list(rows), checked))

    def read(self, name_rows: Callable[[list[int]], list[str]]) -> list[Sums]:
        """Every rank's sums, on all ranks. All call it; only here the host waits for the device.

        Raises:
            UserError: on all ranks, where a number since the last read is not finite.
        """
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        finite: list[bool] = []
        if self._checked:
            finite = torch.stack([number for _, _, number in self._checked]).isfinite().tolist()
        fault: tuple[int, list[str]] | None = None
        for (step, rows, _), is_finite in zip(self._checked, finite, strict=True):
            if fault is None and not is_finite:
                fault = (step, name_rows(rows))
        self._checked.clear()
        sums = dict(zip(self._sums, values, strict=True))
        ranks = self.group.all_gather_object((sums, fault))
        faults = [fault for _, fault in ranks if fault]
        if faults:
            first = min(step for step, _ in faults)
            named = list(dict.fromkeys(row for s, names in faults if s == first for row in names))
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            raise UserError(
                f"step {first}: the loss or its gradient is not finite, rows {', '.join(named[:8])}"
                f"{more}: look at these rows, or lower the learning rate"
            )
        return [sums for sums, _ in ranks]

    def reset(self) -> None:
        self._sums.clear()

    def restore(self, ranks: Sequence[Sums]) -> None:
        """Continue from what ``read`` returned, also where the number of ranks has changed."""
        if len(ranks) == self.group.world:
            sums = ranks[self.group.rank]
        else:
            sums = total(ranks) if self.group.rank == 0 else dict.fromkeys(total(ranks), 0.0)
        for name, value in sums.items():
            self._sums[name] = torch.tensor(value, dtype=torch.float64, device=self.group.device)


def total(ranks: Sequence[Sums]) -> Sums:
    names = ranks[0] if ranks else {}
    return {name: math.fsum(sums.get(name, 0.0) for sums in ranks) for name in names}


def means(sums: Sums) -> dict[str, float]:
    """From sums over ranks: means per pair, token or step; counts unchanged; padding as a share."""
    pairs, tokens, steps = sums["pairs"], sums["tokens"], sums.get("steps", 0.0)
    result: dict[str, float] = {}
    for name, value in sums.items():
        if name in ("pairs", "tokens"):
            result[name] = int(value)
        elif name == "padding":
            result[name] = value / (value + tokens)
        elif name == "grad_norm":
            result[name] = value / steps
        elif name != "steps":
            result[name] = value / (tokens if name in PER_TOKEN else pairs)
    return result


class _Service(Protocol):
    def resume(self, step: int) -> None: ...

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.writer: Any = None

    def resume(self, step: int) -> None:
        from tensorboardX import SummaryWriter  # needs protobuf, which is slow to import

        self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()


class _Wandb:
    def __init__(self, project: str, name: str) -> None:
        wandb = _package("wandb")
        self.job = wandb.init(project=project, name=name, id=name, resume="allow")

    def resume(self, step: int) -> None:
        """By the run's id."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.job.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.job.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, experiment: str, name: str) -> None:
        self.mlflow = _package("mlflow")
        self.mlflow.set_experiment(experiment)
        known = self.mlflow.search_runs(
            experiment_names=[experiment],
            filter_string=f"attributes.run_name = '{name}'",
            output_format="list",
        )
        if known:
            self.mlflow.start_run(run_id=known[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=name)

    def resume(self, step: int) -> None:
        """By the run's name; a step that is logged again has both values."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class MetricsLog:
    """Writes one stage's metrics; only rank 0 has it. A context manager, for the services' sake.

    Args:
        folder: ``<run>/metrics``.
        tensorboard: a folder for TensorBoard's files, where the configuration asks for them.
        run: the run's name at W&B and MLflow.

    Raises:
        UserError: the package of a service that the configuration names is not installed.
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
        self.folder = folder
        self.file, self.time_file = f"{stage}.jsonl", f"{stage}.time.jsonl"
        self.services: list[_Service] = []
        if logging.tensorboard and tensorboard:
            self.services.append(_TensorBoard(tensorboard))
        if logging.wandb:
            self.services.append(_Wandb(logging.wandb, f"{run}-{stage}"))
        if logging.mlflow:
            self.services.append(_MLflow(logging.mlflow, f"{run}-{stage}"))

    def resume(self, step: int) -> None:
        """Cut both files after ``step``: what follows is done again."""
        for name in (self.file, self.time_file):
            for left in self.folder.names():
                if left.startswith(f"{name}.tmp-"):  # of a killed process
                    self.folder.delete(left)
            if self.folder.exists(name):
                old = self.folder.read(name)
                kept = lines_until(old, step)
                if kept != old:
                    self.folder.write(name, kept)
        for service in self.services:
            service.resume(step)

    def write(self, record: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Write one line of metrics (``step``, ``split``, numbers), and one of timings."""
        self.folder.append(self.file, _line(record))
        if timing is not None:
            self.folder.append(self.time_file, _line(timing))
        values = {
            f"{record['split']}/{key}": value
            for key, value in {**record, **(timing or {})}.items()
            if isinstance(value, int | float) and key != "step"
        }
        for service in self.services:
            service.write(values, int(record["step"]))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for service in self.services:
            service.close(failed=error is not None)


def lines_until(content: bytes, step: int) -> bytes:
    """The whole lines of steps up to ``step``, without a torn last line."""
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


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"logging.{name} is set, but the package {name} is not installed: "
            f"pip install {name}, or unset logging.{name}"
        ) from None
