"""The Ray cluster: connecting to one, and whether it can hold a stage's workers."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Group
from ..errors import UserError

# Read by Ray Train when the driver imports it: failures are seen within a fifth of a second instead of two seconds, an elastic
# group tries with fewer workers after 10 s instead of 60, and notices to nodes are this package's own business (watch.py).
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
RETURN = 60.0  # seconds that a node which died may take to come back, also where resources_timeout is less (ours)
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}
QUIET_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}  # Ray's own talk stays in its logs


@dataclass
class Node:
    """What one node offers, or has left while bundles are being placed."""

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)

    def holds(self, bundle: Mapping[str, float], selector: Mapping[str, str]) -> bool:
        labelled = all(self.labels.get(k) == v for k, v in selector.items())
        return labelled and all(
            self.resources.get(k, 0.0) >= v - 1e-9 for k, v in bundle.items() if v > 0
        )


def bundle(group: Group) -> dict[str, float]:
    """Resources of one worker of the group, under Ray's names."""
    return {"CPU": group.cpus_per_worker, "GPU": group.gpus_per_worker, **group.resources}


def scaling(group: Group, workers: int | tuple[int, int]) -> Any:
    """Ray Train's ScalingConfig of a group's workers."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=workers,
        use_gpu=group.gpus_per_worker > 0,
        resources_per_worker=bundle(group),
        label_selector=dict(group.label_selector) or None,
    )


def hold(groups: Sequence[Group], nodes: Sequence[Node]) -> Group | None:
    """The first group that the nodes cannot hold, all groups at the same time; None where they hold them all.

    Groups with the tighter demands are placed first, each worker on the fullest node that takes it.
    """
    free = [Node(dict(n.resources), n.labels) for n in nodes]
    for group in sorted(
        groups,
        key=lambda g: (
            -len(g.label_selector) - len(g.resources),
            -g.gpus_per_worker,
            -g.cpus_per_worker,
        ),
    ):
        need = bundle(group)
        for _ in range(group.min_workers):
            fitting = [n for n in free if n.holds(need, group.label_selector)]
            if not fitting:
                return group
            node = min(
                fitting, key=lambda n: (n.resources.get("GPU", 0.0), n.resources.get("CPU", 0.0))
            )
            for name, amount in need.items():
                node.resources[name] = node.resources.get(name, 0.0) - amount
    return None


def missing(stage: str, group: Group, nodes: Sequence[Node]) -> str:
    """One line that names what the cluster lacks for a stage's group."""
    need = ", ".join(f"{v:g} {k}" for k, v in bundle(group).items() if v > 0)
    where = f" on nodes labelled {group.label_selector}" if group.label_selector else ""
    have = "; ".join(
        ", ".join(
            f"{n.resources.get(k, 0):g} {k}"
            for k in bundle(group)
            if n.resources.get(k, 0) or k == "CPU"
        )
        + (f" {n.labels}" if n.labels and group.label_selector else "")
        for n in nodes
    )
    asked = f"group of stage {stage}: {group.min_workers} worker(s) of {need}{where}"
    return f"{asked} are needed, the cluster's nodes have: {have or 'nothing'}"


def nodes() -> list[Node]:
    """The live nodes of the connected cluster."""
    import ray

    shown = ("ray.io/",)  # Ray's own labels say nothing to a user
    return [
        Node(
            dict(n["Resources"]),
            {k: v for k, v in n.get("Labels", {}).items() if not k.startswith(shown)},
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def connect(address: str | None) -> Any:
    """Connect to a cluster: ``auto`` (one that runs here or RAY_ADDRESS), a host, or ``local``/None for one of our own."""
    for name, value in {**TRAIN_ENVIRONMENT, **WORKER_ENVIRONMENT, **QUIET_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    if address in (None, "local"):
        _keep_private()
    import ray

    if ray.is_initialized():  # a caller's own cluster
        return None
    environment = {
        k: os.environ[k]
        for k in (*WORKER_ENVIRONMENT, "HF_HUB_OFFLINE", "HF_HOME")
        if k in os.environ
    }
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
    }
    try:
        if address in (None, "local"):
            return ray.init(address="local", include_dashboard=False, **options)
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})"
        ) from None


def _keep_private() -> None:
    """Before Ray is imported: a cluster of our own listens on 127.0.0.1 alone, and its token is its owner's alone.

    Ray turns token mode on for such a cluster, and would write a new token readable by all; so one is written first.
    """
    # the one switch, on Linux too, that keeps Ray's ports from other addresses
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    with contextlib.suppress(FileExistsError, PermissionError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def disconnect() -> None:
    import ray

    ray.shutdown()


def wait_for(
    stages: Sequence[tuple[str, Group]], timeout: float, say: Callable[[str], None]
) -> None:
    """Return when the cluster can hold each stage's group by itself; after ``timeout`` seconds an error names what is missing."""
    deadline = time.monotonic() + timeout
    told = False
    try:
        while True:
            there = nodes()
            lacking = next((s for s in stages if hold([s[1]], there) is not None), None)
            if lacking is None:
                return
            line = missing(*lacking, there)
            if time.monotonic() >= deadline:
                raise UserError(line + (f" (waited {timeout:g} s)" if timeout else ""))
            if not told:
                say(f"waiting up to {timeout:g} s: {line}")
                told = True
                _ask_for([group for _, group in stages])
            time.sleep(min(2.0, max(0.0, deadline - time.monotonic())))
    finally:
        if told:
            _ask_for([])  # or the autoscaler would keep what nobody waits for


def _ask_for(groups: Sequence[Group]) -> None:
    """Let an autoscaler start nodes for these groups, all at once; none: what was asked for before is no longer needed."""
    from ray.autoscaler.sdk import request_resources

    bundles = [bundle(g) for g in groups for _ in range(g.min_workers)]
    labels = [dict(g.label_selector) for g in groups for _ in range(g.min_workers)]
    request_resources(bundles=bundles, bundle_label_selectors=labels)


class Patience:
    """How long a stage that runs may lack its group's nodes: Train itself would wait for ever.

    Args:
        timeout: ``cluster.resources_timeout``.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        timeout: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self.say, self.clock = max(timeout, RETURN), say, clock
        self.since: dict[str, float] = {}

    def over(self, stage: str, group: Group, there: Sequence[Node]) -> UserError | None:
        """The error that ends the wait, or None; to be asked now and then, with the nodes that live."""
        if hold([group], there) is None:
            self.since.pop(stage, None)
            return None
        line = missing(stage, group, there)
        if stage not in self.since:
            self.since[stage] = self.clock()
            self.say(f"a node is gone, waiting up to {self.limit:g} s: {line}")
        waited = self.clock() - self.since[stage]
        return (
            UserError(f"{line} (waited {waited:.0f} s); the same command goes on when they are")
            if waited >= self.limit
            else None
        )
