"""How a job API is reached: its URL, an SSH tunnel, a token."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import requests

from ..errors import UserError

RAY = (sys.executable, "-m", "ray.scripts.scripts")  # the `ray` command of this environment
_TUNNEL_SECONDS = 60


@contextlib.contextmanager
def reach(cluster: str | None, address: str | None) -> Iterator[str]:
    """The URL of a job API: ``address``, or a cluster file's head by the tunnel of `ray dashboard`.

    Raises:
        UserError: not exactly one of both is given, or the head is not reached by SSH.
    """
    if (cluster is None) == (address is None):
        raise UserError("one of --cluster FILE and --address URL is expected")
    if address is not None:
        if not re.match(r"https?://[^/]+", address):
            raise UserError(f"--address {address}: http://HOST:PORT is expected, usually port 8265")
        yield address.rstrip("/")
        return
    assert cluster is not None
    if not Path(cluster).is_file():
        raise UserError(f"--cluster {cluster}: no such file")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*RAY, "dashboard", cluster, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        tunnel = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + _TUNNEL_SECONDS
            while not _listens(port):
                if tunnel.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    why = last_line(log.read().decode(errors="replace")) or "no answer"
                    raise UserError(f"--cluster {cluster}: its head is not reached by SSH ({why})")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tunnel.pid, signal.SIGTERM)
            tunnel.wait()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()


def read_token() -> str | None:
    """The cluster's token from its file; None where there is no file.

    Raises:
        UserError: other users can read the file.
    """
    path = token_path()
    if not path.is_file():
        return None
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path}: others can read it: chmod 600 {path}")
    return path.read_text("utf-8").strip()


def check_private(url: str, token: str | None) -> None:
    """Refuse a job API that other machines reach and that answers without a token.

    Raises:
        UserError: it is open, there is no token here, or nothing answers.
    """
    if loopback(url) or (token is not None and not _open_to_all(url)):
        return
    raise UserError(
        f"{url}: a job API that others reach must ask for a token (RAY_AUTH_MODE=token on its "
        f"nodes, the token in {token_path()}); --insecure submits all the same"
    )


def loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_to_all(url: str) -> bool:
    try:
        answer = requests.get(f"{url}/api/jobs/", timeout=10, allow_redirects=False)
    except requests.exceptions.RequestException as error:
        raise UserError(f"{url}: no job API answers there ({type(error).__name__})") from None
    return answer.status_code == 200
