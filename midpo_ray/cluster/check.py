"""Whether a cluster file is sound, found offline.

Ray's own schema passes files that fail, or cost money, later: keys that nobody reads, nodes that
never start, dashboards that are open to everyone, versions that differ.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..config import Config
from ..errors import UserError
from .common import (
    Fault,
    Offer,
    Versions,
    lacking,
    load_schemas,
    schema_faults,
    secret_faults,
    strings,
    version_faults,
    without_nulls,
)
from .kuberay import kubernetes_faults

_MACHINE = {"aws": "InstanceType", "gcp": "machineType"}
_PROVIDERS = ["aws", "gcp", "local", "azure", "vsphere", "aliyun", "external"]
_TOKEN = re.compile(r"\bRAY_AUTH_MODE=[\"']?token\b")
_SSH = 22


def check(
    path: str | Path, recipe: Config | None = None, *, local: Versions | None = None
) -> list[str]:
    """The faults of a cluster launcher file or a Kubernetes manifest, each ``FILE: KEY: fault``.

    Keys inside ``provider`` and ``node_config`` are known for the types aws, gcp and local.

    Args:
        recipe: also check that some nodes offer each group that this recipe needs.
        local: the versions that the nodes must have; default: those installed here.

    Raises:
        UserError: the file cannot be read, or is not a mapping.
    """
    try:
        text = Path(path).read_text("utf-8")
        documents = [without_nulls(d) for d in yaml.safe_load_all(text) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error.__class__.__name__}: {error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not documents or not all(isinstance(d, dict) for d in documents):
        raise UserError(f"{path}: a mapping of keys is expected, as `ray up` or `kubectl` read")
    local = local or Versions.local()
    faults: list[Fault] = list(secret_faults(documents, text))
    if any("apiVersion" in d or "kind" in d for d in documents):
        faults += kubernetes_faults(documents, recipe, local)
    elif len(documents) > 1:
        faults.append(("", f"holds {len(documents)} documents: `ray up` reads one"))
    else:
        faults += _launcher_faults(documents[0], recipe, local)
    return [
        f"{path}: {key}: {what}" if key else f"{path}: {what}" for key, what in dict(faults).items()
    ]


def _launcher_faults(
    raw: dict[str, Any], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    """The faults of a file that `ray up` reads. Later checks rely on what earlier ones found."""
    schema = _ray_schema()
    if isinstance(raw.get("provider"), dict) and raw["provider"].get("type") == "local":
        # Ray drops this key of provider local before its schema sees the file.
        schema["properties"]["min_workers"] = schema["properties"]["max_workers"]
    faults = list(schema_faults(raw, schema))
    if not faults:
        faults = [*_provider_faults(raw), *_size_faults(raw)]
        commands = {k: raw[k] for k in raw if k == "docker" or k.endswith("commands")}
        for path, value in strings(commands):
            faults += version_faults(path, value, local)
    yield from faults
    if faults:
        return
    try:
        prepared = _prepare(raw)
    except Exception as error:  # Ray's own validation raises whatever it meets
        yield "", f"Ray refuses it: {' '.join(str(error).split()) or type(error).__name__}"
        return
    yield from _start_faults(prepared)
    if recipe is not None and raw["provider"]["type"] == "local":
        yield from lacking(recipe, _machines(raw, recipe), "worker_start_ray_commands")
    elif recipe is not None:
        yield from lacking(recipe, _node_types(prepared), "available_node_types")


def _ray_schema() -> dict[str, Any]:
    import ray  # slow to import

    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text("utf-8"))


def _prepare(raw: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file before it asks a cloud, validated by Ray itself."""
    from ray.autoscaler._private.util import logger, prepare_config, validate_config

    logger.setLevel(logging.WARNING)  # Ray reports every default
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepared = prepare_config(json.loads(json.dumps(raw)))
        validate_config(prepared)
    return prepared


