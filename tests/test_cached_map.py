"""The content-addressed cache: what it computes, what it keeps over a SIGKILL, and how it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from midpo_ray.errors import UserError
from midpo_ray.pipeline.cached_map import MapJob, Pool, cached_map, read_cache
from midpo_ray.pipeline.signals import read_table
from midpo_ray.storage import Storage

HERE = Pool(workers=0)


class Twice:
    """Doubles numbers, notes each row in a file, and fails on a row that is named bad."""

    def __init__(self, mark: str, pause: float = 0.0) -> None:
        self.mark, self.pause = Path(mark), pause

    def __call__(self, rows):
        time.sleep(self.pause)
        with self.mark.open("a") as file:
            file.write(" ".join(f"{row['key']}:{'+'.join(row['need'])}" for row in rows) + "\n")
        if any(row["key"] == "bad" for row in rows):
            raise UserError("row bad: not what was expected")
        return [
            {
                "twice": {"value": 2 * row["number"], "parts": {"half": [row["number"] / 2]}},
                "text": {"text": str(row["number"])},
            }
            for row in rows
        ]


def numbers(count):
    return [{"key": str(i), "number": i} for i in range(count)]


def twice(i):
    return {"value": 2 * i, "parts": {"half": [i / 2]}}


def job(tmp_path, **more):
    options = {"mark": str(tmp_path / "mark"), **more.pop("options", {})}
    return MapJob("doubling", Twice, options, **{"batch": 2, **more})


def units(tmp_path):
    """What the job was called with, one list of KEY:SIGNALS per unit."""
    return [line.split() for line in (tmp_path / "mark").read_text().splitlines()]


def test_only_what_is_missing_is_computed_per_signal(tmp_path, caplog):
    caplog.set_level("INFO", logger="midpo_ray")
    folders = {name: Storage(tmp_path / name) for name in ("twice", "text")}
    one = {"twice": folders["twice"]}
    found = cached_map(job(tmp_path), [*numbers(3), *numbers(3)], one, HERE)
    assert found == {"twice": {str(i): twice(i) for i in range(3)}}
    assert units(tmp_path) == [["0:twice", "1:twice"], ["2:twice"]]
    found = cached_map(job(tmp_path), numbers(4), folders, HERE)
    assert found["text"] == {str(i): {"text": str(i)} for i in range(4)}
    assert found["twice"]["3"] == twice(3)
    assert units(tmp_path)[2:] == [["0:text", "1:text"], ["2:text", "3:twice+text"]]
    assert caplog.messages == [
        "doubling: 0 of 3 cached, 3 to do",
        "doubling: twice: 3 of 4 cached, 1 to do",
        "doubling: text: 0 of 4 cached, 4 to do",
    ]
    cached_map(MapJob("doubling", object, {"no": "such option"}), numbers(4), folders, HERE)
    assert len(units(tmp_path)) == 4  # everything is cached: the job is not even loaded


def test_shards_are_typed_and_hold_several_units(tmp_path):
    folder = Storage(tmp_path / "twice")
    cached_map(job(tmp_path, shard_units=3), numbers(96), {"twice": folder}, HERE)
    shards = [read_table(folder, name) for name in folder.names()]
    assert sorted(len(s) for s in shards) == [6] * 16  # 48 units, at least 16 calls per worker
    assert shards[0].schema.field("value").type == pa.int64()
    assert shards[0].schema.field("parts").type == pa.struct({"half": pa.list_(pa.float64())})
    assert read_cache(folder) == {str(i): twice(i) for i in range(96)}


def test_split_makes_the_units(tmp_path):
    def by_parity(rows):
        return [[r for r in rows if r["number"] % 2 == odd] for odd in (0, 1)]

    cached_map(job(tmp_path), numbers(5), {"twice": Storage(tmp_path / "t")}, HERE, by_parity)
    assert units(tmp_path) == [["0:twice", "2:twice", "4:twice"], ["1:twice", "3:twice"]]


def test_a_user_error_keeps_the_finished_shards(tmp_path):
    rows = [*numbers(4), {"key": "bad", "number": 0}]
    with pytest.raises(UserError, match=r"^row bad: not what was expected$"):
        cached_map(job(tmp_path), rows, {"twice": Storage(tmp_path / "t")}, HERE)
    assert read_cache(Storage(tmp_path / "t")) == {str(i): twice(i) for i in range(4)}


SCRIPT = """
from test_cached_map import HERE, job, numbers
from midpo_ray.pipeline.cached_map import cached_map
from midpo_ray.storage import Storage
from pathlib import Path
folder = Path({folder!r})
slow = job(folder, options=dict(pause=0.2))
cached_map(slow, numbers(20), dict(twice=Storage(folder / "t")), HERE)
"""


def test_a_killed_run_is_resumed(tmp_path):
    """After SIGKILL the second call computes only what is missing."""
    script, folder = SCRIPT.format(folder=str(tmp_path)), Storage(tmp_path / "t")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 120
    while len(read_cache(folder)) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = read_cache(folder)
    assert 6 <= len(done) < 20
    (tmp_path / "mark").unlink()
    found = cached_map(job(tmp_path), numbers(20), {"twice": folder}, HERE)
    assert found["twice"] == {str(i): twice(i) for i in range(20)}
    again = {row for unit in units(tmp_path) for row in unit}
    assert again == {f"{i}:twice" for i in range(20)} - {f"{key}:twice" for key in done}


@pytest.mark.slow
def test_ray_gives_the_same_values(tmp_path, monkeypatch, caplog):
    import ray

    caplog.set_level("INFO", logger="midpo_ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    folders = {name: Storage(tmp_path / name) for name in ("twice", "text")}
    two = Pool(workers=2)
    try:
        found = cached_map(job(tmp_path), numbers(11), folders, two)
        rows = [*numbers(4), {"key": "bad", "number": 0}]
        with pytest.raises(UserError, match=r"^row bad: not what was expected$"):
            cached_map(job(tmp_path), rows, {"twice": Storage(tmp_path / "t")}, two)
        with pytest.raises(UserError, match=r"^doubling: a worker needs 1000 CPU and 0 GPU"):
            cached_map(job(tmp_path), numbers(12), folders, Pool(cpus=1000, gpus=0))
    finally:
        ray.shutdown()
    near = {name: Storage(tmp_path / "near" / name) for name in folders}
    assert found == cached_map(job(tmp_path), numbers(11), near, HERE)
    assert "doubling: 11 of 11 on 2 worker(s)" in caplog.messages
