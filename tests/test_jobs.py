"""Submitting a run: what is refused before it starts, what the job server is asked to do."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from midpo_ray import jobs
from midpo_ray.cli import main
from midpo_ray.config import load_config
from midpo_ray.errors import UserError
from midpo_ray.jobs import access, checks
from midpo_ray.pipeline.manifest import Manifest
from midpo_ray.storage import Storage

TOKEN = "0123456789abcdef" * 4


class Server(ThreadingHTTPServer):
    """A fake of Ray's job server: jobs end when the test says so."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.jobs, self.packages = token, {}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self, status: int, body: object = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self) -> None:
        import ray

        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, path = self.server, self.path.rstrip("/")
        if path == "/api/version":
            return self.answer(
                200,
                {
                    "version": "4",
                    "ray_version": ray.__version__,
                    "ray_commit": "",
                    "session_name": "",
                },
            )
        given = self.headers.get("Authorization")
        if server.token and given != f"Bearer {server.token}":
            return self.answer(403 if given else 401, "no")
        if path.startswith("/api/packages"):
            if self.command == "PUT":
                server.packages[path] = body
            return self.answer(200 if path in server.packages else 404)
        if path == "/api/jobs" and self.command == "POST":
            asked = json.loads(body)
            job = {
                "type": "SUBMISSION",
                "status": "RUNNING",
                "start_time": len(server.jobs) + 1,
                "message": "",
                **asked,
            }
            keys = (
                "type",
                "status",
                "start_time",
                "message",
                "entrypoint",
                "submission_id",
                "metadata",
                "runtime_env",
            )
            server.jobs[asked["submission_id"]] = {k: job[k] for k in keys}
            return self.answer(
                200, {"job_id": asked["submission_id"], "submission_id": asked["submission_id"]}
            )
        if path == "/api/jobs":
            return self.answer(200, list(server.jobs.values()))
        job = server.jobs[path.split("/")[3]]
        if path.endswith("/logs"):
            return self.answer(200, {"logs": "one\ntwo\n"})
        if path.endswith("/stop"):
            job["status"] = "STOPPED"
            return self.answer(200, {"stopped": True})
        return self.answer(200, job)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server():
    made: list[Server] = []

    def make(token: str | None = None) -> Server:
        made.append(Server(token))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of one's own, without a token."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def keep_token(home, token: str = TOKEN, mode: int = 0o600) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir(parents=True)
    file.write_text(token)
    file.chmod(mode)


def submit(server: Server, *more: str) -> int:
    return main(["submit", "miniature", "--address", server.url, *more])


def test_the_package_is_the_recipe_alone(server):
    fake = server()
    assert submit(fake, "seed=7", "--name", "mine") == 0
    (job,) = fake.jobs.values()
    assert job["submission_id"] == f"{jobs.prepare_job('miniature', [], 'mine').id}-1"
    assert job["entrypoint"] == "midpo run run.yaml --address auto --run-dir /mnt/midpo/runs/mine"
    (content,) = fake.packages.values()
    assert len(content) < 4096
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        assert [n for n in packed.namelist() if not n.endswith("/")] == ["run.yaml"]
        (recipe := io.BytesIO(packed.read("run.yaml"))).seek(0)
    assert b"seed: 7" in recipe.read()


def test_scorer_modules_beside_the_recipe_go_along(tmp_path, caplog):
    """A file, or the whole package of a module in one (D19)."""
    (tmp_path / "judge.py").write_text("def score(prompts, responses): ...\n")
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges/__init__.py").write_text("")
    (tmp_path / "judges/safety.py").write_text("from .words import WORDS\n")
    (tmp_path / "judges/words.py").write_text("WORDS = ()\n")
    overrides = ["scores.reward.function=judge:score", "scores.cost.function=judges.safety:score"]
    (tmp_path / "package").mkdir()
    checks.package(load_config("miniature", overrides), tmp_path / "package")
    assert sorted(
        str(p.relative_to(tmp_path / "package")) for p in tmp_path.rglob("package/**/*.*")
    ) == [
        "judge.py",
        "judges/__init__.py",
        "judges/safety.py",
        "judges/words.py",
        "run.yaml",
    ]
    assert not caplog.records
    with pytest.raises(UserError, match=r"scores\.cost\.function nowhere\.at:all"):
        checks.package(
            load_config("miniature", ["scores.cost.function=nowhere.at:all"]), tmp_path / "package"
        )
    checks.package(load_config("miniature", ["scores.cost.function=json:loads"]), tmp_path)
    assert "json" in caplog.text  # a module that is installed here must be on the nodes, too


def test_a_home_that_nodes_reach(tmp_path, home, monkeypatch):
    """A home on a network file system, or in a folder that the user calls shared (D19)."""
    (home / "data").mkdir(parents=True)
    (home / "data/pairs.jsonl").write_text("")
    recipe = ("miniature", [f"data.sets.0.path={home}/data/pairs.jsonl"], None, f"{home}/runs/x")
    with pytest.raises(UserError, match=r"--run-dir .*--shared"):
        jobs.prepare_job(*recipe)
    assert jobs.prepare_job(*recipe, shared=str(home)).run_dir == f"{home}/runs/x"
    with pytest.raises(UserError, match=r"data\.sets\.0\.path .* does not exist"):
        jobs.prepare_job("miniature", [f"data.sets.0.path={home}/no"], shared=str(home))
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/home {home} nfs4 rw 0 0\n")
    monkeypatch.setattr(checks, "_MOUNTS", mounts)
    assert jobs.prepare_job(*recipe).name == "miniature"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\n/dev/sdb {home} xfs rw 0 0\n")
    with pytest.raises(UserError, match="--run-dir"):
        jobs.prepare_job(*recipe)


