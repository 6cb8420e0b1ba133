"""When to step: one stage's training from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import config
from ..data.batching import collate
from ..errors import UserError
from .checkpoint import Checkpoint, Checkpoints
from .engine import Engine
from .log import Metrics
from .plan import Plan, allowed_deviation, due, learning_rate, step_seed
from .steps import Step, StepBatch
from .table import StageTable
from .window import Window, means, total


@dataclass(frozen=True)
class Result:
    step: int  # steps taken
    total: int
    resumed_from: int  # 0: from the start

    @property
    def finished(self) -> bool:
        return self.step >= self.total


def fit(
    *,
    engine: Engine,
    step: Step,
    table: StageTable,
    optim: config.Optim,
    seed: int,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    checkpoint: config.Checkpoint,
    logging: config.Logging,
    dtype: str = "float32",
    node: str | None = None,
    phase: Callable[[int, str], None] = lambda step, name: None,
    should_stop: Callable[[], bool] = lambda: False,
    until: int | None = None,
) -> Result:
    """Trains; every rank calls it alike. The caller then takes the result by ``trained_state(engine, of=model)``.

    Args:
        step: an ExpertStep, RouterStep or ScoreStep whose policy is ``engine``.
        metrics: on rank 0; None on the others.
        dtype: of the model, for the tolerance of the first check.
        node: this rank's node, for the time file.
        phase: told (step, "resume" | "check" | "train" | "log" | "validate" | "checkpoint"), for a watchdog.
        should_stop: asked after every step; where any rank says yes, a checkpoint is written and fit returns unfinished.
        until: the same after this many steps, however many of them are of this call.

    Raises:
        UserError: the loss before the first step is not its analytic value; a loss or gradient is not finite, which is found at
            the next log or checkpoint, and before anything is written; no row to train on; no space.
    """
    group = engine.group
    train, held_out = table.split()
    if not len(train):
        raise UserError(
            "no pair is left to train on: every row of the stage's table is held out for validation, or there is none"
        )
    plan, window = Plan(train.lengths(optim.layout), optim, seed), Window(group)
    feed = _Feed(engine, train, plan)
    phase(0, "resume")
    start = resume(engine, step, feed, window, checkpoints, metrics)
    if start == 0:
        phase(0, "check")
        check_untrained(step, feed, allowed_deviation(dtype, step.beta))
    nodes, spans, saved = group.gather(node or socket.gethostname()), [], time.monotonic()
    last = min(plan.total, until or plan.total)
    for number in range(start, last):
        phase(number + 1, "train")
        began, rows, done = time.time(), plan.batch(number), number + 1
        torch.manual_seed(step_seed(seed, number, group.rank))
        engine.train()
        engine.set_lr(lr := learning_rate(number, plan.total, optim))
        micro_batches = plan.micro_batches(number, group.rank, group.world)
        for i, mine in enumerate(micro_batches):
            loss, values = step(feed(mine or rows[:1], rows))
            share = (
                group.world / len(rows) if mine else 0.0
            )  # a rank with nothing to do goes along, for the collectives' sake
            engine.backward(loss * share, last=i == len(micro_batches) - 1)
            window.add(done, mine, values if mine else {k: v * 0 for k, v in values.items()}, loss)
        norm = engine.step()
        window.add(done, rows, {"grad_norm": norm, "steps": 1.0} if group.rank == 0 else {}, norm)
        spans.append([began, time.time()])
        stop, waited = group.max(float(should_stop()), time.monotonic() - saved)
        ends = bool(stop) or done == last
        next_ = due(
            done,
            plan.total,
            logging=logging,
            checkpoint=checkpoint,
            since_checkpoint=waited,
            stop_requested=ends,
        )
        if next_.log:
            phase(done, "log")
            sums = total(window.read(train.ids))
            window.reset()
            if metrics:
                metrics.write(_record(done, plan, sums, lr), _timing(done, sums, spans, nodes))
            spans = []
        if next_.validate and len(held_out):
            record = _record(
                done,
                plan,
                validate(engine, step, held_out, optim, partial(phase, done, "validate")),
                None,
            )
            if metrics:
                metrics.write(record)
        if next_.checkpoint:
            phase(done, "checkpoint")
            save(engine, window, checkpoints, done, train.ids)
            saved = time.monotonic()
        if next_.stop:
            return Result(done, plan.total, start)
    return Result(last, plan.total, start)


def resume(
    engine: Engine,
    step: Step,
    feed: _Feed,
    window: Window,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
) -> int:
    """The steps already taken: state, sums and metrics files stand as they did after them. 0 where there is no checkpoint."""
    found: Checkpoint | None = engine.group.share(
        checkpoints.resume() if engine.group.rank == 0 else None
    )
    done = found.step if found else 0
    if metrics:
        metrics.resume(done)
    if found:
        rows = feed.plan.batch(0)
        engine.train()
        engine.load(found.tensors, done, lambda: step(feed(rows[:1], rows))[0])
        window.restore(found.state["window"])
    return done


def save(
    engine: Engine,
    window: Window,
    checkpoints: Checkpoints,
    done: int,
    name_rows: Callable[[list[int]], list[str]],
) -> None:
    """A checkpoint after ``done`` steps; all ranks call it, rank 0 writes. Nothing is written where a number is not finite."""
    sums = window.read(name_rows)
    tensors = engine.state()
    fault: Exception | None = None
    if engine.group.rank == 0:
        try:
            checkpoints.save(done, tensors, {"window": sums, "world": engine.group.world})
        except UserError as error:  # no space, say: all ranks stop alike
            fault = error
    if fault := engine.group.share(fault):
        raise fault


def check_untrained(step: Step, feed: _Feed, allowed: float) -> None:
    """Before the first step the loss is known: softplus(m) with its scale and smoothing, ln 2 for DPO. All ranks call it.

    Raises:
        UserError: it is off, so the table's reference is not this model (or its template or length).
    """
    group, rows = feed.engine.group, feed.plan.batch(0)
    sums = torch.zeros(2, dtype=torch.float64, device=group.device)
    feed.engine.train(False)
    for mine in feed.plan.micro_batches(0, group.rank, group.world):
        off = step.deviation(feed(mine or rows[:1], rows)).double()
        sums += off if mine else off * 0
    deviation, expected = (group.sum(sums) / len(rows)).tolist()
    if not deviation <= allowed:
        raise UserError(
            f"before the first step the loss must be {expected:.4f} a pair, it is {deviation:.4f} off (at most {allowed:.4f}): "
            "the reference log-probabilities are not this model's with this template and length; delete their cache, or give the "
            "model that made them"
        )


@torch.no_grad()
def validate(
    engine: Engine,
    step: Step,
    held_out: StageTable,
    optim: config.Optim,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Sums over the held-out pairs; all ranks call it. ``beat`` is called batch by batch: it is no hang, however long."""
    plan, window = Plan(held_out.lengths(optim.layout), optim, 0), Window(engine.group)
    feed = _Feed(engine, held_out, plan)
    engine.train(False)
    for number in range(plan.steps_per_epoch):
        beat()
        rows = plan.batch(number)
        for mine in plan.micro_batches(number, engine.group.rank, engine.group.world):
            loss, values = step(feed(mine or rows[:1], rows))
            window.add(
                number, mine, values if mine else {k: v * 0 for k, v in values.items()}, loss
            )
    return total(window.read(held_out.ids))


