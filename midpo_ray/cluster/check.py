"""Whether a cluster file is sound, told offline: Ray's own schema, and the faults that pass it and fail, or cost money, later."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config import Config
from ..errors import UserError
from ..pipeline.cluster import Node
from .common import (
    Fault,
    Versions,
    join,
    lacking,
    schema_faults,
    secret_faults,
    strings,
    unknown_key,
    version_faults,
)
from .known import MACHINE_TYPE, NODE_CONFIG, PROVIDER, REQUIRED
from .kuberay import is_kubernetes, kubernetes_faults

TOKEN = re.compile(r"\bRAY_AUTH_MODE=[\"']?token\b")
SSH = 22


def check(
    path: str | Path, recipe: Config | None = None, *, local: Versions | None = None
) -> list[str]:
    """The faults of a Ray cluster launcher file or a Kubernetes manifest, each one line ``FILE: KEY: what is wrong``; sound: [].

    Args:
        recipe: also whether some node type offers each group that this recipe needs.
        local: the versions that the nodes must have; default: those installed here.

    Keys inside ``provider`` and ``node_config`` are known for the types aws, gcp and local; others pass Ray's schema alone.

    Raises:
        UserError: the file cannot be read, or is no mapping.
    """
    try:
        text = Path(path).read_text("utf-8")
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error.__class__.__name__}: {error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise UserError(
            f"{path}: a mapping of keys is expected, as `ray up` or `kubectl apply` reads"
        )
    local = local or Versions.local()
    faults: list[Fault] = list(secret_faults(documents, text))
    if any(is_kubernetes(d) for d in documents):
        faults += kubernetes_faults(documents, recipe, local)
    elif len(documents) > 1:
        faults.append(("", f"holds {len(documents)} documents: `ray up` reads one"))
    else:
        faults += _launcher_faults(documents[0], recipe, local)
    return [
        f"{path}: {key}: {what}" if key else f"{path}: {what}"
        for key, what in dict.fromkeys(faults)
    ]


def _launcher_faults(
    raw: dict[str, Any], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    """Of a file that `ray up` reads."""
    shape = list(schema_faults(_without(raw, "min_workers"), _ray_schema()))
    yield from shape
    if shape:
        return  # what follows would stumble over the same
    kind = raw["provider"]["type"]
    if kind not in PROVIDER:
        near = unknown_key(
            "provider", str(kind), ("aws", "gcp", "local", "azure", "vsphere", "aliyun", "external")
        )
        if "did you mean" in near[1]:
            yield "provider.type", f"{kind!r} is not a provider, {near[1].partition(', ')[2]}"
            return
    yield from _unknown_keys(raw["provider"], PROVIDER.get(kind), "provider")
    provider = list(_local_faults(raw) if kind == "local" else _cloud_faults(raw, kind))
    sizes = list(_size_faults(raw))
    yield from provider
    yield from sizes
    for path, value in strings({k: raw[k] for k in raw if k == "docker" or k.endswith("commands")}):
        yield from version_faults(path, value, local)
    if provider or sizes:
        return
    try:
        prepared = _prepare(raw)
    except Exception as error:  # whatever Ray makes of it: it would make the same of it in `ray up`
        yield "", f"Ray refuses it: {' '.join(str(error).split()) or type(error).__name__}"
        return
    yield from _start_faults(prepared, kind)
    if recipe is not None:
        if kind == "local":
            yield from lacking(recipe, _local_nodes(raw, recipe), "worker_start_ray_commands")
        else:
            yield from lacking(recipe, _cloud_nodes(prepared), "available_node_types")


def _ray_schema() -> dict[str, Any]:
    import ray

    return json.loads(
        (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text("utf-8")
    )


def _prepare(raw: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file before it asks any cloud, validated by Ray itself."""
    from ray.autoscaler._private.util import logger, prepare_config, validate_config

    logger.setLevel(logging.WARNING)  # it would tell of every default
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepared = prepare_config(json.loads(json.dumps(raw)))
        validate_config(prepared)
    return prepared


