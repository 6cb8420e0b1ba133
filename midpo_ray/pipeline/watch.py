"""A worker's watch: a thread beside training that ends a process that hangs, and tells training of a notice to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

from ..storage import Storage

FAULTS = "logs/faults"  # one file a rank: what its watch had to say
STOP = "logs/stop"  # stands there while a run is told to stop
LOOK = 1.0  # seconds between two looks at the clock
ASK = 2.0  # seconds between two questions to the storage and the cluster
GRACE = 10.0  # seconds that the last words of a hung process may take


class Watch:
    """``with Watch(...) as watch: fit(..., phase=watch.beat, should_stop=watch.noticed)``.

    Args:
        run: the run directory.
        stage, rank, node: whose watch it is.
        patience: seconds without a beat after which the process is ended, so that its group restarts.
        owner: a file of the run and what this attempt wrote there; where a later attempt wrote its own, the process is ended: one
            that was cut off and given up must not write beside its successor.
        leaving: whether this node has notice to go.
        end: what ends the process.
    """

    def __init__(
        self,
        run: Storage,
        stage: str,
        rank: int,
        node: str,
        patience: float,
        owner: tuple[str, bytes] | None = None,
        leaving: Callable[[], bool] = lambda: False,
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self.run, self.stage, self.rank, self.node, self.patience = run, stage, rank, node, patience
        self._owner, self._leaving, self._end = owner, leaving, end
        self._last = (time.monotonic(), 0, "start")
        self._noticed, self._over = threading.Event(), threading.Event()

    def beat(self, step: int, phase: str) -> None:
        """What training is about to do."""
        self._last = (time.monotonic(), step, phase)

    def noticed(self) -> bool:
        """Whether to write a checkpoint and stop."""
        return self._noticed.is_set()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, daemon=True).start()
        threading.Thread(target=self._ask, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(LOOK, self.patience)):
            began, step, phase = self._last
            still = time.monotonic() - began
            if still >= self.patience:
                said = f"{self.stage}: rank {self.rank} on node {self.node} hangs: step {step}, phase {phase}, for {still:.0f} s"
                words = threading.Thread(target=self._say, args=(said,), daemon=True)
                words.start()
                words.join(GRACE)  # the storage may be what hangs
                self._end()
                return

    def _say(self, said: str) -> None:
        print(said, file=sys.stderr, flush=True)
        with tempfile.TemporaryFile("w+") as stacks, contextlib.suppress(Exception):
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            self.run.append(
                f"{FAULTS}/{self.stage}-{self.rank}.log", f"{said}\n{stacks.read()}".encode()
            )

    def _ask(self) -> None:
        while not self._over.wait(ASK):
            with contextlib.suppress(Exception):  # out of reach for a while: the next look tells
                if self._leaving() or self.run.exists(STOP):
                    self._noticed.set()
                if self._owner and self.run.read(self._owner[0]) != self._owner[1]:
                    self._end()


class Faults:
    """The driver's side: what the watches said since the last look, one line each."""

    def __init__(self, run: Storage) -> None:
        self.run = run
        self.told = {
            name: run.read(f"{FAULTS}/{name}").count(b" hangs: ") for name in run.names(FAULTS)
        }

    def new(self) -> list[str]:
        lines = []
        for name in self.run.names(FAULTS):
            said = [
                s
                for s in self.run.read(f"{FAULTS}/{name}").decode("utf-8", "replace").splitlines()
                if " hangs: " in s
            ]
            lines += said[self.told.get(name, 0) :]
            self.told[name] = len(said)
        return lines


def draining() -> bool:
    """Whether the node of this Ray worker has notice to go (its autoscaler or an operator drains it)."""
    import ray
    from ray._private.state import (
        state,
    )  # Ray tells this nowhere else without a barrier over all workers

    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
