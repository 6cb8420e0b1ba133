"""The training loop of one stage, from its first step or its newest checkpoint to its last step."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import config
from ..data.batching import collate
from ..errors import UserError
from .checkpoint import Checkpoints, SavedState
from .engine import Engine
from .metrics import MetricAccumulator, MetricsLog, means, total
from .schedule import BatchSchedule, allowed_deviation, due, learning_rate, step_seed
from .steps import StepBatch, TrainStep
from .table import StageTable

Heartbeat = Callable[[int, str], None]  # (step, what is about to be done)


@dataclass(frozen=True)
class FitResult:
    step: int  # steps taken
    last: int  # the step at which training ends
    resumed_from: int  # 0: from the start

    @property
    def finished(self) -> bool:
        return self.step >= self.last


def fit(
    *,
    engine: Engine,
    step: TrainStep,
    table: StageTable,
    optim: config.Optim,
    seed: int,
    checkpoints: Checkpoints,
    metrics: MetricsLog | None,
    checkpoint: config.Checkpoint,
    logging: config.Logging,
    dtype: str = "float32",
    node: str | None = None,
    heartbeat: Heartbeat = lambda step, phase: None,
    should_stop: Callable[[], bool] = lambda: False,
    share: float | None = None,
) -> FitResult:
    """Train; every rank calls it alike. ``trained_state(engine, of=model)`` is then the result.

    Args:
        step: an ExpertStep, RouterStep or ScoreStep whose policy is ``engine``.
        metrics: on rank 0; None on the others.
        dtype: the model's, for the tolerance of the first check.
        node: this rank's node, for the file of timings.
        heartbeat: called with (step, "resume" | "check" | "train" | "log" | "validate" |
            "checkpoint").
        should_stop: asked after every step. Where any rank says yes, a checkpoint is written and
            the result is unfinished.
        share: end with a checkpoint after this share of all steps; the learning rates are those of
            the whole training.

    Raises:
        UserError: the loss before the first step is not its analytic value; a loss or gradient is
            not finite (found before anything is written); no row to train on; no disk space.
    """
    group = engine.group
    train, held_out = table.split()
    if not len(train):
        raise UserError(
            "no pair is left to train on: the stage's table has no row that is not held out"
        )
    schedule = BatchSchedule(train.lengths(optim.layout), optim, seed)
    feed, accumulator = _Feed(engine, train, schedule), MetricAccumulator(group)
    heartbeat(0, "resume")
    start = resume(engine, step, feed, accumulator, checkpoints, metrics)
    if start == 0:
        heartbeat(0, "check")
        check_untrained(step, feed, dtype)
    nodes, spans = group.all_gather_object(node or socket.gethostname()), []
    last = schedule.total if share is None else max(1, round(share * schedule.total))
    saved = time.monotonic()
    for number in range(start, last):
        heartbeat(number + 1, "train")
        began, done, rate = time.time(), number + 1, learning_rate(number, schedule.total, optim)
        torch.manual_seed(step_seed(seed, number, group.rank))
        engine.train()
        engine.set_lr(rate)
        batches = list(feed.micro_batches(number))
        for i, batch in enumerate(batches):
            loss, values = step(batch)
            engine.backward(loss * batch.weight, last=i == len(batches) - 1)
            accumulator.add(done, batch.rows, batch.counted(values), loss)
        norm = engine.step()
        norms = {"grad_norm": norm, "steps": 1.0} if group.rank == 0 else {}
        accumulator.add(done, schedule.batch(number), norms, norm)
        spans.append([began, time.time()])
        stop, since = group.all_reduce_max(float(should_stop()), time.monotonic() - saved)
        following = due(
            done, schedule.total, logging=logging, checkpoint=checkpoint,
            since_checkpoint=since, stop_requested=bool(stop) or done == last,
        )  # fmt: skip
        if following.log:
            heartbeat(done, "log")
            sums = total(accumulator.read(train.ids))
            accumulator.reset()
            if metrics:
                record = _record(done, schedule, "train", sums)
                metrics.write({**record, "lr": rate}, _timing(done, sums, spans, nodes))
            spans = []
        if following.validate and len(held_out):
            beat = partial(heartbeat, done, "validate")
            sums = validate(engine, step, held_out, optim, beat)
            if metrics:
                metrics.write(_record(done, schedule, "validation", sums))
        if following.checkpoint:
            heartbeat(done, "checkpoint")
            save_checkpoint(engine, accumulator, checkpoints, done, train.ids)
            saved = time.monotonic()
        if following.stop:
            return FitResult(done, last, start)
    return FitResult(max(start, last), last, start)


def resume(
    engine: Engine,
    step: TrainStep,
    feed: _Feed,
    accumulator: MetricAccumulator,
    checkpoints: Checkpoints,
    metrics: MetricsLog | None,
) -> int:
    """Restore state, sums and metrics files of the newest checkpoint; the number of its steps."""
    found: SavedState | None = engine.group.broadcast_object(
        checkpoints.resume() if engine.group.rank == 0 else None
    )
    done = found.step if found else 0
    if metrics:
        metrics.resume(done)
    if found:
        engine.train()
        engine.load(found.tensors, done, lambda: step(feed.any())[0])
        accumulator.restore(found.state["window"])
    return done


def save_checkpoint(
    engine: Engine,
    accumulator: MetricAccumulator,
    checkpoints: Checkpoints,
    done: int,
    name_rows: Callable[[list[int]], list[str]],
) -> None:
    """Write a checkpoint after ``done`` steps, unless a number is not finite; all ranks call it."""
    sums = accumulator.read(name_rows)
    tensors = engine.state()
    fault: Exception | None = None
    if engine.group.rank == 0:
        try:
            checkpoints.save(done, tensors, {"window": sums, "world": engine.group.world})
        except UserError as error:  # no disk space, for example: all ranks raise it
            fault = error
    fault = engine.group.broadcast_object(fault)
    if fault:
        raise fault


def check_untrained(step: TrainStep, feed: _Feed, dtype: str) -> None:
    """Compare the loss before the first step with its analytic value; all ranks call it.

    Raises:
        UserError: they differ, so the table's reference is not this model (or its template).
    """
    group = feed.engine.group
    sums = torch.zeros(3, dtype=torch.float64, device=group.device)
    feed.engine.train(False)
    for batch in feed.micro_batches(0):
        sums += step.deviation(batch).double() * batch.weight
    deviation, expected, sensitivity = (group.all_reduce(sums) / group.world).tolist()
    allowed = allowed_deviation(dtype, sensitivity)
    if not deviation <= allowed:
        raise UserError(
            f"before the first step the loss must be {expected:.4f} per pair, it differs by "
            f"{deviation:.4f} (at most {allowed:.4f}): the reference log-probabilities are not "
            "this model's with this template and length; delete their cache, or give the model "
            "that made them"
        )


def validate(
    engine: Engine,
    step: TrainStep,
    held_out: StageTable,
    optim: config.Optim,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sums over the held-out pairs; all ranks call it. ``beat`` is called before every batch."""
    schedule = BatchSchedule(held_out.lengths(optim.layout), optim, 0)
    feed, accumulator = _Feed(engine, held_out, schedule), MetricAccumulator(engine.group)
    engine.train(False)
    with torch.no_grad():
        for number in range(schedule.steps_per_epoch):
            beat()
            for batch in feed.micro_batches(number):
                loss, values = step(batch)
                accumulator.add(number, batch.rows, batch.counted(values), loss)
    return total(accumulator.read(held_out.ids))


