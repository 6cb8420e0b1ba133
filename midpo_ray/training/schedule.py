"""What a step does, as pure functions of its number: data, learning rate, seed, what follows it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import config
from ..data.batching import plan_batches, split_batch


class BatchSchedule:
    """Which pairs each optimizer step takes, the same for any number of ranks.

    Args:
        lengths: tokens of every pair.
    """

    def __init__(self, lengths: Sequence[int], optim: config.Optim, seed: int) -> None:
        self.lengths, self.optim, self.seed = list(lengths), optim, seed
        self._epoch, self._batches = 0, plan_batches(self.lengths, optim.batch_size, seed, 0)
        self.steps_per_epoch = len(self._batches)
        self.total = optim.steps or max(1, math.ceil(optim.epochs * self.steps_per_epoch - 1e-9))

    def batch(self, step: int) -> list[int]:
        """The pairs of step ``step`` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = plan_batches(self.lengths, self.optim.batch_size, self.seed, epoch)
        return self._batches[place]

    def micro_batches(self, step: int, rank: int, world: int) -> list[list[int]]:
        """A rank's part of a step; the same number for every rank, so that some may be empty."""
        optim = self.optim
        parts = split_batch(self.batch(step), self.lengths, world, optim.batch_tokens, optim.layout)
        return parts[rank]


def learning_rate(step: int, total: int, optim: config.Optim) -> float:
    """Of step ``step`` (from 0): a linear warm-up that is never 0 (ours), then the schedule."""
    warmup = math.ceil(optim.warmup * total - 1e-9)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }
    return optim.lr * shape[optim.schedule]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step on a rank: no generator's state has to outlive a process (ours)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Due:
    log: bool
    validate: bool
    checkpoint: bool
    stop: bool


def due(
    done: int,
    total: int,
    *,
    logging: config.Logging,
    checkpoint: config.Checkpoint,
    since_checkpoint: float = 0.0,
    stop_requested: bool = False,
) -> Due:
    """What follows ``done`` of ``total`` steps; ``since_checkpoint`` is in seconds."""
    last = done >= total
    by_steps = checkpoint.every_steps is not None and done % checkpoint.every_steps == 0
    by_time = checkpoint.every_seconds is not None and since_checkpoint >= checkpoint.every_seconds
    by_validation = logging.validate_every is not None and done % logging.validate_every == 0
    return Due(
        log=last or done % logging.every == 0,
        validate=last or by_validation,
        checkpoint=last or by_steps or by_time or stop_requested,
        stop=stop_requested and not last,
    )


def allowed_deviation(dtype: str, nats_per_unit: float) -> float:
    """How far a pair's mean loss may be from its analytic value before the first step (ours).

    Sums in float32 agree to a fraction of a thousandth of a nat, in bfloat16 to about half a nat
    between two batch shapes.

    Args:
        nats_per_unit: how much the loss changes per nat of the policy's log-probabilities.
    """
    if dtype == "float32":
        return 1e-3 * (1.0 + nats_per_unit)
    return 0.02 + 0.5 * nats_per_unit
