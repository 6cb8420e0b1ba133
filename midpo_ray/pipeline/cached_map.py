"""A content-addressed cache of values per row, which Ray Data actors fill.

There is one folder per signal. Its ``part-*.parquet`` files hold the rows' keys and the signal's
typed columns. A folder's name must identify everything that the values depend on apart from the row
(model, settings, version), and a row's key identifies the row. A shard is written whole or not at
all, so a killed run is resumed from its shards, and a larger set of rows computes only what is new.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..config import digest
from ..errors import UserError
from ..storage import Storage
from .signals import read_table, write_table

log = logging.getLogger(__name__)

CacheRow = dict[str, Any]  # holds "key"; every column has one Arrow type over all rows
Values = dict[str, Any]  # column -> value of one row in one signal's folder
Compute = Callable[[list[CacheRow]], Sequence[Mapping[str, Values]]]
Split = Callable[[list[CacheRow]], list[list[CacheRow]]]

_CPU_WORKERS = 8  # the most workers without GPUs when their number is not given
_CALLS_PER_WORKER = 16  # at least so many, so that the last ones leave no worker idle for long


@dataclass(frozen=True)
class MapJob:
    """How rows become values.

    ``make(**options)`` loads what is needed, once per worker, and returns a function of a unit of
    rows: for each row its values by signal. Each row has the key ``need``, the signals that the
    cache lacks; only these are read from the result. A signal that is left out is not cached and is
    computed again by the next call.
    """

    name: str  # in progress messages
    make: Callable[..., Compute]
    options: Mapping[str, Any]
    batch: int = 1  # rows per unit, unless ``cached_map`` is given a ``split``
    shard_units: int = 1  # the most units per shard: a killed run loses at most these


@dataclass(frozen=True)
class Pool:
    """Where a job runs: Ray Data actors on a cluster, or this process."""

    address: str | None = None  # as ``pipeline.cluster.connect`` takes it
    workers: int | None = None  # None: one per GPU, or per CPU up to 8; 0: this process, no Ray
    cpus: float = 1.0  # per worker
    gpus: float | None = None  # per worker; None: 1 where the cluster has GPUs, else 0


IN_PROCESS = Pool(workers=0)


def read_cache(folder: Storage) -> dict[str, Values]:
    """All cached values of a signal by key."""
    known: dict[str, Values] = {}
    for name in folder.names():
        if name.startswith("part-") and name.endswith(".parquet"):
            for row in read_table(folder, name).to_pylist():
                known[row.pop("key")] = row
    return known


def cached_map(
    job: MapJob,
    rows: Sequence[CacheRow],
    folders: Mapping[str, Storage],
    pool: Pool = Pool(),
    split: Split | None = None,
) -> dict[str, dict[str, Values]]:
    """Values of all ``rows``; only what the folders lack is computed, in the order of the rows.

    Args:
        folders: signal -> its folder of shards.
        pool: nothing is started when everything is cached.
        split: cuts the rows that lack a signal into units, each one call of the job's function.

    Returns:
        signal -> key -> column -> value, of everything in the folders.

    Raises:
        UserError: raised by the job, in whichever process; finished shards are kept.
    """
    known = {signal: read_cache(folder) for signal, folder in folders.items()}
    distinct = {row["key"]: row for row in rows}
    lacking = []
    for key, row in distinct.items():
        need = [signal for signal, values in known.items() if key not in values]
        if need:
            lacking.append({**row, "need": need})
    for signal in folders:
        name = job.name if len(folders) == 1 else f"{job.name}: {signal}"
        todo = sum(signal in row["need"] for row in lacking)
        log.info("%s: %d of %d cached, %d to do", name, len(distinct) - todo, len(distinct), todo)
    if not lacking:
        return known
    units = split(lacking) if split else _chunks(lacking, job.batch)
    if pool.workers == 0:
        worker = _Worker(job, {s: f.uri for s, f in folders.items()}, None)
        for call in _calls(job, units, workers=1):
            worker.run(call)
    else:
        _on_ray(job, units, folders, pool)
    return {signal: read_cache(folder) for signal, folder in folders.items()}


@contextmanager
def own_cluster() -> Iterator[None]:
    """Shut the Ray cluster down at the end if it was started inside; a caller's cluster is kept."""

    def running() -> bool:
        return "ray" in sys.modules and sys.modules["ray"].is_initialized()

    before = running()
    try:
        yield
    finally:
        if running() and not before:
            sys.modules["ray"].shutdown()


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table with the columns of all rows; what a row lacks is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _chunks(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _calls(job: MapJob, units: list[list[CacheRow]], workers: int) -> list[pa.Table]:
    """The rows of several units per call, one shard per signal; all tables have one schema."""
    fewest_calls = workers * _CALLS_PER_WORKER
    per_call = max(1, min(job.shard_units, len(units) // fewest_calls))
    table = table_of([{**row, "unit": i} for i, unit in enumerate(units) for row in unit])
    calls, start = [], 0
    for part in _chunks(units, per_call):
        size = sum(map(len, part))
        calls.append(table.slice(start, size))
        start += size
    return calls


def _on_ray(
    job: MapJob, units: list[list[CacheRow]], folders: Mapping[str, Storage], pool: Pool
) -> None:
    from . import cluster  # Ray is slow to import: only where it is used

    cluster.connect(pool.address)
    import ray

    workers, gpus = _size(job, pool, ray.cluster_resources(), len(units))
    calls = _calls(job, units, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised below
    outcomes = ray.data.from_arrow(calls).map_batches(
        _Worker,
        fn_constructor_args=(job, {s: f.uri for s, f in folders.items()}, max(1, int(pool.cpus))),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=pool.cpus,
        num_gpus=gpus,
    )
    total, done = sum(map(len, units)), 0
    for outcome in outcomes.iter_batches(batch_size=None):
        for fault in filter(None, outcome["fault"]):
            raise UserError(str(fault))
        quarter = 4 * done // total
        done += int(outcome["rows"].sum())
        if 4 * done // total > quarter:
            log.info("%s: %d of %d on %d worker(s)", job.name, done, total, workers)


def _size(job: MapJob, pool: Pool, resources: Mapping[str, float], units: int) -> tuple[int, float]:
    """The number of workers and the GPUs of each: as many workers as there is work and room for."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = pool.gpus
    if each is None:
        each = 1.0 if gpus >= 1 else 0.0
    room = gpus / each if each else cpus / pool.cpus
    if room < 1:
        raise UserError(
            f"{job.name}: a worker needs {pool.cpus:g} CPU and {each:g} GPU, "
            f"but the cluster has {cpus:g} CPU and {gpus:g} GPU"
        )
    most = room if each else min(room, _CPU_WORKERS)
    if pool.workers is not None:
        most = min(room, pool.workers)
    return max(1, min(int(most), units)), each


class _Worker:
    """The Ray Data actor: the rows of one call in, one shard per signal written.

    A UserError is returned as text: raised, it would reach the driver wrapped in Ray's own errors.
    """

    def __init__(self, job: MapJob, folders: Mapping[str, str], threads: int | None) -> None:
        self._job, self._threads = job, threads
        self._folders = {signal: Storage(uri) for signal, uri in folders.items()}
        self._compute: Compute | None = None

    def __call__(self, call: pa.Table) -> pa.Table:
        fault = ""
        try:
            self.run(call)
        except UserError as error:
            fault = str(error)
        return pa.table({"fault": [fault], "rows": [len(call)]})

    def run(self, call: pa.Table) -> None:
        if self._compute is None:  # not in __init__: Ray would restart the actor on its errors
            self._compute = self._load()
        units: dict[int, list[CacheRow]] = {}
        for row in call.to_pylist():
            units.setdefault(row.pop("unit"), []).append(row)
        shards: dict[str, list[Values]] = {signal: [] for signal in self._folders}
        for unit in units.values():
            for row, values in zip(unit, self._compute(unit), strict=True):
                for signal in row["need"]:
                    if signal in values:
                        shards[signal].append({"key": row["key"], **values[signal]})
        for signal, shard in shards.items():
            if shard:
                name = f"part-{digest([row['key'] for row in shard])}.parquet"
                write_table(self._folders[signal], name, table_of(shard))

    def _load(self) -> Compute:
        if self._threads is not None:  # one of several actors on a machine
            import torch  # slow to import, and the driver may not need it

            torch.set_num_threads(self._threads)
            os.environ["OMP_NUM_THREADS"] = str(self._threads)
        return self._job.make(**self._job.options)
