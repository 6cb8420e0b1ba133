"""Runs as jobs on a cluster that is up: submit, status, logs, stop, fetch, through Ray's job API.

A job's package holds the resolved recipe and the modules beside it that it names as scorers; data, models and the run directory
lie on storage that every node reaches.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .cluster.common import secret_faults
from .config import Config, digest, dump, load_config
from .errors import UserError
from .pipeline.manifest import MANIFEST
from .pipeline.plan import BUILTIN, FOLDERS
from .storage import Storage

SHARED = "/mnt/midpo"  # the shared folder of the shipped cluster files
STOP_SECONDS = 30  # for a job's last checkpoint between being told to stop and being killed
KEPT = ("safety", "helpfulness", "router", "evaluation")  # stages whose files `fetch` brings
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
Say = Callable[[str], None]


class Jobs:
    """The job API of one cluster. ``run`` names a run by its name or its job's id.

    Args:
        url: http://HOST:PORT of the head's dashboard.
        insecure: also a job API that is reachable from elsewhere and asks for no token.

    Raises:
        UserError: nothing answers there, it refuses the token, or it is open to everyone.
    """

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        token = read_token()
        if not insecure and not loopback(url) and (token is None or open_to_all(url)):
            raise UserError(
                f"{url}: a job API that others reach must ask for a token (RAY_AUTH_MODE=token on its nodes, "
                f"the token in {token_path()}); --insecure submits all the same"
            )
        from ray.job_submission import JobSubmissionClient

        self.url, self.token = url, token
        logging.getLogger("ray").setLevel(logging.WARNING)  # it would tell of every upload
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with self._told():
            self.api = JobSubmissionClient(url, headers=headers)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What the API answers, as one line."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            has = "refuses the token in" if self.token else "asks for a token, and there is none in"
            raise UserError(f"{self.url}: {has} {token_path()}: copy the cluster's") from None
        except (RuntimeError, OSError) as error:  # requests' own errors are OSErrors
            text = " ".join(str(error).split())
            raise UserError(f"{self.url}: {text[:300] or type(error).__name__}") from None

    def all(self) -> list[Any]:
        """This package's jobs, oldest first."""
        with self._told():
            found = [j for j in self.api.list_jobs() if (j.metadata or {}).get("midpo")]
        return sorted(found, key=lambda j: j.start_time or 0)

    def of(self, run: str) -> Any:
        """The newest job of a run."""
        jobs = self.all()
        mine = [
            j for j in jobs if run in (j.submission_id, j.metadata["midpo"], j.metadata["name"])
        ]
        if not mine:
            known = ", ".join(dict.fromkeys(j.metadata["name"] for j in jobs)) or "none"
            raise UserError(f"{run}: no such run on this cluster; there are: {known}")
        return mine[-1]

    def submit(self, config: Config, name: str, run_dir: str, say: Say) -> str:
        """Start the run's job, or attach to the one that is at it; returns the job's id.

        Raises:
            UserError: the run's job is running with another configuration.
        """
        run, content = run_id(name, run_dir), digest(config)
        mine = [j for j in self.all() if j.metadata["midpo"] == run]
        live = [j for j in mine if j.status not in DONE]
        if live:
            job = live[-1]
            if job.metadata["digest"] != content:
                raise UserError(
                    f"{job.submission_id} runs with another configuration: stop it first, or give another --name"
                )
            say(f"{job.submission_id} is running already: attached")
            return job.submission_id
        with tempfile.TemporaryDirectory() as folder, self._told():
            package(config, Path(folder))
            job_id = self.api.submit_job(
                entrypoint=f"midpo run run.yaml --address auto --run-dir {shlex.quote(run_dir)}",
                submission_id=f"{run}-{len(mine) + 1}",  # Ray takes an id once; a run that goes on gets the next number
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata={"midpo": run, "name": name, "run_dir": run_dir, "digest": content},
            )
        say(f"{job_id}: submitted, run directory {run_dir}")
        return job_id

    def status(self, run: str | None, say: Say) -> None:
        for job in [self.of(run)] if run else self.all():
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
            why = (
                f", {' '.join((job.message or '').split())[:120]}" if job.status == "FAILED" else ""
            )
            say(
                f"{job.submission_id}: {job.status.lower()}, started {started}, run directory {job.metadata['run_dir']}{why}"
            )

    def logs(self, run: str, follow: bool, say: Say) -> None:
        """What the job said; with ``follow`` until it ends, and then an error where it failed."""
        job_id, told = self.of(run).submission_id, 0
        while True:
            with self._told():
                state = self.api.get_job_status(job_id)
                text = self.api.get_job_logs(job_id)
            whole = len(text) if state in DONE else text.rfind("\n") + 1
            if whole > told:
                say(text[told:whole].rstrip("\n"))
                told = whole
            if not follow:
                return
            if state in DONE:
                break
            time.sleep(1.0)
        if state != "SUCCEEDED":
            raise UserError(
                f"{job_id}: {state.lower()}; the same submit goes on from what is finished"
            )

    def stop(self, run: str, say: Say) -> None:
        """Tell the job to stop: it writes a checkpoint first, and is killed after ``STOP_SECONDS``."""
        job_id = self.of(run).submission_id
        with self._told():
            self.api.stop_job(job_id)
            deadline = time.monotonic() + STOP_SECONDS + 10
            while (
                state := self.api.get_job_status(job_id)
            ) not in DONE and time.monotonic() < deadline:
                time.sleep(0.5)
        say(f"{job_id}: {state.lower()}; the same submit goes on from what is finished")


