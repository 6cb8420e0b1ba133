"""Copying what a run has finished to this machine."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..pipeline.manifest import MANIFEST
from ..pipeline.plan import FOLDERS
from ..storage import Storage
from .access import RAY, last_line

_KEPT = ("safety", "helpfulness", "router", "evaluation")  # stages whose files are copied

log = logging.getLogger(__name__)


def fetch(run_dir: str, target: Path, cluster: str | None) -> None:
    """Copy adapters, router, report and metrics; every file is compared with the manifest's hash.

    Raises:
        UserError: the run directory is not seen, or a file is not the one that the run wrote.
    """
    source = Storage(run_dir)
    bring: Callable[[str], None]
    if source.exists(MANIFEST):
        bring = lambda name: _copy(source, name, target)  # noqa: E731
    elif cluster is not None:
        bring = lambda name: _download(cluster, run_dir, name, target)  # noqa: E731
    else:
        raise UserError(f"{run_dir}: not seen from here; --cluster FILE copies it from the head")
    target.mkdir(parents=True, exist_ok=True)
    bring(MANIFEST)
    stages = json.loads((target / MANIFEST).read_text("utf-8"))["stages"]
    finished = [stage for stage in _KEPT if stage in stages]
    for name in ("run.yaml", "metrics", *(FOLDERS[stage] for stage in finished)):
        bring(name)
    copy = Storage(target)
    for stage in finished:
        for name, sha in stages[stage]["files"].items():
            if not copy.exists(name) or copy.sha256(name) != sha:
                raise UserError(f"{target}/{name}: not the file that the run wrote: fetch it again")
    missing = [stage for stage in ("safety", "helpfulness", "router") if stage not in stages]
    note = f"; not finished yet: {', '.join(missing)}" if missing else ""
    log.info("%s: fetched%s", target, note)


def _copy(source: Storage, name: str, target: Path) -> None:
    for file in [name] if "." in name else source.files(name):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(source.read(file))


def _download(cluster: str, run_dir: str, name: str, target: Path) -> None:
    """Copy a file or a folder from the head, by rsync over SSH."""
    is_folder = "." not in name
    (target / name if is_folder else target).mkdir(parents=True, exist_ok=True)
    end = "/" if is_folder else ""
    paths = (f"{run_dir}/{name}{end}", f"{target / name}{end}")
    done = subprocess.run(
        [*RAY, "rsync-down", cluster, *paths],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        why = last_line(done.stdout + done.stderr)
        raise UserError(f"--cluster {cluster}: {run_dir}/{name} cannot be fetched ({why})")
