"""``midpo tune``: score once, then run trials on Ray Tune until every point of the space is judged; then the report.

All that a sweep knows lies in its trials' records. What runs next, what is stopped and what wins are functions of them: so the
same command after a kill of anything goes on where it was, and ends with the table that it would have had without.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config, digest
from ..errors import UserError
from ..pipeline import cluster
from ..pipeline.lock import run_lock
from ..pipeline.manifest import Manifest
from ..pipeline.plan import fingerprints
from ..pipeline.run import cache_folder, run
from ..storage import Storage
from .rungs import Verdict, judge
from .space import Optuna, Point, Space, at, fix, grid, load_space, random
from .trial import group_of, read_record, stop_order, trial

Say = Callable[[str], None]
STATE = "sweep.json"
EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class Unit:
    """One training: a point with one seed."""

    point: int
    seed: int
    config: Config
    id: str  # of all that it depends on


@dataclass
class Sweep:
    """What is known of a sweep, and what follows from it. No Ray here."""

    space: Space
    config: Config  # with the space's ``set``, and built-in names made files
    run: Storage
    key: str  # digest of all that trials share
    samples: int
    points: list[Point] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    units: dict[tuple[int, int], Unit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rungs = self.space.scheduler.rungs()
        self.optuna = (
            Optuna(self.space, self.config.seed) if self.space.search == "optuna" else None
        )
        self.grid = grid(self.space) if self.space.search == "grid" else None

    def unit(self, point: int, seed: int = 0) -> Unit:
        if (point, seed) not in self.units:
            config = at(self.config, self.space, self.points[point], f"point {point}")
            config = config.model_copy(
                update={"training_seed": self.config.seed_of_training + seed}
            )
            trained = (
                config.lora,
                config.router if "router" in self.space.stages else config.experts,
            )
            unit = Unit(point, seed, config, digest(self.key, *trained, config.training_seed))
            self.units[point, seed] = unit
            self.records[unit.id] = read_record(self.run, unit.id) or {}
        return self.units[point, seed]

    def curve(self, unit: Unit) -> list[dict[str, float]]:
        """Its metrics at each rung so far."""
        rungs = self.records[unit.id].get("rungs", {})
        return [rungs[str(r)] for r in self.rungs if str(r) in rungs]

    def verdicts(self) -> list[Verdict]:
        """Of the points so far, by their first seed."""
        units = [self.unit(p) for p in range(len(self.points))]
        failed = ["failed" in self.records[u.id] for u in units]
        reduction = self.space.scheduler.reduction
        return judge(
            [self.curve(u) for u in units], failed, len(self.rungs), reduction, self.space.metrics
        )

    def todo(self) -> list[Unit]:
        """What may run now, in order: points that are not judged, then the other seeds of those that were not stopped."""
        while len(self.points) < self.samples and (point := self._next_point()) is not None:
            self.points.append(point)
        units = []
        for seed in range(self.space.seeds):
            wanted = ("finished",) if seed else ("waiting", "undecided")
            for number, verdict in enumerate(self.verdicts()):
                unit = self.unit(number, seed)
                ended = (
                    len(self.curve(unit)) == len(self.rungs) or "failed" in self.records[unit.id]
                )
                if verdict.state in wanted and not ended:
                    units.append(unit)
        return units

    def _next_point(self) -> Point | None:
        """None: not known yet. Optuna draws a point when all but the ``concurrency`` before it are judged, from those alone."""
        number = len(self.points)
        if number < len(self.space.points):
            return dict(self.space.points[number])
        if self.grid is not None:
            return self.grid[number]
        if self.optuna is None:
            return random(self.space, self.config.seed, number)
        assert isinstance(self.space.concurrency, int)
        known = self.verdicts()[: max(0, number + 1 - self.space.concurrency)]
        if any(v.state in ("waiting", "undecided") for v in known):
            return None
        for i, verdict in enumerate(known):
            last = (
                self.curve(self.unit(i))[: verdict.rungs][-1:] if verdict.state != "failed" else []
            )
            self.optuna.tell(i, [values[m] for values in last for m in self.space.metrics] or None)
        return self.optuna.ask(number)


def tune(
    path: str,
    config: Config,
    recipe: str,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    samples: int | None = None,
    add_samples: int = 0,
    seeds: int | None = None,
    select: str | None = None,
    say: Say = print,
) -> Storage:
    """Run what is missing of a sweep; returns its folder, with results.parquet, results.csv, report.html and best.yaml.

    Args:
        path: the space's file.
        config: the recipe; ``recipe`` is what it was called by, for the provenance.
        run_dir: default runs/<recipe>-tune-<space>.
        samples, seeds, select: instead of the space's own.
        add_samples: so many more points than a finished sweep has; one that is not finished goes on as it was.

    Raises:
        UserError: bad input, told in one line before Ray starts; no trial came to its end; or the sweep was interrupted.
    """
    from ..pipeline.prepare import resolve
    from .report import write

    space = load_space(path, {"samples": samples, "seeds": seeds, "select": select})
    fixed, name = fix(config, space, path), Path(path).stem
    folder = Storage(run_dir or f"runs/{config.name}-tune-{name}")
    Manifest(folder).refuse_other(config)
    parts, until = fingerprints(fixed), "dual" if "router" in space.stages else "score"
    key = digest(
        [parts[s] for s in (("score", "safety", "helpfulness") if until == "dual" else ("score",))],
        fixed.deepspeed,
    )
    free = {
        "about",
        "samples",
        "seeds",
        "select",
        *(() if space.search == "optuna" else ("concurrency",)),
    }
    identity = digest(key, fixed.lora, fixed.experts, fixed.router, space.model_dump(exclude=free))
    known: dict[str, Any] = (
        json.loads(folder.read(STATE)) if folder.exists(STATE) else {"of": identity, "samples": 0}
    )
    if known["of"] != identity:
        raise UserError(
            f"{folder.uri}: holds a sweep of another space or recipe; name another --run-dir"
        )

    count = max(known["samples"], space.samples or len(grid(space)))
    if space.search == "grid":
        count = min(count, len(grid(space)))
    sweep = Sweep(space, resolve(fixed, cache_folder(config, folder)), folder, key, count)
    if add_samples and known["samples"] and not sweep.todo():
        sweep.samples += add_samples
    if sweep.grid is not None:
        sweep.samples = min(sweep.samples, len(sweep.grid))
    state = json.dumps({"of": identity, "samples": sweep.samples}).encode()
    if todo := sweep.todo():
        say(
            f"sweep {folder.uri}: {sweep.samples} points, {len(todo)} trials to run or to go on with"
        )
        with run_lock(folder):
            session = cluster.connect(address)
            try:
                run(fixed, address, run_dir=folder.uri, until=until)
                folder.write(STATE, state)  # nothing is written before the data is read
                _run_trials(sweep, say)
            finally:
                if session is not None:
                    cluster.disconnect()
    write(sweep, fixed, name, f"midpo tune {path} --recipe {recipe}", say)
    return folder


def _run_trials(sweep: Sweep, say: Say) -> None:
    """Ray Tune over what is to do."""
    os.environ.update({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"})
    from ray import tune as ray_tune

    group = group_of(sweep.config, list(sweep.space.stages))
    cluster.wait_for([("a trial", group)], sweep.config.cluster.resources_timeout)
    slots, nodes = 1, cluster.nodes()
    while cluster.hold([group] * (slots + 1), nodes) is None:
        slots += 1
    limit = sweep.space.concurrency if isinstance(sweep.space.concurrency, int) else None
    # A trial of one worker holds its resources itself, and the next waits in line for a warm process. A larger group's workers
    # are placed all together or not at all, and no more trials start than the cluster holds groups: none can wait for another.
    # The trial itself then stays on the head and takes nothing there: a sliver of a one-CPU node would keep a worker out.
    in_place = group.min_workers == 1
    bundle = cluster.bundle(group) if in_place else {"node:__internal_head__": 0.001}
    selector = (
        {"bundle_label_selector": [dict(group.label_selector)]}
        if in_place and group.label_selector
        else {}
    )
    order, stop = _tune_parts(sweep, group.min_workers, min(slots, limit or slots), say)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, ray_tune.PlacementGroupFactory([bundle], **selector)),
        tune_config=ray_tune.TuneConfig(
            search_alg=order,
            scheduler=stop,
            num_samples=1 << 30,  # the order ends it
            max_concurrent_trials=limit if in_place else min(slots, limit or slots),
            reuse_actors=in_place,
            trial_name_creator=lambda t: t.trial_id,
            trial_dirname_creator=lambda t: t.trial_id,
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=(sweep.run / "logs").uri, verbose=0
        ),
    )
    errors = tuner.fit().errors
    if left := sweep.todo():
        cause = f"; the last error: {str(errors[-1]).strip().splitlines()[-1]}" if errors else ""
        raise UserError(
            f"the sweep ended with {len(left)} trials to run, the same command goes on{cause}"
        )


def _tune_parts(sweep: Sweep, workers: int, slots: int, say: Say) -> tuple[Any, Any]:
    """Tune's searcher, which gives it the next trial, and Tune's scheduler, which takes what trials tell and stops them.

    A trial whose process or node died comes again, from its checkpoint, until it died ``cluster.max_failures`` times more.
    """
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    running: dict[str, Unit] = {}
    deaths: dict[str, int] = {}
    began, ended, told = time.monotonic(), 0, 0.0

    class Order(Searcher):
        def suggest(self, trial_id: str) -> Any:
            busy = {u.id for u in running.values()}
            free = (
                u
                for u in sweep.todo()
                if u.id not in busy and deaths.get(u.id, 0) <= sweep.config.cluster.max_failures
            )
            if (unit := next(free, None)) is None:
                return None if busy else self.FINISHED
            running[trial_id] = unit
            sweep.run.delete(stop_order(unit.id))
            spec = {
                "config": unit.config.model_dump(mode="json"),
                "stages": list(sweep.space.stages),
                "rungs": list(sweep.rungs),
            }
            return {
                **spec,
                "id": unit.id,
                "workers": workers,
                "run": sweep.run.uri,
                "asked": time.time(),
            }

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            nonlocal ended
            unit, ended = running.pop(trial_id), ended + 1
            deaths[unit.id] = deaths.get(unit.id, 0) + error
            if not error:
                for name in (
                    *(f"trials/{unit.id}/{s}" for s in sweep.space.stages),
                    stop_order(unit.id),
                ):
                    sweep.run.delete(name)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the records are the sweep's memory."""

    class Stop(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            nonlocal told
            unit = running[trial.trial_id]
            sweep.records[unit.id] = read_record(sweep.run, unit.id) or {}
            todo = sweep.todo()
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                line, a_trial = (
                    progress(sweep, min(slots, len(running))),
                    (told - began) / max(1, ended),
                )
                say(
                    f"{line}; about {a_trial * (len(todo) + sweep.samples - len(sweep.points)):.0f} s left"
                )
            if unit.id in {u.id for u in todo}:
                return self.CONTINUE
            if workers == 1:
                return self.STOP
            sweep.run.write(stop_order(unit.id), b"")
            return self.CONTINUE

    return Order(), Stop()


def progress(sweep: Sweep, running: int) -> str:
    """One line: how far the sweep is, and the best of each metric so far."""
    verdicts = sweep.verdicts()
    count = {s: sum(v.state == s for v in verdicts) for s in ("finished", "stopped", "failed")}
    parts = [f"{running} running", *(f"{n} {s}" for s, n in count.items() if n or s != "failed")]
    ends = [
        (i, sweep.curve(sweep.unit(i))[-1]) for i, v in enumerate(verdicts) if v.state == "finished"
    ]
    for metric, direction in sweep.space.metrics.items() if ends else ():
        number, best = (max if direction == "max" else min)(ends, key=lambda e: e[1][metric])
        parts.append(f"best {metric} {best[metric]:.4g} (point {number})")
    return f"sweep: {', '.join(parts)}"
