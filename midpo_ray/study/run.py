"""``midpo study``: the units of a study, as many at a time as the cluster holds, and then the report.

All that a study knows lies in its units' records, so the same command after a kill of anything goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.prompts import MINIATURE, load_sets
from ..pipeline import cluster
from ..pipeline.lock import run_lock
from ..pipeline.plan import FOLDERS
from ..storage import Storage
from .plan import Plan, Unit, describe, plan
from .spec import Study, load_study
from .work import RECORD, commit, prepare, resolved, work

Say = Callable[[str], None]
EVERY = 15.0  # seconds between lines of progress


def study(
    name: str,
    overrides: list[str] | None = None,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    seeds: list[int] | None = None,
    dry: bool = False,
    say: Say = print,
) -> Storage:
    """Run what is missing of a study; returns its folder, with the report.

    Args:
        name: a shipped study or a YAML file.
        overrides: of its recipe.
        run_dir: default runs/study-NAME.
        seeds: instead of the study's own.
        dry: say what would run, and do nothing.

    Raises:
        UserError: bad input, told in one line before Ray starts; or units that failed, after all others are done.
    """
    from .report import write

    wanted, config = load_study(name, overrides, seeds)
    folder = Storage(run_dir or f"runs/study-{Path(name).stem}")
    if not wanted.sets and config.model.path != MINIATURE:
        raise UserError(
            f"study {name}: sets is empty, and the recipe's model is not {MINIATURE}: name the sets of prompts"
        )
    graph = plan(wanted, config, f"study {name}")
    done = finished(folder, graph)
    todo = graph.missing(done)
    say(
        f"study {folder.uri}: {len(wanted.contenders)} contenders, {len(wanted.seeds)} seed(s); {describe(graph, done)}"
    )
    if dry:
        for unit in todo:
            say(f"  {unit.about}, seed {unit.seed}: {unit.folder}")
        return folder
    failed: dict[str, str] = {}
    if any(u.kind == "answers" for u in todo):
        load_sets(wanted.sets)
    if todo:
        with run_lock(folder):
            session = cluster.connect(address)
            try:
                groups = {f"{u.kind} {u.stage}".strip(): u.group for u in todo}
                cluster.wait_for(list(groups.items()), config.cluster.resources_timeout)
                failed = _Work(folder, graph, todo, wanted, say).through()
            finally:
                if session is not None:
                    cluster.disconnect()
    write(folder, wanted, graph, name)
    if failed:
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of {len(todo)} units failed, the same command tries them again; {first}: {failed[first]}"
        )
    return folder


def finished(folder: Storage, graph: Plan) -> set[str]:
    """Units whose record is there."""
    there = {kind: set(folder.names(kind)) for kind in ("worlds", "trainings", "answers")}
    return {
        u.id
        for u in graph.units.values()
        if u.id in there[u.kind] and folder.exists(f"{u.folder}/{RECORD}")
    }


class _Work:
    """Units in order: each starts when those it needs are done and the cluster holds it beside those that run."""

    def __init__(
        self, folder: Storage, graph: Plan, todo: list[Unit], wanted: Study, say: Say
    ) -> None:
        self.folder, self.graph, self.wanted, self.say = folder, graph, wanted, say
        self.waiting, self.running, self.failed = (
            list(todo),
            dict[Any, tuple[Unit, float]](),
            dict[str, str](),
        )
        self.open = {u.id for u in todo}  # not done yet
        self.broken: set[str] = set()

    def through(self) -> dict[str, str]:
        """Everything; returns what failed and why."""
        import ray

        began, told, ended = time.monotonic(), time.monotonic(), 0
        while self.waiting or self.running:
            self._start()
            if not self.running:
                break
            ready, _ = ray.wait(list(self.running), timeout=1.0)
            for ref in ready:
                ended += 1
                self._end(ref)
            if time.monotonic() - told > EVERY and ended:
                told = time.monotonic()
                left = (told - began) / ended * (len(self.waiting) + len(self.running))
                now = ", ".join(f"{u.about} (seed {u.seed})" for u, _ in self.running.values())
                self.say(
                    f"study: {ended} of {ended + len(self.waiting) + len(self.running)} done; now {now}; about {left:.0f} s left"
                )
        for unit in self.waiting:
            self._fail(unit, "the cluster has no place for it any more")
        return self.failed

    def _start(self) -> None:
        there = cluster.nodes()
        for unit in list(self.waiting):
            if self.broken & set(unit.needs):
                self.waiting.remove(unit)
                self._fail(unit, "what it needs failed")
            elif not self.open & set(unit.needs):
                if (
                    cluster.hold([*(u.group for u, _ in self.running.values()), unit.group], there)
                    is not None
                ):
                    return  # in order: no small unit keeps a large one waiting
                self.waiting.remove(unit)
                try:
                    self.running[self._launch(unit)] = (unit, time.monotonic())
                except UserError as error:
                    self._fail(unit, error)

    def _launch(self, unit: Unit) -> Any:
        import ray

        spec, group, config = unit.spec(self.folder.uri, self.wanted), unit.group, unit.config
        if group.max_workers > 1:
            from ..pipeline.stage import StageSpec, launch

            home = prepare(spec, config, self.folder)
            stage = StageSpec(
                resolved(config, self.folder), unit.stage, home.uri, unit.id, notice=self.folder.uri
            )
            return launch(stage)
        options: dict[str, Any] = {
            "num_cpus": group.cpus_per_worker,
            "num_gpus": group.gpus_per_worker,
        }
        if unit.kind == "worlds":  # its actors take the place that it holds here
            options = {"num_cpus": 0}
        elif group.resources or group.label_selector:
            options |= {"resources": group.resources, "label_selector": group.label_selector}
        return ray.remote(max_retries=config.cluster.max_failures, **options)(work).remote(spec)

    def _end(self, ref: Any) -> None:
        import ray

        from ..pipeline.train import as_user_error

        unit, started = self.running.pop(ref)
        try:
            ray.get(ref)
            if unit.group.max_workers > 1:
                commit(self.folder, unit.spec(self.folder.uri, self.wanted), started)
                (self.folder / unit.folder).delete(f"{FOLDERS[unit.stage]}.work")
            self.open.discard(unit.id)
        except (ray.exceptions.RayError, UserError) as error:
            self._fail(unit, as_user_error(error, unit.about))

    def _fail(self, unit: Unit, fault: object) -> None:
        self.broken.add(unit.id)
        self.failed[f"{unit.about}, seed {unit.seed}"] = str(fault)
        self.say(f"study: {unit.about}, seed {unit.seed} failed: {fault}")
