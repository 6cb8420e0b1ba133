"""``midpo doctor``: what is installed, what the cluster has, and what would fail."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "pyarrow")
OPTIONAL = {"wandb": "logging.wandb", "mlflow": "logging.mlflow"}


def examine(address: str | None = None) -> str:
    """A report, one line per finding; a line that begins with ``!`` can make a run fail."""
    lines = [f"python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"! {name} is not installed: pip install midpo_ray")
    for name, key in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            lines.append(f"{name} is not installed (only {key} needs it)")
    lines += _machine()
    lines += _cluster(address)
    return "\n".join(lines)


def _machine() -> list[str]:
    import torch

    lines = [f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("torch sees no GPU: stages run on CPUs (gpus_per_worker must be 0)")
    free = shutil.disk_usage(".").free / 2**30
    lines.append(f"{'! only ' if free < 5 else ''}{free:.0f} GiB free in this folder")
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0
    lines.append(
        f"{'! only ' if shared < 1 else ''}{shared:.1f} GiB free in /dev/shm (Ray's object store)"
    )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        lines.append("HF_HUB_OFFLINE=1: models and data come only from local folders or the cache")
    return lines


def _cluster(address: str | None) -> list[str]:
    from .errors import MachineError, UserError
    from .pipeline import cluster

    try:
        session = cluster.connect(address)
    except (UserError, MachineError) as error:
        return [f"! {error}"]
    try:
        nodes = cluster.nodes()
        lines = [f"cluster ({address or 'local'}): {len(nodes)} node(s)"]
        for node in nodes:
            own = ("node:", "object_store", "memory")  # resources that Ray itself adds
            amounts = [
                f"{v:g} {k}" for k, v in sorted(node.resources.items()) if not k.startswith(own)
            ]
            lines.append(f"  {', '.join(amounts)} {node.labels or ''}".rstrip())
        return lines
    finally:
        if session is not None:
            cluster.disconnect()
