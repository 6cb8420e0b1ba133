"""The lock on a run directory: one holder, named when it refuses; taken over from the dead."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import smallworld

from midpo_ray import UserError, load_config
from midpo_ray.cli import main
from midpo_ray.pipeline import lock as lock_module
from midpo_ray.pipeline.lock import LOCK, check_lock, run_lock
from midpo_ray.pipeline.manifest import Manifest
from midpo_ray.storage import Storage

HOLD = """
import sys
from midpo_ray.pipeline.lock import run_lock
from midpo_ray.storage import Storage
with run_lock(Storage(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder's lock until its standard input ends, or fails."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = start(folder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def content(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lock_module, "LEASE", 2.0)
    monkeypatch.setattr(lock_module, "_SETTLE", 0.2)


class ObjectStore(Storage):
    """A folder that pretends to be on an object store: no path, no file locks."""

    local = None  # type: ignore[assignment]

    def write(self, name: str, content: bytes) -> None:
        Storage(self.root).write(name, content)  # a put is atomic


@pytest.mark.parametrize("kind", [Storage, ObjectStore])
def test_the_lock_is_there_while_held_and_gone_afterwards(tmp_path: Path, kind, quick) -> None:
    run = kind(tmp_path / "run")
    with run_lock(run):
        held = json.loads(run.read(LOCK))
        assert (held["host"], held["process"]) == (socket.gethostname(), os.getpid())
        with run_lock(run):  # by the same command
            check_lock(run)
        deadline = time.monotonic() + 20
        while json.loads(run.read(LOCK))["heartbeat"] <= held["heartbeat"]:
            assert time.monotonic() < deadline
        check_lock(run)
    assert not run.exists(LOCK)


def test_a_failed_command_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(Storage(tmp_path / "new")):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_a_second_process_is_refused_and_a_killed_ones_lock_is_taken_over(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    held = json.loads((tmp_path / LOCK).read_text())
    try:
        before = content(tmp_path)
        with pytest.raises(UserError) as refused, run_lock(Storage(tmp_path)):
            pass
        for part in (str(tmp_path), held["host"], str(holder.pid), held["since"]):
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match=str(holder.pid)):
            Manifest(Storage(tmp_path)).commit("safety", {}, "a", 1.0)
        assert content(tmp_path) == before
        os.kill(holder.pid, signal.SIGSTOP)  # a stopped process may continue: it keeps its lock
        with pytest.raises(UserError), run_lock(Storage(tmp_path)):
            pass
    finally:
        holder.kill()
    wait_for_zombie(holder.pid)
    with run_lock(Storage(tmp_path)):  # a zombie is dead
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    holder.wait()


def wait_for_zombie(process: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_of_one_process_are_two_holders(tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        try:
            with run_lock(Storage(tmp_path)):
                pass
        except UserError as error:
            refused.append(error)

    with run_lock(Storage(tmp_path)):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_a_process_id_that_was_given_again_is_not_the_holder(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    with run_lock(run):
        held = json.loads(run.read(LOCK))
    run.write(LOCK, json.dumps({**held, "process_start": "1"}).encode())
    with run_lock(run):
        check_lock(run)


@pytest.mark.parametrize("kind", [Storage, ObjectStore])
def test_another_hosts_lock_is_kept_while_its_heart_beats(tmp_path: Path, kind, quick) -> None:
    run = kind(tmp_path)
    with run_lock(run):
        held = {**json.loads(run.read(LOCK)), "machine": "elsewhere", "host": "node-b"}
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            run.write(LOCK, json.dumps({**held, "heartbeat": time.time()}).encode())

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        time.sleep(0.3)
        with pytest.raises(UserError, match="node-b"), run_lock(run):
            pass
    finally:
        over.set()
        heart.join()
    started = time.monotonic()
    with run_lock(run):  # it beats no more
        assert time.monotonic() - started >= 2.0
        check_lock(run)


def test_who_loses_the_lock_writes_no_manifest(tmp_path: Path, quick) -> None:
    run = Storage(tmp_path)
    with run_lock(run):
        manifest = Manifest(run)
        manifest.commit("score", {}, "a", 1.0)
        other = {**json.loads(run.read(LOCK)), "token": "other", "host": "node-b"}
        run.write(LOCK, json.dumps(other).encode())
        with pytest.raises(UserError, match="node-b"):
            manifest.commit("safety", {}, "a", 1.0)
        time.sleep(0.3)
        assert json.loads(run.read(LOCK))["token"] == "other"  # no heartbeat over it
    assert list(Manifest(run).content["stages"]) == ["score"]
    assert json.loads(run.read(LOCK))["token"] == "other"


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Four processes and a dead holder's lock in the way."""
    holder = hold(tmp_path)
    holder.kill()
    holder.wait()
    candidates = [start(tmp_path) for _ in range(4)]
    deadline = time.monotonic() + 60
    while sum(c.poll() is None for c in candidates) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = [candidate.communicate() for candidate in candidates]
    assert sum(out == "held\n" for out, _ in ended) == 1
    assert sum("UserError" in error for _, error in ended) == 3


def test_a_torn_lock_is_no_lock(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    run.write(LOCK, b'{"token": ')
    with run_lock(run):
        check_lock(run)


def test_two_manifests_lose_nothing_of_each_other(tmp_path: Path) -> None:
    one, two = Manifest(Storage(tmp_path)), Manifest(Storage(tmp_path))
    one.commit("safety", {}, "a", 1.0)
    two.commit("helpfulness", {}, "b", 1.0)
    assert set(Manifest(Storage(tmp_path)).content["stages"]) == {"safety", "helpfulness"}
    one.claim(load_config("miniature"))
    assert set(Manifest(Storage(tmp_path)).content["stages"]) == {"safety", "helpfulness"}


def test_every_command_that_changes_a_run_directory_takes_the_lock(
    tmp_path: Path, tiny_model_dir, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("midpo_ray.pipeline.cluster.connect", unexpected)
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(30))
    recipe = smallworld.recipe(tmp_path, tiny_model_dir(), data)
    study = tmp_path / "study.yaml"
    contenders = [{"name": "base", "serve": "base"}, {"name": "safety", "serve": "safety"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "how", "harmful": False}) + "\n")
    study.write_text(
        json.dumps(
            {
                "recipe": str(recipe),
                "seeds": [0],
                "main": "safety",
                "contenders": contenders,
                "sets": [str(prompts)],
                "judges": ["phrases"],
            }
        )
    )
    folder = tmp_path / "run"
    holder = hold(folder)
    try:
        before = content(folder)
        for command in (
            ("run", recipe),
            ("reward", recipe),
            ("tune", "tune_spaces/joint.yaml", "--recipe", recipe),
            ("study", study),
        ):
            words = [str(word) for word in (*command, "--run-dir", folder)]
            assert (command, main(words)) == (command, 2)
            assert f"process {holder.pid} " in capsys.readouterr().err
            assert content(folder) == before
    finally:
        holder.kill()
        holder.communicate()


def unexpected(*_: object) -> None:
    raise AssertionError("Ray is started although another process holds the lock")
