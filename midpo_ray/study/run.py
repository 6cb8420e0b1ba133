"""``midpo study``: the missing units of a study as Ray tasks, then the report.

A unit is a task whose arguments are the references of the units that it needs. Ray starts what
fits, and queues the rest, so that an autoscaler learns of it. What is finished has a record, so the
same command resumes a study after a kill.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.prompts import MINIATURE, load_sets
from ..pipeline import cluster
from ..pipeline.lock import run_lock
from ..pipeline.prepare import check_router_target
from ..pipeline.train import LOOK, NOTICE, as_user_error, on_sigterm
from ..pipeline.watch import STOP, Faults
from ..storage import Storage
from .plan import StudyUnit, plan_study
from .report import write_study_report
from .spec import Study, load_study
from .work import Preempted, run_unit, scores_alone

log = logging.getLogger(__name__)
_PROGRESS = 15.0  # seconds between two lines of progress


def study(
    name: str,
    overrides: list[str] | None = None,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    seeds: list[int] | None = None,
    dry: bool = False,
) -> Storage:
    """Run what is missing of a study; returns its folder, with the report.

    Args:
        name: a shipped study or a YAML file.
        overrides: of its recipe.
        address: of a Ray cluster, as ``pipeline.cluster.connect`` takes it.
        run_dir: default runs/study-NAME.
        seeds: instead of the study's own.
        dry: only log what would run.

    Raises:
        UserError: bad input, before Ray starts; or units that failed, after all others have ended.
    """
    wanted, config = load_study(name, overrides, seeds)
    folder = Storage(run_dir or f"runs/study-{Path(name).stem}")
    if not wanted.sets and config.model.path != MINIATURE:
        raise UserError(
            f"study {name}: sets is empty, and the recipe's model is not {MINIATURE}: "
            "name the sets of prompts"
        )
    plan = plan_study(wanted, config, f"study {name}")
    finished = plan.finished(folder)
    todo = plan.missing(finished)
    systems, count = len(wanted.contenders), len(wanted.seeds)
    log.info("study %s: %d systems, %d seed(s)", folder.uri, systems, count)
    log.info("%s", plan.describe(finished))
    if dry:
        for unit in todo:
            log.info("  %s, seed %d: %s", unit.about, unit.seed, unit.folder)
        return folder
    for unit in todo:
        if unit.stage == "router":
            check_router_target(unit.config)
    if any(unit.kind == "answers" for unit in todo):
        load_sets(wanted.sets)
    failed: dict[str, UserError] = {}
    if todo:
        with run_lock(folder):
            session = cluster.connect(address)
            try:
                groups = {f"{u.kind} {u.stage}".strip(): u.group for u in todo}
                timeout = config.cluster.resources_timeout
                cluster.wait_for(list(groups.items()), timeout)
                failed = run_units(todo, wanted, folder, timeout)
            finally:
                if session is not None:
                    cluster.disconnect()
    write_study_report(folder, wanted, plan, name)
    if failed:
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of {len(todo)} units failed; the same command tries them again. "
            f"{first}: {failed[first]}"
        )
    return folder


def run_units(
    todo: Sequence[StudyUnit],
    study: Study,
    folder: Storage,
    timeout: float,
    function: Callable[..., Any] = run_unit,
) -> dict[str, UserError]:
    """Run the units, each after those that it needs.

    Args:
        timeout: ``cluster.resources_timeout``: how long a unit may lack nodes for its group, where
            that is more than ``cluster.RETURN``.

    Returns:
        What failed, by description.

    Raises:
        KeyboardInterrupt: after SIGTERM, when the trainings have written their checkpoints.
    """
    import ray  # slow to import

    folder.delete(STOP)
    references: dict[str, Any] = {}
    for unit in todo:
        needs = [references[name] for name in unit.needs if name in references]
        task = ray.remote(**_options(unit))(function)
        references[unit.id] = task.remote(unit, study, folder.uri, *needs)
    running = {reference: unit for unit, reference in zip(todo, references.values(), strict=True)}
    faults = {unit.id: Faults(folder / unit.folder) for unit in todo if unit.stage}
    failed: dict[str, UserError] = {}
    shortages = cluster.Shortages(max(timeout, cluster.RETURN))
    look = shown = time.monotonic()
    end = math.inf
    with on_sigterm() as noticed:
        while running and time.monotonic() < end:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in ready:
                unit = running.pop(reference)
                try:
                    ray.get(reference)
                except (ray.exceptions.RayError, UserError) as error:
                    _fail(unit, as_user_error(error, unit.about), failed)
            if noticed.is_set() and end == math.inf:
                log.info("stopping: waiting for the last checkpoints")
                folder.write(STOP, b"")
                end = time.monotonic() + NOTICE
            if time.monotonic() - look > LOOK:
                look = time.monotonic()
                for reference in _lacking(running, shortages, failed):
                    ray.cancel(reference, force=True)
                    del running[reference]
            if time.monotonic() - shown > _PROGRESS:
                shown = time.monotonic()
                for unit in (u for u in running.values() if u.stage):
                    for line in faults[unit.id].new():
                        log.warning("%s", line)
                log.info("study: %d of %d units have ended", len(todo) - len(running), len(todo))
    if noticed.is_set():
        raise KeyboardInterrupt
    return failed


def _options(unit: StudyUnit) -> dict[str, Any]:
    """Options of the unit's task. One whose workers are placed by themselves takes no resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    retries = {
        "max_retries": unit.config.cluster.max_failures,
        "retry_exceptions": [Preempted],
    }
    own_workers = unit.kind == "scores" and not scores_alone(unit)
    if own_workers or unit.group.max_workers > 1:
        here = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        return {**retries, "num_cpus": 0, "scheduling_strategy": strategy}
    group = unit.group
    options = {**retries, "num_cpus": group.cpus_per_worker, "num_gpus": group.gpus_per_worker}
    if group.resources:
        options["resources"] = group.resources
    if group.label_selector:
        options["label_selector"] = group.label_selector
    return options


def _lacking(
    running: dict[Any, StudyUnit], shortages: cluster.Shortages, failed: dict[str, UserError]
) -> list[Any]:
    """Tasks for whose groups the cluster has lacked nodes for too long; they count as failed."""
    available = cluster.nodes()
    waiting = {unit.id for unit in running.values()}
    found = []
    for reference, unit in running.items():
        if waiting.isdisjoint(unit.needs):
            try:
                shortages.check(f"{unit.about}, seed {unit.seed}", unit.group, available)
            except UserError as error:
                _fail(unit, error, failed)
                found.append(reference)
    return found


def _fail(unit: StudyUnit, error: UserError, failed: dict[str, UserError]) -> None:
    name = f"{unit.about}, seed {unit.seed}"
    failed[name] = error
    log.error("study: %s failed: %s", name, error)
