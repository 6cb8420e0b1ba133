"""Kubernetes manifests for the KubeRay operator: a schema of their own (KubeRay publishes none as a package), and their pods'."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import Config
from ..errors import UserError
from ..pipeline.cluster import Node
from .common import Fault, Versions, explain, join, lacking, schema_faults, strings, version_faults

KUBERNETES = "1.32"  # the version whose schemas pods are held against: fields of later ones are refused (ours)


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


_TEXT, _FLAG, _ANY = {"type": "string", "minLength": 1}, {"type": "boolean"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {
    "type": "object",
    "additionalProperties": {"type": "string"},
}  # rayStartParams are texts: a bare number is refused

_HEAD = _object(
    {
        "template": _ANY,
        "rayStartParams": _TEXTS,
        "headService": _ANY,
        "enableIngress": _FLAG,
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "labels": _TEXTS,
        "resources": _TEXTS,
    },
    "template",
)
_WORKERS = _object(
    {
        "groupName": _TEXT,
        "replicas": _COUNT,
        "minReplicas": _COUNT,
        "maxReplicas": _COUNT,
        "numOfHosts": {"type": "integer", "minimum": 1},
        "idleTimeoutSeconds": _COUNT,
        "suspend": _FLAG,
        "scaleStrategy": _ANY,
        "template": _ANY,
        "rayStartParams": _TEXTS,
        "labels": _TEXTS,
        "resources": _TEXTS,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
)
_CLUSTER = _object(
    {
        "rayVersion": _TEXT,
        "authOptions": _object(
            {
                "mode": {"enum": ["token", "disabled"]},
                "secretName": _TEXT,
                "enableK8sTokenAuth": _FLAG,
            },
        ),
        "enableInTreeAutoscaling": _FLAG,
        "autoscalerOptions": _object(
            {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": _COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "image": _TEXT,
                "imagePullPolicy": _TEXT,
                "securityContext": _ANY,
                "resources": _ANY,
                "env": {"type": "array"},
                "envFrom": {"type": "array"},
                "volumeMounts": {"type": "array"},
                "command": {"type": "array"},
                "args": {"type": "array"},
            }
        ),
        "gcsFaultToleranceOptions": _ANY,
        "headServiceAnnotations": _TEXTS,
        "headGroupSpec": _HEAD,
        "workerGroupSpecs": {"type": "array", "items": _WORKERS},
        "suspend": _FLAG,
        "managedBy": _TEXT,
        "upgradeStrategy": _ANY,
        "networkPolicy": _ANY,
        "tlsOptions": _ANY,
    },
    "rayVersion",
    "headGroupSpec",
)
_JOB = _object(
    {
        "entrypoint": _TEXT,
        "rayClusterSpec": _ANY,  # by _CLUSTER, with its own path
        "clusterSelector": _TEXTS,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": _ANY,
        "submitterConfig": _object({"backoffLimit": _COUNT}),
        "backoffLimit": _COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "preRunningDeadlineSeconds": {"type": "integer", "minimum": 1},
        "ttlSecondsAfterFinished": _COUNT,
        "shutdownAfterJobFinishes": _FLAG,
        "deletionStrategy": _ANY,
        "runtimeEnvYAML": _TEXT,
        "entrypointNumCpus": {"type": "number", "minimum": 0},
        "entrypointNumGpus": {"type": "number", "minimum": 0},
        "entrypointResources": _TEXT,
        "metadata": _TEXTS,
        "jobId": _TEXT,
        "suspend": _FLAG,
        "managedBy": _TEXT,
    }
)
_DOCUMENT = _object(
    {
        "apiVersion": {"enum": ["ray.io/v1"]},
        "kind": {"enum": ["RayCluster", "RayJob"]},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
        "spec": _ANY,
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def is_kubernetes(document: Mapping[str, Any]) -> bool:
    return "apiVersion" in document or "kind" in document


def kubernetes_faults(
    documents: Sequence[dict[str, Any]], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    """Of RayCluster and RayJob documents by the schema above; of any other kind, and of pods, by Kubernetes' own."""
    for document in documents:
        api = document.get("apiVersion", "ray.io/v1")
        if str(api).startswith("ray.io"):
            yield from _ray_faults(document, recipe, local)
        elif document.get("kind") == "Secret" and (
            document.get("data") or document.get("stringData")
        ):
            yield "data", "a Secret by value: make it with `kubectl create secret ... --from-file`"
        else:
            yield from _by_kubernetes(document, "")


