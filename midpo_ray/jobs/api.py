"""The job API of one cluster."""

from __future__ import annotations

import contextlib
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from ..config import digest
from ..errors import UserError
from .access import check_private, reach, read_token, token_path
from .checks import Job, package

STOP_SECONDS = 30  # between asking a job to stop and killing it: time for its last checkpoint
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def job_api(cluster: str | None, address: str | None, insecure: bool) -> Iterator[Jobs]:
    """The job API of a cluster file's head, or at an address; see ``access.reach``."""
    with reach(cluster, address) as url:
        yield Jobs(url, insecure=insecure)


class Jobs:
    """This package's jobs on a cluster. A run is named by its name or by its job's id.

    Args:
        url: http://HOST:PORT of the head's dashboard.
        insecure: also use an API that other machines reach and that asks for no token.

    Raises:
        UserError: nothing answers, the token is refused, or everyone can use the API.
    """

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        self.url, self._token = url, read_token()
        if not insecure:
            check_private(url, self._token)
        logging.getLogger("ray").setLevel(logging.WARNING)  # Ray reports every upload
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        with self._errors_in_one_line():
            self._api = JobSubmissionClient(url, headers=headers)

    @contextlib.contextmanager
    def _errors_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            has = "refuses the token in" if self._token else "asks for a token, and none is in"
            raise UserError(f"{self.url}: {has} {token_path()}: copy the cluster's") from None
        except (RuntimeError, OSError) as error:  # the errors of requests are OSErrors
            text = " ".join(str(error).split())
            raise UserError(f"{self.url}: {text[:300] or type(error).__name__}") from None

    def all(self) -> list[Any]:
        """This package's jobs, oldest first."""
        with self._errors_in_one_line():
            jobs = [j for j in self._api.list_jobs() if (j.metadata or {}).get("midpo")]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def newest(self, run: str) -> Any:
        """The newest job of a run.

        Raises:
            UserError: there is none; the message lists the runs of the cluster.
        """
        jobs = self.all()
        names = [(j.submission_id, j.metadata["midpo"], j.metadata["name"]) for j in jobs]
        found = [job for job, known in zip(jobs, names, strict=True) if run in known]
        if not found:
            known = ", ".join(dict.fromkeys(j.metadata["name"] for j in jobs)) or "none"
            raise UserError(f"{run}: no such run on this cluster; its runs: {known}")
        return found[-1]

    def submit(self, job: Job) -> str:
        """Start a run's job, or attach to the one that is running; returns the job's id.

        Raises:
            UserError: the run's job is running with another configuration.
        """
        content = digest(job.config)
        earlier = [j for j in self.all() if j.metadata["midpo"] == job.id]
        running = [j for j in earlier if j.status not in ENDED]
        if running:
            job_id = running[-1].submission_id
            if running[-1].metadata["digest"] != content:
                raise UserError(
                    f"{job_id} is running with another configuration: stop it first, or give "
                    "another --name"
                )
            log.info("%s is running already: attached", job_id)
            return job_id
        metadata = {"midpo": job.id, "name": job.name, "run_dir": job.run_dir, "digest": content}
        with tempfile.TemporaryDirectory() as folder, self._errors_in_one_line():
            package(job.config, Path(folder))
            variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
            run_dir = shlex.quote(job.run_dir)
            job_id = self._api.submit_job(
                entrypoint=f"midpo run run.yaml --address auto --run-dir {run_dir}",
                submission_id=f"{job.id}-{len(earlier) + 1}",  # Ray accepts an id once
                runtime_env={"working_dir": folder, "env_vars": variables},
                metadata=metadata,
            )
        log.info("%s: submitted, run directory %s", job_id, job.run_dir)
        return job_id

    def status(self, run: str | None) -> None:
        """Print one line per job."""
        for job in [self.newest(run)] if run else self.all():
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
            line = f"{job.submission_id}: {job.status.lower()}, started {started}, run directory "
            line += job.metadata["run_dir"]
            if job.status == "FAILED":
                line += f", {' '.join((job.message or '').split())[:120]}"
            print(line)

    def logs(self, run: str, follow: bool) -> None:
        """Print a job's log; ``follow`` prints until the job ends.

        Raises:
            UserError: a job that was followed did not succeed.
        """
        job_id, printed = self.newest(run).submission_id, 0
        while True:
            with self._errors_in_one_line():
                state = self._api.get_job_status(job_id)
                text = self._api.get_job_logs(job_id)
            end = len(text) if state in ENDED else text.rfind("\n") + 1
            if end > printed:
                print(text[printed:end].rstrip("\n"))
                printed = end
            if not follow:
                return
            if state in ENDED:
                break
            time.sleep(1.0)
        if state != "SUCCEEDED":
            raise UserError(f"{job_id}: {state.lower()}; the same submit resumes the run")

    def stop(self, run: str) -> None:
        """Stop a job: it writes a checkpoint first, and is killed after ``STOP_SECONDS``."""
        job_id = self.newest(run).submission_id
        with self._errors_in_one_line():
            self._api.stop_job(job_id)
            deadline = time.monotonic() + STOP_SECONDS + 10
            while (state := self._api.get_job_status(job_id)) not in ENDED:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        log.info("%s: %s; the same submit resumes the run", job_id, state.lower())
