"""A lock on a run directory, so that only one command at a time changes it.

The lock is the file ``lock.json`` in the run directory. It names its holder and has a heartbeat
that the holder renews. The lock of a process that has died on this host is taken over at once. The
lock of another host is taken over when its heartbeat has not changed for ``LEASE`` seconds of this
host's monotonic clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import Storage

log = logging.getLogger(__name__)

LOCK = "lock.json"
HEARTBEAT = 10.0  # seconds between two heartbeats
LEASE = 35.0  # seconds without a heartbeat after which another host's lock is taken over
_SETTLE = 1.0  # seconds before an object store is read again, in which a simultaneous write arrives
_held: ContextVar[dict[str, str]] = ContextVar("_held", default={})  # noqa: B039  (never mutated)


@contextlib.contextmanager
def run_lock(run: Storage) -> Iterator[None]:
    """Hold the lock of a run directory; a nested use for the same directory does nothing.

    Raises:
        UserError: another process holds the lock; the message names its host, process and start.
    """
    if run.uri in _held.get():
        yield
        return
    is_new = not run.exists()
    mine = _holder()
    _acquire(run, mine)
    over = threading.Event()
    heart = threading.Thread(target=_renew, args=(run, mine, over), daemon=True)
    heart.start()
    token = _held.set({**_held.get(), run.uri: mine["token"]})
    try:
        yield
    finally:
        _held.reset(token)
        over.set()
        heart.join()
        with contextlib.suppress(OSError, UserError):  # an error of the command comes first
            if _read(run).get("token") == mine["token"]:
                run.delete(LOCK)
            if is_new and run.local and not run.names():
                os.rmdir(run.local)


def check_lock(run: Storage) -> None:
    """Raise UserError where another command holds the lock, also one that took it over from us."""
    held, current = _held.get().get(run.uri), _read(run)
    if held and current.get("token") != held:
        by = f" by {_name(current)}" if current else ""
        raise UserError(f"{run.uri}: the lock on the run directory was taken over{by}")
    if not held and _is_alive(current):
        raise UserError(_refusal(run, current))


def _acquire(run: Storage, mine: dict[str, Any]) -> None:
    while True:
        with _exclusively(run) as exclusive:
            current = _read(run)
            if not current or _is_alive(current) is False:
                if current:
                    log.info("%s: %s has died, its lock is taken over", run.uri, _name(current))
                _write(run, mine)
                if not exclusive:
                    time.sleep(_SETTLE)
                    current = _read(run)
                    if current.get("token") != mine["token"]:
                        raise UserError(_refusal(run, current))
                return
        if _is_alive(current) or not _expires(run, current):
            raise UserError(_refusal(run, current))
        log.info("%s: %s sends no heartbeat, its lock is taken over", run.uri, _name(current))
        with _exclusively(run):
            if _read(run).get("token") == current["token"]:
                run.delete(LOCK)


def _expires(run: Storage, current: dict[str, Any]) -> bool:
    """Watch another host's lock: True when its heartbeat stays the same for ``LEASE`` seconds."""
    log.info("%s: waiting up to %g s for a heartbeat of %s", run.uri, LEASE, _name(current))
    deadline = time.monotonic() + LEASE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LEASE / 10))
        if _read(run) != current:
            return not _read(run)  # released meanwhile
    return True


def _renew(run: Storage, mine: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        # A storage that is out of reach is tried again; ``check_lock`` notices a lost lock.
        with contextlib.suppress(OSError, UserError), _exclusively(run):
            if _read(run).get("token") == mine["token"]:
                _write(run, mine)


@contextlib.contextmanager
def _exclusively(run: Storage) -> Iterator[bool]:
    """One process at a time, where the file system has locks; yields whether it has."""
    if run.local is None:
        yield False
        return
    run.make_folder()
    folder = os.open(run.local, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            yield False
        else:
            yield True
    finally:
        os.close(folder)


def _read(run: Storage) -> dict[str, Any]:
    """The lock's content; empty where there is none, or none that can be read."""
    try:
        content = json.loads(run.read(LOCK)) if run.exists(LOCK) else {}
    except (FileNotFoundError, ValueError):  # released meanwhile; torn by a crash
        return {}
    return content if isinstance(content, dict) and "token" in content else {}


def _write(run: Storage, mine: dict[str, Any]) -> None:
    run.write(LOCK, json.dumps({**mine, "heartbeat": time.time()}, indent=1).encode())


def _holder() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _machine() -> str:
    """Identifies the space of process ids: the boot of a machine, and a container on it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _process_start(process: int) -> str | None:
    """When a process of this host began, in clock ticks; None for one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process is alive; None for one of another host, which is not known."""
    if holder.get("machine") != _machine():
        return None
    return _process_start(holder["process"]) == holder.get("process_start")


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on host {holder.get('host')}"


def _refusal(run: Storage, holder: dict[str, Any]) -> str:
    return (
        f"{run.uri}: {_name(holder)} has been working in this run directory since "
        f"{holder.get('since')}; wait until it ends, stop it, or name another --run-dir"
    )
