"""Hangs, notices, lost nodes and a storage out of reach, each without a cluster: who says what, and after how long."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import smallworld

from midpo_ray import storage as storage_module
from midpo_ray.config import Group
from midpo_ray.errors import UserError
from midpo_ray.pipeline.cluster import Node, Shortages
from midpo_ray.pipeline.watch import STOP, Faults, Watchdog
from midpo_ray.storage import Storage


def wait_until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_hang_is_named_and_ended(tmp_path):
    run, ended = Storage(tmp_path), threading.Event()
    faults = Faults(run)
    with Watchdog(run, "safety", 1, "node-b", timeout=0.2, end=ended.set) as watch:
        watch.heartbeat(7, "train")
        assert ended.wait(10)
    (line,) = faults.new()
    assert re.match(r"safety: rank 1 on node node-b hangs: step 7, phase train, for \d+ s", line)
    assert faults.new() == []
    assert Faults(run).new() == []  # another driver tells only what is new
    assert (
        "test_watch.py" in (tmp_path / "logs/faults/safety-1.log").read_text()
    )  # every thread's stack


def test_a_hang_that_holds_the_interpreter_lock_is_ended_too(tmp_path):
    """No thread of Python can run: the C library sleeps with the lock held."""
    code = (
        "import ctypes, sys\n"
        "from midpo_ray.pipeline import watch\n"
        "from midpo_ray.storage import Storage\n"
        "watch._GRACE = 0.5\n"
        "with watch.Watchdog(Storage(sys.argv[1]), 'safety', 1, 'node-b', 0.5) as watchdog:\n"
        "    watchdog.heartbeat(7, 'train')\n"
        "    ctypes.PyDLL(None).sleep(30)\n"
    )
    run, began = Storage(tmp_path), time.monotonic()
    faults = Faults(run)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 1
    assert time.monotonic() - began < 25
    (line,) = faults.new()
    assert line.startswith("safety: rank 1 on node node-b hangs: step 7, phase train, for ")


def test_beats_keep_the_watch_quiet(tmp_path):
    ended = threading.Event()
    with Watchdog(Storage(tmp_path), "safety", 0, "node-a", timeout=2.0, end=ended.set) as watch:
        for step in range(30):
            watch.heartbeat(step, "train")
            time.sleep(0.1)
    assert not ended.is_set()


@pytest.mark.parametrize("how", ["run", "node"])
def test_notices(tmp_path, monkeypatch, how):
    monkeypatch.setattr("midpo_ray.pipeline.watch._NOTICE_INTERVAL", 0.02)
    run, leaving = Storage(tmp_path), threading.Event()
    with Watchdog(run, "safety", 0, "node-a", timeout=60, leaving=leaving.is_set) as watch:
        time.sleep(0.1)
        assert not watch.is_preempted()
        run.write(STOP, b"") if how == "run" else leaving.set()
        wait_until(watch.is_preempted)


def test_a_later_attempt_ends_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr("midpo_ray.pipeline.watch._NOTICE_INTERVAL", 0.02)
    run, ended = Storage(tmp_path), threading.Event()
    run.write("work/owner", b"first")
    with Watchdog(
        run, "safety", 0, "node-a", timeout=60, owner=("work/owner", b"first"), end=ended.set
    ):
        time.sleep(0.2)
        assert not ended.is_set()
        run.write("work/owner", b"second")
        assert ended.wait(10)


def test_a_lost_node_is_waited_for_and_then_named(caplog):
    now = [0.0]
    shortages = Shortages(90.0, clock=lambda: now[0])
    group = Group(workers=2, cpus_per_worker=1, label_selector={"midpo-group": "safety"})
    here = Node({"CPU": 2}, {"midpo-group": "safety"})
    for time_, available in ((0, [here]), (10, []), (80, [here]), (81, []), (170, [])):
        now[0] = time_
        shortages.check("safety", group, available)  # the wait begins anew at 81
    assert len(caplog.records) == 2
    now[0] = 171.0
    with pytest.raises(UserError) as error:
        shortages.check("safety", group, [])
    for part in ("safety", "2 worker(s)", "1 CPU", "midpo-group", "90 s"):
        assert part in str(error.value)


class Away:
    """Stands for a method of Storage on a network file system that answers with an error ``times`` times."""

    def __init__(self, times: int, number: int) -> None:
        self.times, self.number = times, number

    def __call__(self, method):
        def call(*arguments):
            if self.times:
                self.times -= 1
                raise OSError(self.number, "away")
            return method(*arguments)

        return call


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage_module, "_PAUSE", 0.01)
    monkeypatch.setattr(storage_module, "PATIENCE", 2.0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_storage_out_of_reach_is_waited_for(tmp_path, monkeypatch, quick, number):
    monkeypatch.setattr(os, "replace", Away(3, number)(os.replace))
    Storage(tmp_path).write("a/b", b"content")
    assert (tmp_path / "a/b").read_bytes() == b"content"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_but_not_for_ever_and_not_where_waiting_is_vain(tmp_path, monkeypatch, quick):
    run, replace = Storage(tmp_path), os.replace
    for number, tries in ((errno.EIO, 1000), (errno.ENOSPC, 1000), (errno.EACCES, 1000)):
        away = Away(tries, number)
        monkeypatch.setattr(os, "replace", away(replace))
        with pytest.raises(UserError, match=r"a/b: "):
            run.write("a/b", b"content")
        assert (tries - away.times > 1) == (number == errno.EIO)


def test_a_rename_whose_answer_was_lost_is_done(tmp_path, monkeypatch, quick):
    run, rename = Storage(tmp_path), os.rename
    run.write("aside/file", b"content")

    def lost(old, new):
        rename(old, new)
        monkeypatch.setattr(os, "rename", rename)
        raise OSError(errno.ETIMEDOUT, "no answer")

    monkeypatch.setattr(os, "rename", lost)
    run.rename("aside", "final")
    assert run.read("final/file") == b"content"


def test_half_a_line_is_taken_back(tmp_path):
    """A full disk: nothing of the line that did not fit stays."""
    run = Storage(tmp_path)
    run.append("lines", b"one\n")

    class Full:
        def __init__(self, path, *_, **__):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        tell = property(lambda self: self.file.tell)
        truncate = property(lambda self: self.file.truncate)

        def write(self, content):
            return self.file.write(content[:2])

    storage_module.open = Full
    try:
        with pytest.raises(UserError, match="no space is left"):
            run.append("lines", b"two\n")
    finally:
        del storage_module.open
    assert Path(run.path("lines")).read_bytes() == b"one\n"


@pytest.mark.slow
def test_a_frozen_rank_is_found_and_the_group_restarts(tmp_path, tiny_model_dir):
    """One of two ranks is frozen: the other one's watch tells where it waits, and the run ends well."""
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(60))
    patience = {"stall_timeout": 20}  # a busy machine starts a worker slowly
    recipe = smallworld.recipe(tmp_path, tiny_model_dir(), data, cluster=patience)
    settings = (
        "experts.safety.group.workers=2",
        "experts.safety.optim.steps=300",
        "checkpoint.every_steps=20",
    )
    command = [
        sys.executable,
        "-m",
        "midpo_ray.cli",
        "run",
        str(recipe),
        *settings,
        "--until",
        "safety",
    ]
    driver = subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until(
            lambda: any((tmp_path / "run/experts/safety.work/checkpoints").glob("step-*")), 240
        )
        frozen = [
            pid
            for pid in descendants(driver.pid)
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(frozen[-1], signal.SIGSTOP)
        said, _ = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert " hangs: step " in said
    assert ", phase train, for " in said
    assert (tmp_path / "run/experts/safety/adapter_model.safetensors").exists()


def descendants(pid: int) -> list[int]:
    children = [
        int(p)
        for t in Path(f"/proc/{pid}/task").iterdir()
        for p in (t / "children").read_text().split()
    ]
    return children + [p for child in children for p in descendants(child)]