def _without(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Ray takes min_workers on top for provider local alone, and drops it before its schema sees it."""
    drop = isinstance(raw.get("provider"), dict) and raw["provider"].get("type") == "local"
    return {k: v for k, v in raw.items() if not (drop and k == key)}


def _unknown_keys(node: Any, known: Mapping[str, Any] | None, path: str) -> Iterator[Fault]:
    if known is None:
        return
    for item in node if isinstance(node, list) else [node]:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in known:
                yield unknown_key(path, str(key), known)
            else:
                yield from _unknown_keys(value, known[key], join(path, key))


def _cloud_faults(raw: dict[str, Any], kind: str) -> Iterator[Fault]:
    provider = raw["provider"]
    for key in REQUIRED.get(kind, ()):
        if not provider.get(key):
            yield f"provider.{key}", "missing"
    if not (raw.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user", "missing: the user that the machine image logs in"
    region = provider.get("region")
    shape = {"aws": r"[a-z]{2}(-[a-z]+)+-\d", "gcp": r"[a-z]+-[a-z]+\d+"}.get(kind)
    if shape and isinstance(region, str):
        if not re.fullmatch(shape, region):
            yield "provider.region", f"{region!r} is not a region of {kind}"
        for zone in str(provider.get("availability_zone") or "").split(","):
            if zone.strip() and not zone.strip().startswith(region):
                yield "provider.availability_zone", f"{zone.strip()} is not in region {region}"
    types = raw.get("available_node_types")
    if not types:
        yield "available_node_types", "missing"
        return
    if raw.get("head_node_type") not in types:
        yield (
            "head_node_type",
            f"one of {', '.join(types)} is expected, this is {raw.get('head_node_type')!r}",
        )
    for name, node in types.items():
        at = f"available_node_types.{name}.node_config"
        yield from _unknown_keys(node["node_config"], NODE_CONFIG.get(kind), at)
        machine = MACHINE_TYPE.get(kind)
        if (
            machine
            and not node["node_config"].get(machine)
            and "LaunchTemplate" not in node["node_config"]
        ):
            yield f"{at}.{machine}", "missing"


def _local_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    provider = raw["provider"]
    if not (raw.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user", "missing: the user that logs in to every machine"
    for key in ("available_node_types", "head_node_type"):
        if key in raw:
            yield key, "provider local takes none: it lists its machines in provider.worker_ips"
    if provider.get("coordinator_address"):
        if "max_workers" not in raw:
            yield "max_workers", "missing: provider.coordinator_address needs it"
        return
    for key in ("head_ip", "worker_ips"):
        if key not in provider:
            yield f"provider.{key}", "missing"
    workers = provider.get("worker_ips") or []
    for address in sorted(
        {a for a in workers if workers.count(a) > 1 or a == provider.get("head_ip")}
    ):
        yield "provider.worker_ips", f"{address} stands there twice, or is head_ip too"
    key = "max_workers" if "max_workers" in raw else "min_workers"
    if raw.get(key, 0) > len(workers):
        yield key, f"{raw[key]} is above the number of provider.worker_ips, {len(workers)}"


def _size_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    if raw.get("min_workers", 0) > raw.get("max_workers", math.inf):
        yield "min_workers", f"{raw['min_workers']} is above max_workers, {raw['max_workers']}"
    total, mins = raw.get("max_workers"), 0
    for name, node in (raw.get("available_node_types") or {}).items():
        least = node.get("min_workers", 0)
        most = node.get("max_workers", 0 if name == raw.get("head_node_type") else total)
        if most is not None and least > most:
            yield (
                f"available_node_types.{name}.min_workers",
                f"{least} is above its max_workers, {most}",
            )
        mins += least
    if total is not None and mins > total:
        yield "max_workers", f"{total} is below the sum of the node types' min_workers, {mins}"


def _start_faults(prepared: dict[str, Any], kind: str) -> Iterator[Fault]:
    """Of the commands that start Ray, as prepared: where the file has none, Ray's defaults open the dashboard to everyone."""
    lines: dict[str, str] = {}
    for key, flag in (
        ("head_start_ray_commands", "--head"),
        ("worker_start_ray_commands", "--address"),
    ):
        lines[key] = next((c for c in prepared[key] if "ray start" in c and flag in c), "")
        if not lines[key]:
            yield key, f"no command there is `ray start {flag}`"
            return
    (head_key, head), (worker_key, worker) = lines.items()
    token = {key: bool(TOKEN.search(line)) for key, line in lines.items()}
    for key, line in lines.items():
        if "0.0.0.0" in line and not token[key]:
            yield (
                key,
                "0.0.0.0 without token mode: whoever reaches it runs code here; add RAY_AUTH_MODE=token",
            )
    if token[head_key] != token[worker_key] and "0.0.0.0" not in head:
        without = worker_key if token[head_key] else head_key
        yield (
            without,
            "RAY_AUTH_MODE=token is missing, which the other start command has: the nodes would refuse each other",
        )
    if all(token.values()) and not any(
        str(p).endswith(".ray/auth_token") for p in prepared["file_mounts"]
    ):
        yield (
            "file_mounts",
            "~/.ray/auth_token: ~/.ray/auth_token is missing: token mode is on, and nodes would have no token",
        )
    if not all(token.values()):
        for i, rule in enumerate(
            prepared["provider"].get("security_group", {}).get("IpPermissions") or []
        ):
            everyone = "0.0.0.0/0" in str(rule) or "::/0" in str(rule)
            if everyone and (rule.get("FromPort"), rule.get("ToPort")) != (SSH, SSH):
                yield (
                    f"provider.security_group.IpPermissions.{i}",
                    "open to 0.0.0.0/0 without token mode",
                )
    if "--autoscaling-config" not in head:
        yield (
            head_key,
            "--autoscaling-config=~/ray_bootstrap_config.yaml is missing: no worker would ever start",
        )
    if kind == "local" and "RAY_enable_autoscaler_v2=0" not in head:
        yield (
            head_key,
            "RAY_enable_autoscaler_v2=0 is missing: version 2 counts the head as a worker, and starts one too few",
        )
    port = found[1] if (found := re.search(r"--port[= ](\d+)", head)) else "6379"
    wanted = re.search(r"RAY_HEAD_IP\}?:(\d+)", worker)
    if wanted and wanted[1] != port:
        yield worker_key, f"--address names port {wanted[1]}, the head's --port is {port}"


def _cloud_nodes(prepared: dict[str, Any]) -> list[Node]:
    """The nodes at full scale. Resources that the file leaves to the cloud to tell count as enough."""
    nodes = []
    for name, node in prepared["available_node_types"].items():
        declared = {k: float(v) for k, v in node["resources"].items()}
        resources = (
            declared if "CPU" in declared else {"CPU": math.inf, "GPU": math.inf, **declared}
        )
        count = min(node["max_workers"], prepared["max_workers"]) + (
            name == prepared["head_node_type"]
        )
        nodes += [Node(resources, node.get("labels", {})) for _ in range(min(count, 1024))]
    return nodes


def _local_nodes(raw: dict[str, Any], recipe: Config) -> list[Node]:
    """Machines whose size the file does not tell; their labels and custom resources are what the start commands speak of."""
    spoken = " ".join(raw.get("worker_start_ray_commands") or [])
    words = set(re.findall(r"[\w./-]+", spoken))
    groups = [recipe.group(stage) for stage in ("safety", "helpfulness", "router")]
    custom = {name: math.inf for g in groups for name in g.resources if name in words}
    pairs = {
        (k, v) for g in groups for k, v in g.label_selector.items() if k in spoken and v in words
    }
    count = len(raw["provider"].get("worker_ips") or []) or raw.get("max_workers", 0)
    size = {"CPU": math.inf, "GPU": math.inf, **custom}
    return [
        Node(size, labels)
        for _ in range(count)
        for labels in ({}, *({k: v} for k, v in sorted(pairs)))
    ]