def test_submitting_twice_attaches(server, capsys):
    fake = server()
    assert submit(fake) == 0
    assert submit(fake) == 0
    assert len(fake.jobs) == 1
    out = capsys.readouterr().out
    assert "attached" in out
    assert f"midpo fetch miniature --address {fake.url}" in out
    assert submit(fake, "seed=7") == 2
    assert "another configuration" in capsys.readouterr().err
    next(iter(fake.jobs.values()))["status"] = "FAILED"
    assert submit(fake) == 0
    assert len(fake.jobs) == 2


def test_status_logs_stop(server, capsys):
    fake = server()
    submit(fake)
    at = ("--address", fake.url)
    assert main(["stop", "miniature", *at]) == 0
    assert main(["status", *at]) == 0
    assert main(["logs", "miniature", *at]) == 0
    out = capsys.readouterr().out
    assert "-1: stopped" in out
    assert "one\ntwo\n" in out
    assert main(["logs", "miniature", "--follow", *at]) == 2  # it did not succeed
    assert main(["logs", "other", *at]) == 2
    assert "other: no such run on this cluster" in capsys.readouterr().err


def test_the_token_comes_from_its_file(server, home, capsys):
    fake = server(TOKEN)
    assert submit(fake) == 2
    assert "asks for a token" in capsys.readouterr().err
    keep_token(home, "f" * 64)
    assert submit(fake) == 2
    assert "refuses the token in" in capsys.readouterr().err
    (home / ".ray/auth_token").write_text(TOKEN)
    assert submit(fake) == 0
    (home / ".ray/auth_token").chmod(0o644)
    assert submit(fake) == 2
    assert "others can read it: chmod 600" in capsys.readouterr().err


def test_an_open_job_api_that_others_reach_is_refused(server, home, monkeypatch, capsys):
    monkeypatch.setattr(access, "loopback", lambda url: False)  # as if it were another machine's
    keep_token(home)
    fake = server()
    assert submit(fake) == 2
    assert "must ask for a token" in capsys.readouterr().err
    assert not fake.jobs
    assert submit(fake, "--insecure") == 0
    assert submit(server(TOKEN)) == 0


def test_loopback():
    assert all(
        map(access.loopback, ("http://127.0.0.1:8265", "http://localhost:1", "http://[::1]:8265"))
    )
    assert not any(
        map(
            access.loopback,
            ("http://10.0.0.1:8265", "http://head:8265", "http://127.0.0.1.example.org"),
        )
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.path=./model", "model.path ./model: is relative to a folder of this machine"),
        ("model.path=~/model", "own disk"),
        (
            "data.sets.0.path=pairs.jsonl",
            "data.sets.0.path pairs.jsonl: is relative to a folder of this machine",
        ),
        ("data.sets.0.path=/tmp/pairs.jsonl", "own disk"),
        ("data.sets.0.path=/etc/hostname", "own disk"),
        (
            "scores.reward={model: scorers/mine/final}",
            "scores.reward.model scorers/mine/final: is relative",
        ),
        ("cache=cache", "cache cache: is relative"),
        (
            "logging.wandb=wandb_v1_abcdefghijklmnopqrstuvwxyz",
            "logging.wandb: a Weights & Biases key by value",
        ),
    ],
)
def test_refused_before_anything_is_asked(server, override, said, capsys):
    fake = server()
    assert submit(fake, override) == 2
    assert said in capsys.readouterr().err
    assert not fake.jobs
    assert not fake.packages


def test_paths_that_nodes_see(tmp_path):
    for path in (
        "builtin:miniature",
        "PKU-Alignment/alpaca-7b",
        "gpt2",
        "s3://bucket/model",
        "/mnt/midpo-elsewhere/pairs.jsonl",
    ):
        assert checks.unseen(path, "/mnt/midpo-elsewhere/runs/x") is None
    assert checks.unseen(str(tmp_path / "no"), "s3://bucket/run") is not None
    assert (
        checks.unseen("/proc/self/nothing", "/proc/self/runs") == "does not exist"
    )  # the shared folder is here, the file is not
    with pytest.raises(UserError, match="--run-dir runs/x: is relative"):
        jobs.prepare_job("miniature", [], None, "runs/x")


def test_one_of_cluster_and_address(tmp_path, capsys):
    assert main(["submit", "miniature"]) == 2
    assert "one of --cluster FILE and --address URL is expected" in capsys.readouterr().err
    assert main(["submit", "miniature", "--cluster", str(tmp_path / "none.yaml")]) == 2
    assert main(["submit", "miniature", "--address", "head"]) == 2
    assert main(["submit", "miniature", "--address", "http://127.0.0.1:9"]) == 2


def test_fetch_copies_and_holds_to_the_hashes(tmp_path, capsys):
    run = Storage(tmp_path / "shared/run")
    run.write("run.yaml", b"name: x\n")
    run.write("metrics/safety.jsonl", b"{}\n")
    run.write("experts/safety/adapter_model.safetensors", b"weights")
    run.write("experts/safety.work/checkpoints/step-00000002/state.json", b"{}")
    Manifest(run).commit("safety", {}, "experts/safety", 1.0)
    assert main(["fetch", run.uri, "--to", str(tmp_path / "here")]) == 0
    assert "not finished yet: helpfulness, router" in capsys.readouterr().out
    there = Storage(tmp_path / "here").files()
    assert there == [
        "experts/safety/adapter_model.safetensors",
        "manifest.json",
        "metrics/safety.jsonl",
        "run.yaml",
    ]
    run.write("experts/safety/adapter_model.safetensors", b"other")
    assert main(["fetch", run.uri, "--to", str(tmp_path / "again")]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
