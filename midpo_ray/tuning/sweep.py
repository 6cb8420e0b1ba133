"""``midpo tune``: score once, then run the trials of a space on Ray Tune, then write the report.

The numbers of a trial depend on its configuration and seed alone. Which trials are stopped early is
decided by Tune's scheduler, as they arrive.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, digest
from ..errors import UserError
from ..pipeline import cluster
from ..pipeline.lock import run_lock
from ..pipeline.manifest import Manifest
from ..pipeline.plan import fingerprints
from ..pipeline.prepare import check_router_target, resolve
from ..pipeline.run import cache_folder, run
from ..pipeline.watch import STOP
from ..storage import Storage
from .report import write_sweep_report
from .space import Space, fix, known_points, load_space

if TYPE_CHECKING:
    from .trial import SweepSettings

# Ray and what imports it (``search``, ``trial``) are imported after ``cluster.connect`` has set the
# environment that Ray reads.

log = logging.getLogger(__name__)

STATE = "sweep.json"
_NOTICE = 25.0  # seconds after SIGTERM for the last checkpoints
_FREE = {"about", "samples", "seeds", "select", "concurrency"}  # may change between two commands


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
) -> Storage:
    """Run what is missing of a sweep; the same command resumes one that was interrupted.

    Args:
        path: the space's file.
        config: the recipe; ``recipe`` is how it was named, for the provenance.
        run_dir: default runs/<recipe>-tune-<space>.
        samples, seeds, select: instead of the space's own.
        add_samples: how many points a finished sweep gets in addition.

    Returns:
        The sweep's folder, with results.parquet, results.csv, report.html and best.yaml.

    Raises:
        UserError: bad input, before Ray starts; or no trial was finished.
        KeyboardInterrupt: after SIGTERM or SIGINT, when checkpoints are written.
    """
    space = load_space(path, {"samples": samples, "seeds": seeds, "select": select})
    fixed, name = fix(config, space, path), Path(path).stem
    folder = Storage(run_dir or f"runs/{config.name}-tune-{name}")
    Manifest(folder).refuse_other(config)
    parts = fingerprints(fixed)
    is_router = "router" in space.stages
    if is_router:
        check_router_target(fixed)
    inputs = ("score", "safety", "helpfulness") if is_router else ("score",)
    key = digest([parts[stage] for stage in inputs], fixed.deepspeed)
    methods = (fixed.lora, fixed.experts, fixed.router)
    identity = digest(key, *methods, space.model_dump(exclude=_FREE))
    state: dict[str, Any] = {"of": identity, "samples": 0, "finished": None}
    if folder.exists(STATE):
        state = json.loads(folder.read(STATE))
    if state["of"] != identity:
        raise UserError(f"{folder.uri}: holds a sweep of another space or recipe: name --run-dir")
    all_points = known_points(space, None, config.seed) if space.search == "grid" else None
    count = max(state["samples"], space.samples or len(all_points or ()))
    if state["finished"]:
        count += add_samples
    if all_points is not None:
        count = min(count, len(all_points))
    if state["finished"] != [count, space.seeds]:
        with run_lock(folder):
            session = cluster.connect(address)
            try:
                _check_names(space, config.seed)
                run(fixed, address, run_dir=folder.uri, until="dual" if is_router else "score")
                state |= {"samples": count, "finished": None}
                folder.write(STATE, json.dumps(state).encode())
                trained = resolve(fixed, cache_folder(config, folder))
                state["rows"] = _run_trials(space, trained, folder, key, count)
            finally:
                if session is not None:
                    cluster.disconnect()
            state["finished"] = [count, space.seeds]
            folder.write(STATE, json.dumps(state).encode())
    command = f"midpo tune {path} --recipe {recipe}"
    write_sweep_report(folder, space, fixed, state["rows"], name, command)
    return folder


def _check_names(space: Space, seed: int) -> None:
    """Scheduler and searcher are made once before anything is computed or written."""
    from .search import make_scheduler, make_searcher

    make_scheduler(space)
    make_searcher(space, seed)


def _run_trials(
    space: Space, config: Config, folder: Storage, key: str, count: int
) -> list[dict[str, Any]]:
    """All trials, and one row per trial: point, seed, values, state, share, curve, error."""
    from ray import tune as ray_tune

    from .trial import SweepSettings

    groups = [(stage, config.group(stage)) for stage in space.stages]
    cluster.wait_for(groups, config.cluster.resources_timeout)
    together = cluster.hold([group for _, group in groups], cluster.nodes()) is None
    if not together:
        log.info(
            "the cluster cannot hold both experts at the same time: a trial trains them in turn"
        )
    settings = SweepSettings(space, config, folder.uri, key, uuid.uuid4().hex, together)
    points = known_points(space, count, config.seed)
    if points is None:
        drawn = {name: key.domain() for name, key in space.space.items()}
        searched: Any = {"point": drawn, "seed": 0}
    else:
        searched = ray_tune.grid_search([{"point": point, "seed": 0} for point in points])
    rows = _experiment(settings, f"points-{count}", searched, count, is_search=True)
    if points is not None:
        rows.sort(key=lambda row: points.index(row["values"]))
    for number, row in enumerate(rows):
        row["point"] = number
    ended = [row for row in rows if row["state"] == "finished"]
    again = [(row["values"], seed) for row in ended for seed in range(1, space.seeds)]
    if space.points and rows[0]["state"] == "stopped":  # what all others are compared with
        again = [(rows[0]["values"], seed) for seed in range(space.seeds)] + again
    if again:
        trials = [{"point": point, "seed": seed} for point, seed in again]
        name = f"seeds-{digest(trials)[:12]}"
        more = _experiment(settings, name, ray_tune.grid_search(trials), len(trials))
        numbers = [row["values"] for row in rows]
        for row in more:
            row["point"] = numbers.index(row["values"])
        redone = {(row["point"], row["seed"]) for row in more}
        rows = [row for row in rows if (row["point"], row["seed"]) not in redone] + more
    for name in folder.names("trials"):  # records stay, so that a longer sweep repeats no trial
        for part in ("experts", "router.work", "dual"):
            folder.delete(f"trials/{name}/{part}")
    return sorted(rows, key=lambda row: (row["point"], row["seed"]))


def _experiment(
    settings: SweepSettings, name: str, searched: Any, count: int, is_search: bool = False
) -> list[dict[str, Any]]:
    """Run one experiment of Tune, or resume it; its results in the order of its trials."""
    os.environ.update({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"})
    from ray import tune as ray_tune
    from ray.tune.logger import JsonLoggerCallback

    from .search import Progress, make_scheduler, make_searcher
    from .trial import run_trial

    space, folder = settings.space, Storage(settings.folder)
    path = f"{(folder / 'tune').uri}/{name}"
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, settings=settings), settings.placement()
    )
    if ray_tune.Tuner.can_restore(path):
        tuner = ray_tune.Tuner.restore(path, trainable, restart_errored=True)
    else:
        limit = space.concurrency if isinstance(space.concurrency, int) else None
        tuner = ray_tune.Tuner(
            trainable,
            param_space={"trial": searched},
            tune_config=ray_tune.TuneConfig(
                search_alg=make_searcher(space, settings.config.seed) if is_search else None,
                scheduler=make_scheduler(space) if is_search else None,
                num_samples=count if isinstance(searched, dict) and "point" in searched else 1,
                max_concurrent_trials=limit,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name=name,
                storage_path=(folder / "tune").uri,
                failure_config=ray_tune.FailureConfig(settings.config.cluster.max_failures),
                checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=2),
                callbacks=[JsonLoggerCallback(), Progress(list(space.metrics), count)],
                verbose=0,
            ),
        )
    folder.delete(STOP)
    with _notice(folder):
        results = tuner.fit()
    if results.num_terminated + results.num_errors < count:
        raise KeyboardInterrupt
    return [_row(results[number], space) for number in range(len(results))]


def _row(result: Any, space: Space) -> dict[str, Any]:
    trial, table = result.config["trial"], result.metrics_dataframe
    names = [name for name in (result.metrics or {}) if name.partition(".")[0] in space.stages]
    shares, curve = [], []
    if table is not None and len(table):
        table = table.drop_duplicates("percent", keep="last")
        shares = (table["percent"] / 100).tolist()
        curve = table[names].to_dict("records")
    if result.error is not None:
        state = "failed"
    else:
        state = "finished" if shares and shares[-1] == 1.0 else "stopped"
    error = str(getattr(result.error, "cause", None) or result.error or "").strip().splitlines()
    return {
        "seed": trial["seed"],
        "values": space.active(trial["point"]),
        "state": state,
        "shares": shares,
        "curve": curve,
        "error": error[-1] if error else "",
    }


@contextlib.contextmanager
def _notice(folder: Storage) -> Iterator[None]:
    """After SIGTERM the workers are asked for a last checkpoint; then Tune saves its state."""

    def stop(*_: object) -> None:
        log.info("stopping: waiting for the last checkpoints")
        folder.write(STOP, b"")
        timer = threading.Timer(_NOTICE, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
