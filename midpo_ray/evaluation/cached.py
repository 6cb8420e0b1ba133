"""Work on rows that is done once: what the cache lacks is computed by Ray Data actors, each shard written whole or not at all.

A killed run goes on from its shards; the folder's name stands for everything that the values depend on, a row's key for the row.
"""

from __future__ import annotations

import json
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
from ..pipeline.signals import read_table, write_table
from ..storage import Storage

Row = dict[str, Any]  # holds its "key"
Worker = Callable[[list[Row]], list[Row]]  # rows -> one JSON-able value each


@dataclass(frozen=True)
class Job:
    """What to do with rows: ``make(**options)`` loads whatever it needs and gives a Worker."""

    name: str  # for people
    make: Callable[..., Worker]
    options: Mapping[str, Any]
    batch: int  # rows of one call
    heavy: bool = True  # a model: Ray actors, on GPUs where there are any; else it is done here


def read(folder: Storage) -> dict[str, Any]:
    """key -> value of all shards."""
    known: dict[str, Any] = {}
    for name in folder.names():
        if name.startswith("part-") and name.endswith(".parquet"):
            shard = read_table(folder, name)
            known.update(
                zip(
                    shard["key"].to_pylist(),
                    map(json.loads, shard["value"].to_pylist()),
                    strict=True,
                )
            )
    return known


def compute(
    job: Job,
    rows: Sequence[Row],
    folder: Storage,
    *,
    address: str | None,
    workers: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """key -> value of all ``rows``; those that ``folder`` lacks are worked on in their order.

    Args:
        address: of the Ray cluster, as ``pipeline.cluster.connect`` takes it; nothing starts where nothing is to do.
        workers: actors; None: a GPU's or a CPU's each (at most 8 on CPUs); 0: here, without Ray.
    """
    known = read(folder)
    wanted = {r["key"]: r for r in rows if r["key"] not in known}
    need = list(wanted.values())
    done = len({r["key"] for r in rows}) - len(need)
    say(f"{job.name}: {done} cached, {len(need)} to do")
    if not need:
        return known
    calls = [
        json.dumps(need[start : start + job.batch]) for start in range(0, len(need), job.batch)
    ]
    if workers == 0 or not job.heavy:
        work = Actor(job, folder.uri)
        for call in calls:
            work.run(json.loads(call))
    else:
        _on_ray(job, calls, folder, address, workers, say)
    return read(folder)


@contextmanager
def own_cluster() -> Iterator[None]:
    """Within it ``compute`` may start a Ray cluster; one that it started ends with it, a caller's own does not."""

    def runs() -> bool:
        return "ray" in sys.modules and sys.modules["ray"].is_initialized()

    before = runs()
    try:
        yield
    finally:
        if runs() and not before:
            sys.modules["ray"].shutdown()


def _on_ray(
    job: Job,
    calls: list[str],
    folder: Storage,
    address: str | None,
    workers: int | None,
    say: Callable[[str], None],
) -> None:
    from ..pipeline import cluster

    cluster.connect(address)
    import ray

    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    room = gpus or int(there.get("CPU", 1))
    size = max(1, min(workers or (room if gpus else min(8, room)), room, len(calls)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    results = ray.data.from_items(
        [{"rows": c} for c in calls], override_num_blocks=len(calls)
    ).map_batches(
        Actor,
        fn_constructor_kwargs={"job": job, "folder": folder.uri},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    finished = 0
    try:
        for batch in results.iter_batches(batch_size=None):
            fault = next((f for f in batch["fault"] if f), None)
            if fault:
                raise UserError(str(fault))
            before, finished = finished, finished + len(batch["fault"])
            if finished * 4 // len(calls) > before * 4 // len(calls):
                say(f"{job.name}: {finished} of {len(calls)} batches on {size} worker(s)")
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"{job.name}: a worker failed") from error


class Actor:
    """The Ray Data actor: a batch of rows in, a shard of values written. A user's fault comes back as text."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.folder = job, Storage(folder)
        self.work: Worker | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        if (
            self.work is None and self.job.heavy
        ):  # one of many actors; a caller's own process keeps its threads
            import torch

            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for call in batch["rows"]:
                self.run(json.loads(call))
        except UserError as error:
            return {"fault": [str(error)]}
        return {"fault": [""]}

    def run(self, rows: list[Row]) -> None:
        if self.work is None:  # here and not in __init__, whose faults Ray would only repeat
            self.work = self.job.make(**self.job.options)
        values = self.work(rows)
        keys = [r["key"] for r in rows]
        table = pa.table({"key": keys, "value": [json.dumps(v) for v in values]})
        write_table(self.folder, f"part-{digest(keys)}.parquet", table)
