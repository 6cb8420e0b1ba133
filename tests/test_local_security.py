"""A run's own cluster is closed to others: ports on 127.0.0.1, token mode, a private token."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
PROBE = """
import subprocess
from midpo_ray.pipeline.cluster import connect, disconnect
connect("local")
import os
print("mode", os.environ.get("RAY_AUTH_MODE"))
print(subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout)
disconnect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import ray, ray.data\n"], ids=["plain", "ray first"])
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ss"),
    reason="needs root and ss (iproute2) for a network of its own",
)
def test_local_cluster_listens_on_loopback_alone(tmp_path, first):
    """In a network namespace with a routable address, which Ray would prefer."""
    network = (
        "ip link set lo up && ip link add d0 type veth peer name d1 && "
        "ip addr add 10.77.9.9/24 dev d0 && "
        "ip link set d0 up && ip link set d1 up && ip route add default via 10.77.9.1"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(tmp_path)
    }
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", f'{network} && exec "$0" -c "$1"', sys.executable, first + PROBE],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    mode, *sockets = [line for line in done.stdout.splitlines() if line]
    addresses = {line.split()[3].rpartition(":")[0] for line in sockets}
    assert mode == "mode token"
    assert addresses <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
    assert len(sockets) > 3  # the probe saw Ray
    assert oct((tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777) == "0o600"
