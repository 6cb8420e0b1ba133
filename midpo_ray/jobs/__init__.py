"""Runs as jobs on a cluster that is up: submit, status, logs, stop, fetch, by Ray's job API."""

from .api import Jobs, connect
from .checks import Job, prepare
from .fetch import fetch

__all__ = ["Job", "Jobs", "connect", "fetch", "prepare"]
