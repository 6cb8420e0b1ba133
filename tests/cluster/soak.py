"""Kill after kill at random times in one run of the miniature: it must finish, with the undisturbed run's files and no others.

python tests/cluster/soak.py [KILLS]     (default 20; root, and the packages that `make test-cluster` needs)
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from faultrun import STAGES, Run
from hosts import Hosts
from launch import HEAD, NAMES, WORKERS, prepare, up, wait_for_nodes

STEPS = 800
SETTINGS = " ".join(
    f"{s}.optim.steps={STEPS}" for s in ("experts.safety", "experts.helpfulness", "router")
)
CLUSTER = "checkpoint.every_steps=20 cluster.max_failures=1000 cluster.resources_timeout=300 evaluate=null"
PLACED = " ".join(f"experts.{w}.group.label_selector='{{midpo-group: {w}}}'" for w in WORKERS)
KINDS = ("worker", "raylet", "host", "driver")


def run_of(hosts: Hosts, name: str) -> Run:
    run = Run(hosts, name)
    run.command = f"midpo run miniature {SETTINGS} {CLUSTER} {PLACED} --run-dir {run.place}"
    return run


def kill(hosts: Hosts, run: Run, kind: str, where: str) -> None:
    host = hosts[where]
    if kind == "driver":
        run.kill()
        run.start()
    elif kind == "host":
        host.kill()
        hosts.boot(where)
        hosts.wait(where)
    else:
        found = host.processes({"worker": "RayTrainWorker", "raylet": "raylet/raylet"}[kind])
        host.run(f"kill -9 {' '.join(map(str, found))}" if found else "true", check=False)


def soak(kills: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder) / "hosts", NAMES) as hosts:
        prepare(hosts)
        print(f"three nodes in {up(hosts):.0f} s", flush=True)
        begun = time.monotonic()
        base = run_of(hosts, "base").start()
        base.end(seconds=3600)
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
        begun = time.monotonic()
        run = run_of(hosts, "soak").start()
        for number in range(kills):
            time.sleep(random.uniform(2, 25))
            assert run.process is not None
            if run.process.poll() is not None:
                raise SystemExit(f"ended before kill {number + 1}: {run.said()}")
            kind, where = random.choice(KINDS), random.choice(WORKERS)
            print(
                f"{time.monotonic() - begun:5.0f} s: kill {number + 1}, {kind} on {HEAD if kind == 'driver' else where}",
                flush=True,
            )
            kill(hosts, run, kind, where)
            wait_for_nodes(
                hosts, 2, time.monotonic() + 300
            )  # Ray's monitor sets a host up again, one try after another
        run.end(seconds=3600)
        print(f"finished after {time.monotonic() - begun:.0f} s", flush=True)
        assert all(run.weights(s) == base.weights(s) for s in STAGES), "adapters differ"
        assert all(run.metrics(s) == base.metrics(s) for s in (*STAGES, "router")), "metrics differ"
        assert run.files() == base.files(), run.files() ^ base.files()
        print(f"{kills} kills: adapters and metrics are bit-identical, no file is left over")


if __name__ == "__main__":
    soak(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