def stop_on_sigterm() -> Callable[[], bool]:
    """A ``should_stop`` that says yes once SIGTERM came (a spot machine's notice). Only in a process's main thread."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked.is_set


class _Feed:
    """Rows of a table as a batch on the engine's device."""

    def __init__(self, engine: Engine, table: StageTable, plan: Plan) -> None:
        self.engine, self.table, self.plan = engine, table, plan

    def __call__(self, rows: Sequence[int], of: Sequence[int]) -> StepBatch:
        device = self.engine.group.device
        tokens = collate(self.table.documents(rows), self.plan.optim.layout).to(device)
        signals = {name: value.to(device) for name, value in self.table.signals(rows).items()}
        return StepBatch(tokens, signals, self.plan.pairs_per_token(of))


def _record(done: int, plan: Plan, sums: dict[str, float], lr: float | None) -> dict[str, Any]:
    record = {
        "step": done,
        "epoch": done / plan.steps_per_epoch,
        "split": "validation" if lr is None else "train",
        **means(sums),
    }
    return record if lr is None else {**record, "lr": lr}


def _timing(
    done: int, sums: dict[str, float], spans: list[list[float]], nodes: list[str]
) -> dict[str, Any]:
    seconds = max(1e-9, sum(end - begin for begin, end in spans))
    share = (
        len(spans) / sums["steps"] * len(nodes) if sums.get("steps") else 1.0
    )  # steps of this process, after a resume
    return {
        "step": done,
        "tokens_per_second": sums["tokens"] * share / seconds,
        "pairs_per_second": sums["pairs"] * share / seconds,
        "steps": spans,  # [start, end] of each, seconds since 1970
        "nodes": nodes,
    }