def _provider_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    provider, kind = raw["provider"], raw["provider"]["type"]
    schemas = load_schemas("launcher.yaml")
    if not (raw.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user", "missing: the user that logs in to the nodes"
    if kind not in schemas:
        yield from schema_faults(
            {"type": kind}, {"properties": {"type": {"enum": _PROVIDERS}}}, "provider"
        )
        return
    schema = schemas[kind]["properties"]
    yield from schema_faults(provider, schema["provider"], "provider")
    if kind == "local":
        yield from _machine_faults(raw)
        return
    region = str(provider.get("region") or "")
    for zone in str(provider.get("availability_zone") or "").replace(",", " ").split():
        if not zone.startswith(region):
            yield "provider.availability_zone", f"{zone} is not in region {region}"
    types = raw.get("available_node_types") or {}
    if raw.get("head_node_type") not in types:
        known = ", ".join(types) or "available_node_types, which has none,"
        yield "head_node_type", f"one of {known} is expected, this is {raw.get('head_node_type')!r}"
    for name, node in types.items():
        settings, at = node["node_config"], f"available_node_types.{name}.node_config"
        yield from schema_faults(settings, schema["node_config"], at)
        if not settings.get(_MACHINE[kind]) and "LaunchTemplate" not in settings:
            yield f"{at}.{_MACHINE[kind]}", "missing"


def _machine_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    """The faults of a file that lists its machines (provider local)."""
    provider = raw["provider"]
    for key in ("available_node_types", "head_node_type"):
        if key in raw:
            yield key, "not for provider local, which lists its machines in provider.worker_ips"
    if provider.get("coordinator_address"):
        if "max_workers" not in raw:
            yield "max_workers", "missing: provider.coordinator_address needs it"
        return
    for key in ("head_ip", "worker_ips"):
        if key not in provider:
            yield f"provider.{key}", "missing"
    workers = provider.get("worker_ips") or []
    machines = [*workers, provider.get("head_ip")]
    for address in sorted({a for a in workers if machines.count(a) > 1}):
        yield "provider.worker_ips", f"{address} is listed twice, or is head_ip too"
    key = "max_workers" if "max_workers" in raw else "min_workers"
    if raw.get(key, 0) > len(workers):
        yield key, f"{raw[key]} is above the number of provider.worker_ips, {len(workers)}"


def _size_faults(raw: dict[str, Any]) -> Iterator[Fault]:
    total = raw.get("max_workers", math.inf)
    if raw.get("min_workers", 0) > total:
        yield "min_workers", f"{raw['min_workers']} is above max_workers, {total}"
    least_of_all = 0
    for name, node in (raw.get("available_node_types") or {}).items():
        least = node.get("min_workers", 0)
        most = node.get("max_workers", 0 if name == raw.get("head_node_type") else total)
        if least > most:
            key = f"available_node_types.{name}.min_workers"
            yield key, f"{least} is above its max_workers, {most}"
        least_of_all += least
    if least_of_all > total:
        yield "max_workers", f"{total} is below the sum of all min_workers, {least_of_all}"


def _start_faults(prepared: dict[str, Any]) -> Iterator[Fault]:
    """The faults of the commands that start Ray; Ray's default ones open the dashboard to all."""
    flags = {"head_start_ray_commands": "--head", "worker_start_ray_commands": "--address"}
    lines: dict[str, str] = {}
    for key, flag in flags.items():
        lines[key] = next((c for c in prepared[key] if "ray start" in c and flag in c), "")
        if not lines[key]:
            yield key, f"no command is `ray start {flag}`"
            return
    (head_key, head), (worker_key, worker) = lines.items()
    private = {key: bool(_TOKEN.search(line)) for key, line in lines.items()}
    for key, line in lines.items():
        if "0.0.0.0" in line and not private[key]:
            yield key, "0.0.0.0 without token mode lets everyone run code: add RAY_AUTH_MODE=token"
    if private[head_key] != private[worker_key] and "0.0.0.0" not in head:
        key = worker_key if private[head_key] else head_key
        yield key, "RAY_AUTH_MODE=token is missing, but the other start command has it"
    mounted = [str(path) for path in prepared["file_mounts"]]
    if all(private.values()) and not any(p.endswith(".ray/auth_token") for p in mounted):
        yield (
            "file_mounts",
            "~/.ray/auth_token: ~/.ray/auth_token is missing, which token mode needs",
        )
    group = prepared["provider"].get("security_group", {})
    for i, rule in enumerate(group.get("IpPermissions") or []):
        everyone = "0.0.0.0/0" in str(rule) or "::/0" in str(rule)
        is_ssh = (rule.get("FromPort"), rule.get("ToPort")) == (_SSH, _SSH)
        if everyone and not is_ssh and not all(private.values()):
            key = f"provider.security_group.IpPermissions.{i}"
            yield key, "open to 0.0.0.0/0 without token mode"
    if "--autoscaling-config" not in head:
        yield (
            head_key,
            "--autoscaling-config=~/ray_bootstrap_config.yaml is missing: no worker starts",
        )
    if prepared["provider"]["type"] == "local" and "RAY_enable_autoscaler_v2=0" not in head:
        yield (
            head_key,
            "RAY_enable_autoscaler_v2=0 is missing: version 2 counts the head as a worker",
        )
    port = re.search(r"--port[= ](\d+)", head)
    wanted = re.search(r"RAY_HEAD_IP\}?:(\d+)", worker)
    head_port = port[1] if port else "6379"
    if wanted and wanted[1] != head_port:
        yield worker_key, f"--address names port {wanted[1]}, but the head's --port is {head_port}"


def _node_types(prepared: dict[str, Any]) -> list[Offer]:
    """The nodes of a cloud; resources that the file leaves to the cloud count as enough."""
    offers = []
    for name, node in prepared["available_node_types"].items():
        declared = {key: float(value) for key, value in node["resources"].items()}
        if "CPU" not in declared:
            declared = {"CPU": math.inf, "GPU": math.inf, **declared}
        count = min(node["max_workers"], prepared["max_workers"])
        count += name == prepared["head_node_type"]
        offers.append(Offer(declared, node.get("labels", {}), count))
    return offers


def _machines(raw: dict[str, Any], recipe: Config) -> list[Offer]:
    """Machines of unknown size, with the labels and resources that the start commands name."""
    commands = " ".join(raw.get("worker_start_ray_commands") or [])
    words = set(re.findall(r"[\w./-]+", commands))
    groups = [recipe.group(stage) for stage in ("safety", "helpfulness", "router")]
    size = {"CPU": math.inf, "GPU": math.inf}
    labels: list[dict[str, str]] = [{}]
    for group in groups:
        size |= {name: math.inf for name in group.resources if name in words}
        named = {k: v for k, v in group.label_selector.items() if k in commands and v in words}
        labels.append(named)
    count = len(raw["provider"].get("worker_ips") or []) or raw.get("max_workers", 0)
    return [Offer(size, selector, count) for selector in labels]
