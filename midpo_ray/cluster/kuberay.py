"""Kubernetes manifests for the KubeRay operator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..config import Config
from ..errors import UserError
from .common import (
    Fault,
    Offer,
    Versions,
    join,
    lacking,
    load_schemas,
    quantity,
    schema_faults,
    strings,
    version_faults,
    violation,
)

KUBERNETES = "1.32"  # whose schemas pods are compared with; later versions' fields are refused


def kubernetes_faults(
    documents: Sequence[dict[str, Any]], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    """The faults of RayCluster and RayJob documents, and of any kind that Kubernetes knows."""
    for document in documents:
        if str(document.get("apiVersion", "ray.io/v1")).startswith("ray.io"):
            yield from _ray_faults(document, recipe, local)
        elif document.get("kind") == "Secret" and {"data", "stringData"} & document.keys():
            yield "data", "a Secret by value: use `kubectl create secret ... --from-file`"
        else:
            yield from _kubernetes_schema_faults(document, "")


def _ray_faults(
    document: dict[str, Any], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    schemas = load_schemas("kuberay.yaml")
    kind = document.get("kind")
    if kind not in ("RayCluster", "RayJob"):
        yield "kind", f"one of RayCluster, RayJob is expected, this is {kind!r}"
        return
    faults = list(schema_faults(document, schemas[kind]))
    if not faults and not document["metadata"].get("name"):
        faults.append(("metadata.name", "missing"))
    yield from faults
    if faults:
        return
    spec, at = document["spec"], "spec"
    if kind == "RayJob":
        yield from _job_faults(spec, local)
        spec, at = spec.get("rayClusterSpec"), "spec.rayClusterSpec"
    if spec:
        yield from _cluster_faults(spec, at, local)
        yield from _group_faults(spec, at, recipe, local)


def _job_faults(spec: dict[str, Any], local: Versions) -> Iterator[Fault]:
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        yield "spec.entrypoint", "missing"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "spec.rayClusterSpec", "exactly one of it and clusterSelector is expected"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        key = "spec.ttlSecondsAfterFinished"
        yield key, "has no effect without shutdownAfterJobFinishes: the cluster would stay"
    if "submitterPodTemplate" in spec:
        yield from _pod_faults(spec["submitterPodTemplate"], "spec.submitterPodTemplate", local)


def _cluster_faults(spec: dict[str, Any], at: str, local: Versions) -> Iterator[Fault]:
    if spec["rayVersion"] != local.ray:
        key = f"{at}.rayVersion"
        yield key, f"{spec['rayVersion']} differs from the local {local.ray}: they must be the same"
    head = spec["headGroupSpec"]
    # The operator's own default host is 0.0.0.0.
    host = head.get("rayStartParams", {}).get("dashboard-host", "0.0.0.0")
    private = "authOptions" in spec and spec["authOptions"].get("mode", "token") == "token"
    if host == "0.0.0.0" and not private:
        yield (
            f"{at}.authOptions",
            "0.0.0.0 without token mode lets everyone run code: add mode: token",
        )
    yield from _pod_faults(head["template"], f"{at}.headGroupSpec.template", local)


def _group_faults(
    spec: dict[str, Any], at: str, recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    seen: set[str] = set()
    offers: list[Offer] = []
    for i, group in enumerate(spec.get("workerGroupSpecs", [])):
        here, name = f"{at}.workerGroupSpecs.{i}", group["groupName"]
        least, most = group["minReplicas"], group["maxReplicas"]
        now = group.get("replicas", least)
        if least > most:
            yield f"{here}.minReplicas", f"{least} is above maxReplicas, {most}"
        elif not least <= now <= most:
            yield f"{here}.replicas", f"{now} is not between minReplicas and maxReplicas"
        elif now < most and not spec.get("enableInTreeAutoscaling"):
            yield f"{at}.enableInTreeAutoscaling", "must be true for groups to grow to maxReplicas"
        if name in seen:
            yield f"{here}.groupName", f"{name} occurs twice"
        seen.add(name)
        yield from _pod_faults(group["template"], f"{here}.template", local)
        if recipe is not None:
            try:
                offers.append(_offer(group))
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                yield here, f"its resources cannot be read ({type(error).__name__}: {error})"
                return
    if recipe is not None:
        yield from lacking(recipe, offers, f"{at}.workerGroupSpecs")


def _pod_faults(template: dict[str, Any], at: str, local: Versions) -> Iterator[Fault]:
    metadata = {"name": "pod", **(template.get("metadata") or {})}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
    faults = list(_kubernetes_schema_faults(pod, at))
    yield from faults
    if not faults:
        spec = template["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for i, container in enumerate(spec["containers"]):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    key = f"{at}.spec.containers.{i}.volumeMounts"
                    yield key, f"no volume is named {mount['name']}"
    for path, text in strings(template):
        if path.endswith(("image", "command", "args")) or ".command." in path or ".args." in path:
            yield from version_faults(join(at, path), text, local)


def _kubernetes_schema_faults(document: dict[str, Any], at: str) -> Iterator[Fault]:
    try:
        import kubernetes_validate  # an extra of the package
    except ImportError:
        raise UserError(
            "Kubernetes manifests need kubernetes-validate: pip install 'midpo_ray[kuberay]'"
        ) from None
    for key in ("apiVersion", "kind"):
        if not isinstance(document.get(key), str):
            yield join(at, key), "a text is expected"
            return
    if "spec" not in document and document["kind"] == "Pod":
        yield join(at, "spec"), "missing"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield from violation(error, at)
    except (kubernetes_validate.SchemaNotFoundError, KeyError):
        kind = f"{document['apiVersion']} {document['kind']}"
        yield join(at, "kind"), f"{kind} is not a kind of Kubernetes {KUBERNETES}"


def _offer(group: dict[str, Any]) -> Offer:
    """A group at full scale: resources of the group, its start parameters, or container limits."""
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    gpus = [quantity(value) for key, value in limits.items() if key.endswith("/gpu")]
    resources = {"CPU": quantity(limits.get("cpu")), "GPU": sum(gpus)}
    start = group.get("rayStartParams", {})
    for name, key in (("CPU", "num-cpus"), ("GPU", "num-gpus")):
        if key in start:
            resources[name] = float(start[key])
    custom = start.get("resources", "").strip("'\"").replace('\\"', '"')
    if custom:
        resources |= {key: float(value) for key, value in json.loads(custom).items()}
    resources |= {key: quantity(value) for key, value in group.get("resources", {}).items()}
    return Offer(
        resources, group.get("labels", {}), group["maxReplicas"] * group.get("numOfHosts", 1)
    )
