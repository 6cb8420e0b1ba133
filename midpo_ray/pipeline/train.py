"""Training stages on the cluster: those that fit start together, each is recorded as it ends, a notice to stop is passed on."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..config import Config
from ..errors import UserError
from ..storage import Storage
from . import cluster
from .live import Live
from .plan import Step
from .stages import launch, stage_spec
from .watch import STOP, Faults

NOTICE = 25.0  # seconds between SIGTERM and the end, for the workers' last checkpoint: spot machines get 30 and more
LOOK = 2.0  # seconds between looks at the nodes and at the workers' last words


def held_together(
    config: Config, stages: Sequence[str], what: str, say: Callable[[str], None]
) -> bool:
    """Wait for, or refuse at once, what the cluster lacks for each stage; whether all but the router fit at the same time."""
    cluster.wait_for([(s, config.group(s)) for s in stages], config.cluster.resources_timeout, say)
    first = [s for s in stages if s != "router"]
    together = cluster.hold([config.group(s) for s in first], cluster.nodes()) is None
    if len(first) == 2 and not together:
        say(f"the cluster cannot hold both {what} at the same time: they run one after the other")
    return together


def train(
    config: Config,
    run: Storage,
    steps: Sequence[Step],
    together: bool,
    commit: Callable[[str, float], None],
    say: Callable[[str], None],
) -> None:
    """Launch the stages, in turn unless they fit ``together``, the router behind all others; ``commit(stage, seconds)`` each.

    A stage's failure does not disturb the others: what can finish does, and is kept, before the failure is told.
    """
    import ray

    waiting, digests = [s.stage for s in steps], {s.stage: s.digest for s in steps}
    running: dict[Any, str] = {}
    failures: list[Exception] = []
    run.delete(STOP)
    patience, faults = cluster.Patience(config.cluster.resources_timeout, say), Faults(run)
    look, end = time.monotonic() + LOOK, math.inf

    def may_start(stage: str) -> bool:
        """At once, or in turn; the router is queued behind the others as soon as they run, and not behind a failure."""
        return not failures if stage == "router" else together or not running

    with Live(run, waiting, say) as live, _on_sigterm() as noticed:
        while (waiting or running) and time.monotonic() < end:
            while waiting and not noticed.is_set() and may_start(waiting[0]):
                stage = waiting.pop(0)
                depends = [ref for ref in running if stage == "router" or not together]
                running[launch(stage_spec(config, stage, run, digests[stage]), depends)] = stage
            if not running:
                break
            ready, _ = ray.wait(list(running), timeout=0.5)
            live.update()
            for ref in ready:
                stage = running.pop(ref)
                try:
                    outcome = ray.get(ref)
                    if "stopped" not in outcome:
                        commit(stage, outcome["seconds"])
                except (ray.exceptions.RayError, UserError) as error:
                    failures.append(told(error, stage))
            if noticed.is_set() and end == math.inf:
                say("told to stop: waiting for a last checkpoint")
                run.write(STOP, b"")
                end = time.monotonic() + NOTICE
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK
                for line in faults.new():
                    say(line)
                there = cluster.nodes()
                for ref, stage in list(running.items()):
                    busy = (
                        stage != "router" or len(running) == 1
                    )  # it may be queued behind the experts
                    if busy and (lack := patience.over(stage, config.group(stage), there)):
                        ray.cancel(ref, force=True)
                        del running[ref]
                        failures.append(lack)
    if noticed.is_set():
        raise KeyboardInterrupt
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _on_sigterm() -> Iterator[threading.Event]:
    """Set when SIGTERM comes (a spot machine's notice, a stopped job) instead of dying at once."""
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGTERM, before)


def told(error: Exception, stage: str) -> UserError:
    """A stage's failure as one line; the whole story is in the run's logs."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return cause
    last = [line for line in str(cause).splitlines() if line.strip()]
    return UserError(
        f"stage {stage} failed: {last[-1].strip() if last else cause.__class__.__name__}"
    )