@contextlib.contextmanager
def reach(cluster: str | None, address: str | None) -> Iterator[str]:
    """The job API's URL: ``address``, or the head's of a cluster file, through the SSH tunnel that `ray dashboard` makes."""
    if (cluster is None) == (address is None):
        raise UserError("one of --cluster FILE and --address URL is expected")
    if address is not None:
        if not re.match(r"https?://[^/]+", address):
            raise UserError(
                f"--address {address}: http://HOST:PORT is expected, 8265 is the usual port"
            )
        yield address.rstrip("/")
        return
    assert cluster is not None
    if not Path(cluster).is_file():
        raise UserError(f"--cluster {cluster}: no such file")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "dashboard",
        cluster,
        "--port",
        str(port),
    ]
    with tempfile.TemporaryFile() as log:
        tunnel = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while not _listens(port):
                if tunnel.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = [
                        s for s in log.read().decode(errors="replace").splitlines() if s.strip()
                    ][-1:] or ["no answer"]
                    raise UserError(
                        f"--cluster {cluster}: its head is not reached by SSH; is it up? ({last[0].strip()[:200]})"
                    )
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tunnel.pid, signal.SIGTERM)
            tunnel.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def load(
    recipe: str, overrides: list[str], name: str | None, run_dir: str | None
) -> tuple[Config, str, str]:
    """(configuration, the run's name, its directory), all that can be refused before anything is asked of a cluster."""
    config = load_config(recipe, overrides)
    name = name or config.name
    run_dir = run_dir or f"{SHARED}/runs/{name}"
    content = config.model_dump(mode="json", exclude_none=True)
    for key, what in secret_faults([content, {"name": name, "run-dir": run_dir}], dump(config)):
        raise UserError(f"{key}: {what}")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name}: letters, digits, dot, dash and underscore are expected")
    for key, path in {"--run-dir": run_dir, **paths(config)}.items():
        if why := unseen(path, run_dir, result=key in ("--run-dir", "cache")):
            raise UserError(
                f"{key} {path}: {why}; name a path on storage that every node reaches, such as {SHARED}/..."
            )
    return config, name, run_dir


def paths(config: Config) -> dict[str, str]:
    """What a recipe names that must be there on the nodes, by its key."""
    named = {"model.path": config.model.path, "cache": config.cache}
    named |= {f"data.sets.{i}.path": s.path for i, s in enumerate(config.data.sets)}
    for kind in ("reward", "cost"):
        scorer = getattr(config.scores, kind)
        named[f"scores.{kind}.model"] = scorer.model if scorer else None
    return {key: path for key, path in named.items() if path}


