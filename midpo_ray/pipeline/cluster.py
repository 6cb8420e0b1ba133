"""The Ray cluster: connecting to one, and whether its nodes can hold a stage's workers."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Group
from ..errors import MachineError, UserError
from ..user_code import USER_FOLDERS, user_folders

log = logging.getLogger(__name__)

# Ray Train reads these when it is imported: workers' health is polled every 0.2 s (default 2), an
# elastic group starts with fewer workers after 10 s (default 60), and Train's own preemption
# watcher is off because watch.py handles nodes that are drained.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_ANSWER = 10.0  # seconds for a cluster to accept a connection
RETURN = 60.0  # seconds that a lost node may take to return, also where resources_timeout is less
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}
QUIET_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}  # Ray's own messages stay in its logs


_LONGEST_TEMPORARY = 38  # characters: Ray adds 69 for its sockets, a path has at most 107


@dataclass
class Node:
    """The resources of one node, or what is left of them while workers are being placed."""

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
    """The first group that the nodes cannot hold beside the others; None where they hold all.

    Groups with tighter demands are placed first, each worker on the fullest node that holds it.
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

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            labels = node.get("Labels", {}).items()
            own = {
                k: v for k, v in labels if not k.startswith("ray.io/")
            }  # not those that Ray adds
            found.append(Node(dict(node["Resources"]), own))
    return found


def _job_config() -> Any:
    """Ray's settings of a job, without the working directory on the ``sys.path`` of its workers.

    Ray would put it first, and every worker would execute a file in it that is named like a
    library. ``user_code`` appends it where a user names a function.
    """
    from ray.job_config import JobConfig

    package = Path(__file__).parent.parent.parent
    installed = package.name in ("site-packages", "dist-packages")
    config = JobConfig(_py_driver_sys_path=[] if installed else [str(package)])
    config._runtime_env_has_working_dir = lambda: True  # Ray's own condition for leaving it out
    return config


def connect(address: str | None) -> Any:
    """Connect to a Ray cluster.

    Args:
        address: ``local`` or None for one of our own, ``auto`` for one that runs here or that
            RAY_ADDRESS names, or a host. A caller's connection is used whatever the address.

    Returns:
        Ray's context of a new connection, which the caller ends by ``disconnect``; None where the
        process was connected before.

    Raises:
        UserError: no cluster answers at the address.
        MachineError: a cluster of our own does not start, in two attempts.
    """
    for name, value in {**TRAIN_ENVIRONMENT, **WORKER_ENVIRONMENT, **QUIET_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    local = address in (None, "local")
    if local:  # before Ray is imported, which reads it then
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        return None
    passed_on = (*WORKER_ENVIRONMENT, "HF_HUB_OFFLINE", "HF_HOME")
    variables = {name: os.environ[name] for name in passed_on if name in os.environ}
    variables[USER_FOLDERS] = user_folders()
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": variables},
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
        "job_config": _job_config(),
    }
    if local:
        return _start(options)
    _check_that_it_answers(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    try:
        return ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({_first_line(error)})"
        ) from None


def _check_that_it_answers(address: str | None) -> None:
    """Raise UserError where nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({_first_line(error)})"
        ) from None


def _start(options: dict[str, Any]) -> Any:
    """A cluster of our own, which only this user's processes on this machine can reach."""
    import ray
    from ray._private import ray_constants

    # The one switch that keeps all of Ray's ports on 127.0.0.1. Ray reads its environment variable
    # when it is imported, which may have been before ``connect``.
    ray_constants.ENABLE_RAY_CLUSTER = False
    _keep_token_private()
    for attempt in (1, 2):
        try:
            session = ray.init(
                address="local", include_dashboard=False, _temp_dir=_short_folder(), **options
            )
            break
        except UserError:
            raise
        except Exception as error:  # Ray raises bare exceptions when a node is slow to start
            ray.shutdown()
            if attempt == 2:
                raise MachineError(
                    f"Ray does not start on this machine ({_first_line(error)}); it may be "
                    "overloaded or lack memory or disk space"
                ) from error
            log.warning("Ray did not start (%s), trying once more", _first_line(error))
    open_to = {node["NodeManagerAddress"] for node in ray.nodes()} - {"127.0.0.1"}
    if open_to:
        ray.shutdown()
        raise UserError(
            f"Ray {ray.__version__} listens on {', '.join(open_to)} instead of 127.0.0.1 alone: "
            "start a cluster with `ray start` and name it by --address"
        )
    return session


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _short_folder() -> str | None:
    """A folder for Ray's sockets where TMPDIR is too long for their paths; None: Ray's choice."""
    if len(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) <= _LONGEST_TEMPORARY:
        return None
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        if os.access(folder, os.W_OK):
            return f"{folder}/ray-{os.getuid()}"
    raise UserError(
        f"TMPDIR {tempfile.gettempdir()} is too long for Ray's sockets: name a folder of at most "
        f"{_LONGEST_TEMPORARY} characters"
    )


def _keep_token_private() -> None:
    """Write the cluster's token so that its owner alone can read it.

    Ray turns its token mode on for a cluster of our own, and would write a token that all can read.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    try:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_token(path)
    except FileExistsError:
        return
    except (OSError, RuntimeError):  # a home that is read-only, or none
        path = Path(tempfile.mkdtemp(prefix="midpo-")) / "auth_token"
        _write_token(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _write_token(path: Path) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def disconnect() -> None:
    import ray

    ray.shutdown()


class Shortages:
    """How long the cluster has lacked nodes for each stage's group.

    Args:
        limit: seconds to wait; Ray itself would wait for ever.
        clock: monotonic seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self.since: dict[str, float] = {}

    def check(self, stage: str, group: Group, available: Sequence[Node]) -> None:
        """Note whether the nodes can hold the group; to be called regularly.

        Raises:
            UserError: they could not for ``limit`` seconds; the message names what is missing.
        """
        if hold([group], available) is None:
            self.since.pop(stage, None)
            return
        line = missing(stage, group, available)
        if stage not in self.since:
            self.since[stage] = self.clock()
            if self.limit:
                log.warning("waiting up to %g s: %s", self.limit, line)
        waited = self.clock() - self.since[stage]
        if waited >= self.limit:
            raise UserError(f"{line} (waited {waited:.0f} s); the same command resumes")


def wait_for(stages: Sequence[tuple[str, Group]], timeout: float) -> None:
    """Return when the cluster's nodes can hold each stage's group by itself.

    Raises:
        UserError: they cannot after ``timeout`` seconds; the message names what is missing.
    """
    shortages, is_asked = Shortages(timeout), False
    try:
        while True:
            available = nodes()
            for stage, group in stages:
                shortages.check(stage, group, available)
            if not shortages.since:
                return
            if not is_asked:
                is_asked = True
                _ask_for([group for _, group in stages])
            time.sleep(min(2.0, timeout))
    finally:
        if is_asked:
            _ask_for([])  # or the autoscaler would keep nodes that nobody waits for


def _ask_for(groups: Sequence[Group]) -> None:
    """Ask an autoscaler for nodes that hold these groups, instead of those of the last call."""
    from ray.autoscaler.sdk import request_resources  # as Ray itself

    bundles = [bundle(g) for g in groups for _ in range(g.min_workers)]
    labels = [dict(g.label_selector) for g in groups for _ in range(g.min_workers)]
    request_resources(bundles=bundles, bundle_label_selectors=labels)
