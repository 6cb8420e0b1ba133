"""Environments in which a local cluster is hard to start: a run works, or ends in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smallworld

from midpo_ray.errors import MachineError, UserError
from midpo_ray.pipeline import cluster

PROBE = """
from midpo_ray.pipeline.cluster import connect, disconnect
connect("local")
import ray
print("answer", ray.get(ray.remote(lambda: 41 + 1).remote()))
disconnect()
"""


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HOME", "TMPDIR"))}
    return {**kept, **changes}


@pytest.mark.slow
def test_a_run_without_a_home_in_a_long_folder_beside_another_cluster(
    tmp_path: Path, tiny_model_dir
) -> None:
    long = tmp_path / ("long" * 20) / ("longer" * 15)
    long.mkdir(parents=True)
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(30))
    recipe = smallworld.recipe(tmp_path, tiny_model_dir(), data)
    command = [sys.executable, "-m", "midpo_ray.cli", "run", recipe, "--until", "safety"]
    done = subprocess.run(
        [*command, "--run-dir", tmp_path / "run"],
        env=environment(tmp_path, HOME="/dev/null", TMPDIR=str(long), RAY_ADDRESS="127.0.0.1:1"),
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/experts/safety/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_cluster_starts_where_home_is_not_set(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=environment(tmp_path),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "answer 42" in done.stdout, done.stderr


def test_a_node_that_is_slow_to_start_gets_a_second_attempt(monkeypatch, caplog) -> None:
    import ray

    attempts = []

    def slow(**options: object) -> str:
        attempts.append(options)
        if len(attempts) == 1:
            raise Exception("The current node timed out during startup.\nmore")
        return "session"

    monkeypatch.setattr(cluster, "_keep_token_private", lambda: None)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1"}])
    assert cluster.connect("local") == "session"
    assert len(attempts) == 2
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1

    def never(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", never)
    with pytest.raises(MachineError, match="timed out during startup") as failed:
        cluster.connect("local")
    assert "\n" not in str(failed.value)


def test_a_cluster_that_others_can_reach_is_refused(monkeypatch) -> None:
    import ray

    stopped = []
    monkeypatch.setattr(cluster, "_keep_token_private", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **options: "session")
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "10.1.2.3"}])
    with pytest.raises(cluster.UserError, match=r"10\.1\.2\.3"):
        cluster.connect("local")
    assert stopped


@pytest.mark.parametrize("home", ["/dev/null", None], ids=["read-only", "none"])
def test_the_token_is_private_also_without_a_home(tmp_path, monkeypatch, home) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(cluster.tempfile, "tempdir", str(tmp_path))
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr(Path, "expanduser", no_home)
    cluster._keep_token_private()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))  # so that it is undone at the end
    assert token.is_relative_to(tmp_path)
    assert token.stat().st_mode & 0o777 == 0o600


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_failing_machine_is_one_line_and_exit_code_1(monkeypatch, capsys) -> None:
    from midpo_ray import cli

    def fail(*_: object, **__: object) -> None:
        raise MachineError("Ray does not start on this machine (why)")

    monkeypatch.setattr("midpo_ray.pipeline.run.run", fail)
    assert cli.main(["run", "miniature"]) == 1
    assert capsys.readouterr().err == "midpo: Ray does not start on this machine (why)\n"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:1"])
def test_an_address_where_nothing_listens_is_one_line_at_once(address: str, monkeypatch) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1|no-such-host\.invalid:1"):
        cluster.connect(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1|no-such-host\.invalid:1"):
        cluster.connect("auto")
    assert time.monotonic() - began < 60