def unseen(path: str, run_dir: str, *, result: bool = False) -> str | None:
    """Why nodes cannot see a path that was named here, or None. ``result``: it need not exist yet, and is no hub name."""
    if path.startswith(BUILTIN) or ("://" in path and not path.startswith("file://")):
        return None
    place = Path(path.removeprefix("file://")).expanduser()
    if not place.is_absolute():
        hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and not re.search(
            r"\.(jsonl?|parquet|csv)(\.gz)?$", path
        )
        return (
            None
            if hub and not result and not place.exists()
            else "is relative to a folder of this machine"
        )
    shared = Path(
        *Path(run_dir.removeprefix("file://")).parts[:3]
    )  # /mnt/midpo of /mnt/midpo/runs/NAME
    own = [
        p
        for p in (Path.home(), Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))
        if p != Path("/")
    ]
    if any(place.is_relative_to(p) for p in own):
        return "lies in this machine's own folders"
    if not result and place.is_relative_to(shared):
        return "is not there" if shared.is_dir() and not place.exists() else None
    if not result and place.exists() and place.stat().st_dev == os.stat("/").st_dev:
        return "lies on this machine's own disk"
    return None


def run_id(name: str, run_dir: str) -> str:
    """Stands for a run, however often it is submitted and from wherever: one directory, one id."""
    return f"midpo-{name}-{digest(run_dir)[:8]}"


def package(config: Config, folder: Path) -> None:
    """The recipe, resolved, and the scorers' modules that lie here."""
    (folder / "run.yaml").write_text(dump(config), "utf-8")
    for scorer in (config.scores.reward, config.scores.cost):
        if (
            scorer
            and scorer.function
            and (module := Path(scorer.function.partition(":")[0] + ".py")).is_file()
        ):
            shutil.copy(module, folder)


def fetch(run_dir: str, target: Path, cluster: str | None, say: Say) -> None:
    """Copy adapters, router, report and metrics of what is finished to this machine, each file held to the manifest's hash."""
    source = Storage(run_dir)
    if source.exists(MANIFEST):
        _fetch(target, lambda name: _copy(source, name, target), say)
    elif cluster is None:
        raise UserError(f"{run_dir}: not seen from here; --cluster FILE brings it from the head")
    else:
        _fetch(target, lambda name: _bring(cluster, run_dir, name, target), say)


def _fetch(target: Path, bring: Callable[[str], None], say: Say) -> None:
    target.mkdir(parents=True, exist_ok=True)
    bring(MANIFEST)
    stages = json.loads((target / MANIFEST).read_text("utf-8"))["stages"]
    for name in ("run.yaml", "metrics", *(FOLDERS[s] for s in KEPT if s in stages)):
        bring(name)
    there = Storage(target)
    for stage in (s for s in KEPT if s in stages):
        for name, sha in stages[stage]["files"].items():
            if not there.exists(name) or there.sha256(name) != sha:
                raise UserError(
                    f"{target}/{name}: is not the file that the run wrote: fetch it again"
                )
    missing = [s for s in ("safety", "helpfulness", "router") if s not in stages]
    say(f"{target}: fetched" + (f"; not finished yet: {', '.join(missing)}" if missing else ""))


def _copy(source: Storage, name: str, target: Path) -> None:
    for file in [name] if "." in name else source.files(name):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(source.read(file))


def _bring(cluster: str, run_dir: str, name: str, target: Path) -> None:
    """By rsync over SSH from the head."""
    folder = "." not in name
    (target / name if folder else target).mkdir(parents=True, exist_ok=True)
    end = "/" if folder else ""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "rsync-down",
        cluster,
        f"{run_dir}/{name}{end}",
        f"{target / name}{end}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [""]
        raise UserError(
            f"--cluster {cluster}: {run_dir}/{name} cannot be fetched ({last[0][:200]})"
        )


def token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()


def read_token() -> str | None:
    """The cluster's token from its file, which must be its owner's alone; None where there is none."""
    path = token_path()
    if not path.is_file():
        return None
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others can read it: chmod 600 {path}")
    return path.read_text("utf-8").strip()


def loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_to_all(url: str) -> bool:
    """Whether the job API answers who has no token."""
    import requests

    try:
        return (
            requests.get(f"{url}/api/jobs/", timeout=10, allow_redirects=False).status_code == 200
        )
    except requests.exceptions.RequestException as error:
        raise UserError(f"{url}: no job API answers there ({type(error).__name__})") from None
