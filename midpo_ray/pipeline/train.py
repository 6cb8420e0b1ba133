"""Training stages on the cluster: a graph of Ray tasks, each recorded as it ends.

All stages are submitted at once. Ray starts what fits, queues the rest (so that an autoscaler
learns of it), and starts the router when the experts that it depends on have ended.
"""

from __future__ import annotations

import contextlib
import logging
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
from .stage import Outcome, StageSpec, launch
from .watch import STOP, Faults

log = logging.getLogger(__name__)

NOTICE = (
    25.0  # seconds after SIGTERM for the workers' last checkpoint: spot machines get 30 or more
)
LOOK = 2.0  # seconds between two checks of the nodes and of the workers' messages


def wait_for_groups(config: Config, stages: Sequence[str]) -> None:
    """Wait until the cluster can hold each stage's group; UserError names what it lacks."""
    groups = [(stage, config.group(stage)) for stage in stages]
    cluster.wait_for(groups, config.cluster.resources_timeout)
    first = [group for stage, group in groups if stage != "router"]
    if len(first) > 1 and cluster.hold(first, cluster.nodes()) is not None:
        names = " and ".join(stage for stage, _ in groups if stage != "router")
        log.info("the cluster cannot hold %s at the same time: they run one after the other", names)


def train(
    config: Config,
    run: Storage,
    steps: Sequence[Step],
    commit: Callable[[str, float], None],
) -> None:
    """Run the stages; ``commit(stage, seconds)`` is called when one is finished.

    Raises:
        UserError: the first failure; what can finish without the failed stage is finished before.
        KeyboardInterrupt: after SIGTERM, when checkpoints are written.
    """
    import ray  # slow to import

    run.delete(STOP)
    running: dict[Any, str] = {}  # task -> stage
    for step in steps:  # in the order of the plan: the router is last
        needed = list(running) if step.stage == "router" else []
        spec = StageSpec(config, step.stage, run.uri, step.digest)
        running[launch(spec, needed)] = step.stage
    failures: dict[str, Exception] = {}
    patience = max(config.cluster.resources_timeout, cluster.RETURN)
    shortages, faults = cluster.Shortages(patience), Faults(run)
    look, end = time.monotonic() + LOOK, math.inf
    with Live(run, [step.stage for step in steps]) as live, on_sigterm() as noticed:
        while running and time.monotonic() < end:
            ready, _ = ray.wait(list(running), timeout=0.5)
            live.update()
            for task in ready:
                stage = running.pop(task)
                try:
                    result = ray.get(task)
                    if result.outcome is Outcome.FINISHED:
                        commit(stage, result.seconds)
                except (ray.exceptions.RayError, UserError) as error:
                    failures.setdefault(stage, as_user_error(error, stage))
            if noticed.is_set() and end == math.inf:
                log.info("stopping: waiting for the last checkpoints")
                run.write(STOP, b"")
                end = time.monotonic() + NOTICE
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK
                for line in faults.new():
                    log.warning(line)
                available = cluster.nodes()
                for task, stage in list(running.items()):
                    if stage == "router" and len(running) > 1:
                        continue  # it waits for its experts
                    try:
                        shortages.check(stage, config.group(stage), available)
                    except UserError as error:
                        failures[stage] = error
                        ray.cancel(task, force=True)
    if noticed.is_set():
        raise KeyboardInterrupt
    if failures:  # in the order in which they happened: a router's is that of its expert
        raise next(iter(failures.values()))


@contextlib.contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM (a spot machine's notice, a stopped job) sets instead of ending us."""
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGTERM, before)


def as_user_error(error: Exception, stage: str) -> UserError:
    """A stage's failure as one line; the run's logs have its traceback."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return cause
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return UserError(
        f"stage {stage} failed: {lines[-1].strip() if lines else type(cause).__name__}"
    )