def _ray_faults(
    document: dict[str, Any], recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    shape = list(schema_faults(document, _DOCUMENT))
    yield from shape
    if shape:
        return
    spec, at = document["spec"], "spec"
    if document["kind"] == "RayJob":
        yield from schema_faults(spec, _JOB, "spec")
        if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
            yield "spec.entrypoint", "missing"
        if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
            yield (
                "spec.rayClusterSpec",
                "exactly one of rayClusterSpec and clusterSelector is expected",
            )
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            yield (
                "spec.ttlSecondsAfterFinished",
                "has no effect without shutdownAfterJobFinishes: the cluster would stay",
            )
        if isinstance(spec.get("submitterPodTemplate"), dict):
            yield from _pod_faults(spec["submitterPodTemplate"], "spec.submitterPodTemplate", local)
        if not isinstance(spec.get("rayClusterSpec"), dict):
            return
        spec, at = spec["rayClusterSpec"], "spec.rayClusterSpec"
    yield from _cluster_faults(spec, at, recipe, local)


def _cluster_faults(
    spec: dict[str, Any], at: str, recipe: Config | None, local: Versions
) -> Iterator[Fault]:
    shape = list(schema_faults(spec, _CLUSTER, at))
    yield from shape
    if shape:
        return
    if spec["rayVersion"] != local.ray:
        yield (
            f"{at}.rayVersion",
            f"{spec['rayVersion']} differs from the local {local.ray}: nodes and submitting machine need the same",
        )
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    host = head.get("rayStartParams", {}).get(
        "dashboard-host", "0.0.0.0"
    )  # the operator's own default
    token = "authOptions" in spec and spec["authOptions"].get("mode", "token") == "token"
    if host == "0.0.0.0" and not token:
        yield (
            f"{at}.authOptions",
            "0.0.0.0 without token mode: whoever reaches the dashboard runs code here; add mode: token",
        )
    yield from _pod_faults(head["template"], f"{at}.headGroupSpec.template", local)
    names, growing = [g["groupName"] for g in groups], []
    for i, group in enumerate(groups):
        here = f"{at}.workerGroupSpecs.{i}"
        least, most, now = (
            group["minReplicas"],
            group["maxReplicas"],
            group.get("replicas", group["minReplicas"]),
        )
        if least > most:
            yield f"{here}.minReplicas", f"{least} is above maxReplicas, {most}"
        elif not least <= now <= most:
            yield (
                f"{here}.replicas",
                f"{now} is not between minReplicas, {least}, and maxReplicas, {most}",
            )
        growing += [group["groupName"]] if now < most else []
        if group["groupName"] in names[:i]:
            yield f"{here}.groupName", f"{group['groupName']} stands there twice"
        yield from _pod_faults(group["template"], f"{here}.template", local)
    if growing and not spec.get("enableInTreeAutoscaling"):
        yield (
            f"{at}.enableInTreeAutoscaling",
            f"must be true for {', '.join(growing)} to grow to maxReplicas",
        )
    if recipe is not None:
        try:
            nodes = [n for g in groups for n in _nodes(g)]
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            yield (
                f"{at}.workerGroupSpecs",
                f"a group's resources cannot be read ({type(error).__name__}: {error})",
            )
            return
        yield from lacking(recipe, nodes, f"{at}.workerGroupSpecs")


def _pod_faults(template: dict[str, Any], at: str, local: Versions) -> Iterator[Fault]:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"} | (template.get("metadata") or {}),
        **_rest(template),
    }
    yield from _by_kubernetes(pod, at)
    spec: dict[str, Any] = template["spec"] if isinstance(template.get("spec"), dict) else {}
    volumes = {v.get("name") for v in spec.get("volumes") or [] if isinstance(v, dict)}
    for i, container in enumerate(spec.get("containers") or []):
        for mount in (container.get("volumeMounts") or []) if isinstance(container, dict) else []:
            if isinstance(mount, dict) and mount.get("name") not in volumes:
                yield (
                    f"{at}.spec.containers.{i}.volumeMounts",
                    f"no volume is called {mount.get('name')}",
                )
    for path, text in strings(template):
        if path.endswith(("image", "command", "args")) or ".command." in path or ".args." in path:
            yield from version_faults(join(at, path), text, local)


def _rest(template: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in template.items() if k != "metadata"}


def _by_kubernetes(document: dict[str, Any], at: str) -> Iterator[Fault]:
    try:
        import kubernetes_validate
    except ImportError:
        raise UserError(
            "Kubernetes manifests are checked with kubernetes-validate: pip install 'midpo_ray[kuberay]'"
        ) from None
    if "spec" not in document and document.get("kind") == "Pod":
        yield join(at, "spec"), "missing"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield from explain(error, at)
    except (kubernetes_validate.SchemaNotFoundError, KeyError):
        yield (
            join(at, "kind"),
            f"{document.get('apiVersion')} {document.get('kind')} is no kind of Kubernetes {KUBERNETES}",
        )


def _nodes(group: dict[str, Any]) -> list[Node]:
    """The pods of a group at full scale, with the resources that Ray takes from group, start parameters, or container limits."""
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    start = group.get("rayStartParams", {})
    resources = {
        "CPU": _quantity(limits.get("cpu")),
        "GPU": sum(_quantity(v) for k, v in limits.items() if k.endswith("/gpu")),
    }
    resources |= {
        name: float(start[key])
        for name, key in (("CPU", "num-cpus"), ("GPU", "num-gpus"))
        if key in start
    }
    custom = start.get("resources", "").strip("'\"").replace('\\"', '"')
    if custom:
        resources |= {k: float(v) for k, v in json.loads(custom).items()}
    resources |= {k: _quantity(v) for k, v in group.get("resources", {}).items()}
    return [
        Node(resources, group.get("labels", {}))
        for _ in range(min(group["maxReplicas"] * group.get("numOfHosts", 1), 1024))
    ]


def _quantity(value: Any) -> float:
    """Kubernetes' cpu and device quantities: 8, "8", "500m"; without a limit a pod takes what its machine has."""
    if value is None:
        return math.inf
    found = re.fullmatch(r"([\d.]+)(m?)", str(value))
    return float(found[1]) / (1000 if found[2] else 1) if found else math.inf