def measure_held_out(
    engine: Engine,
    step: TrainStep,
    table: StageTable,
    optim: config.Optim,
    heartbeat: Heartbeat = lambda step, phase: None,
) -> dict[str, float]:
    """Mean metrics of the held-out pairs.

    Raises:
        UserError: no pair is held out.
    """
    held_out = table.split()[1]
    if not len(held_out):
        raise UserError("no pair is held out to measure on: set data.validation")
    return means(validate(engine, step, held_out, optim, partial(heartbeat, 0, "measure")))


class _Feed:
    """Rows of a table as batches on the engine's device."""

    def __init__(self, engine: Engine, table: StageTable, schedule: BatchSchedule) -> None:
        self.engine, self.table, self.schedule = engine, table, schedule

    def micro_batches(self, number: int) -> Any:
        """This rank's batches of step ``number``, one after the other."""
        group, rows = self.engine.group, self.schedule.batch(number)
        for part in self.schedule.micro_batches(number, group.rank, group.world):
            yield self._batch(part, rows)

    def any(self) -> StepBatch:
        rows = self.schedule.batch(0)
        return self._batch(rows[:1], rows)

    def _batch(self, rows: Sequence[int], of: Sequence[int]) -> StepBatch:
        """``rows`` of the global batch ``of``. A rank without rows computes one, for the
        collectives' sake, with weight 0."""
        device, used = self.engine.group.device, rows or of[:1]
        tokens = collate(self.table.documents(used), self.schedule.optim.layout).to(device)
        signals = {name: value.to(device) for name, value in self.table.signals(used).items()}
        lengths = self.schedule.lengths
        known = self.table.rows_of_known_risk(of)
        weight = self.engine.group.world / len(of) if rows else 0.0  # ranks are averaged
        return StepBatch(
            tokens,
            signals,
            pairs_per_token=len(of) / sum(lengths[i] for i in of),
            pairs_per_known=len(of) / max(1, len(known)),
            pairs_per_known_token=len(of) / max(1, sum(lengths[i] for i in known)),
            weight=weight,
            rows=list(rows),
        )


def _record(
    done: int, schedule: BatchSchedule, split: str, sums: dict[str, float]
) -> dict[str, Any]:
    epoch = done / schedule.steps_per_epoch
    return {"step": done, "epoch": epoch, "split": split, **means(sums)}


def _timing(
    done: int, sums: dict[str, float], spans: list[list[float]], nodes: list[str]
) -> dict[str, Any]:
    seconds = max(1e-9, sum(end - begin for begin, end in spans))
    # after a resume the sums hold more steps than this process has taken
    share = len(spans) / sums["steps"] * len(nodes) if sums.get("steps") else 1.0
    return {
        "step": done,
        "tokens_per_second": sums["tokens"] * share / seconds,
        "pairs_per_second": sums["pairs"] * share / seconds,
        "steps": spans,  # [start, end] of each, seconds since 1970
        "nodes": nodes,
    }
