"""Runs as jobs on a cluster that is up: submit, status, logs, stop, fetch, by Ray's job API."""

from .api import Jobs, job_api
from .checks import Job, prepare_job
from .fetch import fetch

__all__ = ["Job", "Jobs", "fetch", "job_api", "prepare_job"]
