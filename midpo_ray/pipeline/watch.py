"""A watchdog beside training: it ends a process that hangs and passes a notice to stop on."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..storage import Storage

FAULTS = "logs/faults"  # one file per rank: what its watchdog reported
STOP = "logs/stop"  # exists while a run is to stop
_CLOCK_INTERVAL = 1.0  # seconds between two checks of the last heartbeat
_NOTICE_INTERVAL = 2.0  # seconds between two questions to the storage and to the cluster
_GRACE = 10.0  # seconds that the report of a hung process may take
_MARK = " hangs: "


class Watchdog:
    """Supervises one process of a training stage, as a context manager around it.

    A thread reports a process without heartbeat and ends it, so that its group restarts. Where that
    thread cannot run, because a hung call holds Python's interpreter lock, ``faulthandler`` ends
    the process a little later, from C.

    Args:
        run: the run directory, for reports.
        stage, rank, node: what the report names.
        timeout: seconds without a heartbeat after which the process is ended.
        notice: the folder whose ``logs/stop`` asks this process to stop; default ``run``.
        owner: a file of the run and the token that this attempt wrote to it. Once a later attempt
            has written another one, this process is ended: it must not write beside its successor.
        leaving: whether this node is about to go.
        end: ends the process.
    """

    def __init__(
        self,
        run: Storage,
        stage: str,
        rank: int,
        node: str,
        timeout: float,
        *,
        notice: Storage | None = None,
        owner: tuple[str, bytes] | None = None,
        leaving: Callable[[], bool] = lambda: False,
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self.run, self.timeout, self.notice = run, timeout, notice or run
        self._name, self._what = f"{FAULTS}/{stage}-{rank}", f"{stage}: rank {rank} on node {node}"
        self._owner, self._leaving, self._end = owner, leaving, end
        self._last = (time.monotonic(), 0, "start")
        self._preempted, self._over = threading.Event(), threading.Event()
        self._backstop: IO[str] | None = None

    def heartbeat(self, step: int, phase: str) -> None:
        """The process is alive and about to do ``phase`` of ``step``."""
        self._last = (time.monotonic(), step, phase)
        if self._backstop:
            wait = self.timeout + _GRACE
            self._backstop.seek(0)
            self._backstop.write(f"{self._line(wait)}\n".ljust(200) + "\n")
            self._backstop.flush()
            faulthandler.dump_traceback_later(wait, exit=True, file=self._backstop)

    def is_preempted(self) -> bool:
        """Whether to write a checkpoint and stop."""
        return self._preempted.is_set()

    def __enter__(self) -> Watchdog:
        if self.run.local:
            path = Path(self.run.path(f"{self._name}.backstop"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._backstop = path.open("w")
        self.heartbeat(0, "start")
        threading.Thread(target=self._check_clock, daemon=True).start()
        threading.Thread(target=self._check_notices, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._backstop:
            faulthandler.cancel_dump_traceback_later()
            self._backstop.close()
            self.run.delete(f"{self._name}.backstop")

    def _line(self, seconds: float) -> str:
        _, step, phase = self._last
        return f"{self._what}{_MARK}step {step}, phase {phase}, for {seconds:.0f} s"

    def _check_clock(self) -> None:
        while not self._over.wait(min(_CLOCK_INTERVAL, self.timeout)):
            silent = time.monotonic() - self._last[0]
            if silent >= self.timeout:
                line = self._line(silent)
                report = threading.Thread(target=self._report, args=(line,), daemon=True)
                report.start()
                report.join(_GRACE)  # the storage may be what hangs
                self._end()
                return

    def _report(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        with tempfile.TemporaryFile("w+") as stacks, contextlib.suppress(Exception):
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            self.run.append(f"{self._name}.log", f"{line}\n{stacks.read()}".encode())

    def _check_notices(self) -> None:
        while not self._over.wait(_NOTICE_INTERVAL):
            with contextlib.suppress(Exception):  # out of reach for a while: asked again
                if self._leaving() or self.notice.exists(STOP):
                    self._preempted.set()
                if self._owner and self.run.read(self._owner[0]) != self._owner[1]:
                    self._end()


class Faults:
    """The driver's side: what the watchdogs reported since the last call, one line each."""

    def __init__(self, run: Storage) -> None:
        self.run = run
        self._seen = {name: len(self._lines(name)) for name in run.names(FAULTS)}

    def _lines(self, name: str) -> list[str]:
        try:
            text = self.run.read(f"{FAULTS}/{name}").decode("utf-8", "replace")
        except FileNotFoundError:  # a stage that has just ended well
            return []
        if "most recent call first" not in text:  # a backstop's that was never needed
            return []
        return [line.strip() for line in text.splitlines() if _MARK in line]

    def new(self) -> list[str]:
        found = []
        for name in self.run.names(FAULTS):
            lines = self._lines(name)
            found += lines[self._seen.get(name, 0) :]
            self._seen[name] = len(lines)
        return found


def is_draining() -> bool:
    """Whether the node of this Ray worker is being drained (by an autoscaler or an operator)."""
    import ray  # here and not above: ``cluster.connect`` sets the environment that it reads
    from ray._private.state import state  # draining nodes are known nowhere else in Ray

    if not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
