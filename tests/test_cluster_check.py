"""Every shipped cluster file is sound; each broken copy has a fault at the key that is wrong."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from midpo_ray.cluster.check import check
from midpo_ray.cluster.common import Versions
from midpo_ray.cluster.secrets import looks_secret
from midpo_ray.config import load_config
from midpo_ray.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text("utf-8")
RAY = re.search(r"RAY_VERSION=(\S+)", DOCKERFILE)[1]
LOCAL = Versions(RAY, ".".join(re.search(r"PYTHON_TAG=py(\d)(\d+)", DOCKERFILE).groups()))
KEY = "AKIA" + "Q" * 16  # has a key's shape, and is none

AWS, GCP, LOCAL_HOSTS = "cluster.yaml", "cluster/gcp.yaml", "cluster/on-prem.yaml"
CLUSTER, JOB, STORAGE = (
    f"cluster/kuberay/{name}.yaml" for name in ("raycluster", "rayjob", "storage")
)


def set_(keys: str, value: Any) -> Callable[[Any], None]:
    """Sets a key by its path; ``value`` may be a function of the old one."""
    *parents, last = [int(k) if k.isdigit() else k for k in keys.split("/")]

    def change(document: Any) -> None:
        for key in parents:
            document = document[key]
        document[last] = value(document[last]) if callable(value) else value

    return change


def drop(keys: str) -> Callable[[Any], None]:
    *parents, last = [int(k) if k.isdigit() else k for k in keys.split("/")]

    def change(document: Any) -> None:
        for key in parents:
            document = document[key]
        del document[last]

    return change


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for one in changes:
            one(document)

    return change


def text(old: str, new: str) -> Callable[[str], str]:
    """Of a value: ``old`` there becomes ``new``."""

    def change(value: str) -> str:
        assert old in value
        return value.replace(old, new)

    return change


NODE, HEAD, WORKER = (
    "available_node_types/safety",
    "head_start_ray_commands/1",
    "worker_start_ray_commands/1",
)
SPEC, POD = "spec/headGroupSpec", "spec/workerGroupSpecs/0/template/spec"
# Each change to a shipped file with the key of the fault; after a "?" the suggested key, after a "="
# the kind of secret.
BROKEN = [
    # Ray's own schema, with the nearest key
    (AWS, set_("max_worker", 3), "max_worker ? max_workers"),
    (AWS, set_("max_workers", "two"), "max_workers"),
    (
        AWS,
        set_("idle_timeout_minutes", -1),
        "idle_timeout_minutes",
    ),
    (AWS, drop("cluster_name"), "cluster_name"),
    (AWS, drop("provider"), "provider"),
    (AWS, set_("docker/imagee", "x"), "docker.imagee ? image"),
    (
        AWS,
        set_(f"{NODE}/lables", {}),
        "available_node_types.safety.lables ? labels",
    ),
    (AWS, drop(f"{NODE}/resources"), "available_node_types.safety.resources"),
    # what it misses: provider, node_config
    (
        AWS,
        set_("provider/type", "awz"),
        "provider.type",
    ),
    (
        AWS,
        set_("provider/avaliability_zone", "us-east-1a"),
        "provider.avaliability_zone ? availability_zone",
    ),
    (
        AWS,
        set_(f"{NODE}/node_config/InstanceTyp", "p4d"),
        "node_config.InstanceTyp ? InstanceType",
    ),
    (
        AWS,
        set_(f"{NODE}/node_config/BlockDeviceMappings/0/Ebs", {"VolumSize": 9}),
        "Ebs.VolumSize ? VolumeSize",
    ),
    (
        AWS,
        drop(f"{NODE}/node_config/InstanceType"),
        "available_node_types.safety.node_config.InstanceType",
    ),
    (
        GCP,
        set_(f"{NODE}/node_config/machinetype", "a2"),
        "node_config.machinetype ? machineType",
    ),
    (
        GCP,
        set_(f"{NODE}/node_config/scheduling", [{"premptible": True}]),
        "scheduling.0.premptible ? preemptible",
    ),
    (
        LOCAL_HOSTS,
        set_("provider/worker_ip", []),
        "provider.worker_ip ? worker_ips",
    ),
    # region, zone, project, auth
    (AWS, drop("provider/region"), "provider.region"),
    (AWS, set_("provider/region", "us-east"), "provider.region"),
    (
        AWS,
        set_("provider/availability_zone", "us-west-2a"),
        "provider.availability_zone",
    ),
    (GCP, drop("provider/availability_zone"), "provider.availability_zone"),
    (GCP, set_("provider/project_id", None), "provider.project_id"),
    (AWS, drop("auth"), "auth.ssh_user"),
    (LOCAL_HOSTS, drop("auth/ssh_user"), "auth.ssh_user"),
    (LOCAL_HOSTS, set_("auth/ssh_usr", "x"), "auth.ssh_usr ? ssh_user"),
    (LOCAL_HOSTS, drop("provider/head_ip"), "provider.head_ip"),
    (
        LOCAL_HOSTS,
        set_("provider/worker_ips/0", "192.168.1.10"),
        "provider.worker_ips",
    ),
    # sizes
    (
        AWS,
        set_(f"{NODE}/min_workers", 2),
        "available_node_types.safety.min_workers",
    ),
    (
        AWS,
        both(set_(f"{NODE}/min_workers", 1), set_("max_workers", 0)),
        "max_workers",
    ),
    (
        LOCAL_HOSTS,
        both(set_("min_workers", 3), set_("max_workers", 3)),
        "max_workers",
    ),
    (
        AWS,
        set_("head_node_type", "haed"),
        "head_node_type",
    ),
    # versions
    (
        AWS,
        set_("docker/image", f"rayproject/ray:2.9.3-py{LOCAL.python.replace('.', '')}"),
        "docker.image",
    ),
    (
        AWS,
        set_("docker/image", f"rayproject/ray:{RAY}-py39-gpu"),
        "docker.image",
    ),
    (
        GCP,
        set_("docker/image", "rayproject/ray:latest"),
        "docker.image",
    ),
    (
        AWS,
        set_("setup_commands/0", 'pip install -U "ray[default]==2.8.0"'),
        "setup_commands.0",
    ),
    (
        LOCAL_HOSTS,
        set_("setup_commands/0", "conda create -n midpo python=3.9"),
        "setup_commands.0",
    ),
    # starting, token mode
    (AWS, drop("head_start_ray_commands"), "head_start_ray_commands"),
    (
        AWS,
        both(
            set_(HEAD, text("127.0.0.1", "0.0.0.0")),
            set_(HEAD, text("=token", "=")),
            set_(WORKER, text("=token", "=")),
        ),
        "head_start_ray_commands",
    ),
    (
        GCP,
        set_(WORKER, text("RAY_AUTH_MODE=token", "A=b")),
        "worker_start_ray_commands",
    ),
    (AWS, set_("file_mounts", {}), "file_mounts"),
    (
        AWS,
        set_("head_start_ray_commands", ["ray stop"]),
        "head_start_ray_commands",
    ),
    (
        AWS,
        set_(HEAD, text("--autoscaling-config", "--autoscaling")),
        "head_start_ray_commands",
    ),
    (
        AWS,
        set_(HEAD, text("=6379", "=6380")),
        "worker_start_ray_commands",
    ),
    (
        LOCAL_HOSTS,
        set_(HEAD, text("v2=0", "v2=1")),
        "head_start_ray_commands",
    ),
    # secrets by value
    (
        AWS,
        set_("setup_commands/1", f"export AWS_ACCESS_KEY_ID={KEY}"),
        "setup_commands.1 = an AWS access key",
    ),
    (
        AWS,
        set_("setup_commands/1", "echo hf_" + "a1" * 17),
        "setup_commands.1 = a Hugging Face token",
    ),
    (
        GCP,
        set_("setup_commands/1", "export OPENAI_API_KEY=sk-proj-" + "a1" * 20),
        "setup_commands.1 = an OpenAI or Anthropic key",
    ),
    (
        GCP,
        set_("setup_commands/1", "export WANDB_API_KEY=" + "a1" * 20),
        "setup_commands.1 = a Weights & Biases key",
    ),
    (
        GCP,
        set_(
            "provider/gcp_credentials",
            {"type": "service_account", "credentials": "-----BEGIN PRIVATE KEY-----\nx"},
        ),
        "credentials = a private key",
    ),
    (
        LOCAL_HOSTS,
        set_("worker_start_ray_commands/0", "export DB_PASSWORD=correct-horse"),
        "worker_start_ray_commands.0 = a literal password",
    ),
    (
        JOB,
        set_(
            "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/env/0",
            {"name": "HF_TOKEN", "value": "abcdefgh1234"},
        ),
        "env.0.HF_TOKEN = a literal password",
    ),
    # Kubernetes
    (
        CLUSTER,
        set_("kind", "RayClusterr"),
        "kind",
    ),
    (CLUSTER, set_("apiVersion", "ray.io/v1alpha1"), "apiVersion"),
    (
        CLUSTER,
        set_("spec/workerGroupSpec", []),
        "spec.workerGroupSpec ? workerGroupSpecs",
    ),
    (
        CLUSTER,
        set_("spec/rayVersion", "2.9.0"),
        "spec.rayVersion",
    ),
    (
        CLUSTER,
        set_(f"{SPEC}/rayStartParams/num-cpus", 0),
        "spec.headGroupSpec.rayStartParams.num-cpus",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/0/minReplicas", 2),
        "spec.workerGroupSpecs.0.minReplicas",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/0/replicas", 5),
        "spec.workerGroupSpecs.0.replicas",
    ),
    (
        CLUSTER,
        set_("spec/enableInTreeAutoscaling", False),
        "spec.enableInTreeAutoscaling",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/1/groupName", "safety"),
        "spec.workerGroupSpecs.1.groupName",
    ),
    (
        CLUSTER,
        set_(f"{POD}/containers/0/imag", "x"),
        "spec.workerGroupSpecs.0.template.spec.containers.0.imag ? image",
    ),
    (
        CLUSTER,
        set_(f"{POD}/containers/0/ports", [{"containerPort": "x"}]),
        "ports.0.containerPort",
    ),
    (
        CLUSTER,
        drop(f"{POD}/containers"),
        "spec.workerGroupSpecs.0.template.spec.containers",
    ),
    (CLUSTER, set_(f"{POD}/volumes/0/name", "disk"), "volumeMounts"),
    (
        JOB,
        drop("spec/rayClusterSpec/authOptions"),
        "spec.rayClusterSpec.authOptions",
    ),
    (JOB, set_("spec/entrypont", "x"), "spec.entrypont ? entrypoint"),
    (JOB, drop("spec/entrypoint"), "spec.entrypoint"),
    (JOB, set_("spec/submissionMode", "Http"), "spec.submissionMode"),
    (
        JOB,
        set_("spec/shutdownAfterJobFinishes", False),
        "spec.ttlSecondsAfterFinished",
    ),
    (
        STORAGE,
        set_("spec/accessMode", []),
        "spec.accessMode ? accessModes",
    ),
    (
        STORAGE,
        set_("kind", "PersistentVolumClaim"),
        "kind",
    ),
]


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL_HOSTS, CLUSTER, JOB, STORAGE])
def test_shipped_file_is_sound(file):
    assert check(ROOT / file, local=LOCAL) == []


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL_HOSTS, CLUSTER, JOB])
def test_shipped_file_offers_the_groups_of_the_7b_recipes(file):
    assert check(ROOT / file, load_config("alpaca-7b"), local=LOCAL) == []


@pytest.mark.parametrize(
    ("file", "change", "expected"), BROKEN, ids=[f"{f}-{e}" for f, _, e in BROKEN]
)
def test_broken_copy_fails_with_one_line(tmp_path, file, change, expected):
    document = json.loads(
        json.dumps(yaml.safe_load((ROOT / file).read_text("utf-8")))
    )  # a copy without YAML's shared nodes
    change(document)
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    faults = check(broken, local=LOCAL)
    assert len(faults) == 1, faults
    key, _, kind = expected.partition(" = ")
    key, _, near = key.partition(" ? ")
    fault = faults[0].removeprefix(f"{broken}: ")
    assert fault.partition(": ")[0].endswith(key)
    assert (f"did you mean {near}?" in fault) == bool(near)
    assert kind in fault
    assert "\n" not in faults[0]
    assert KEY not in faults[0]


# Overrides of alpaca-7b that no shipped cluster can hold, and what is said of it.
GROUP = "experts.safety.group"
LACKING = [
    (AWS, ["label_selector={midpo-group: safe}"], "labelled midpo-group: safe"),
    (AWS, ["gpus_per_worker=9"], "no node type offers that with midpo-group: safety"),
    (AWS, ["cpus_per_worker=97"], "no node type offers that with midpo-group: safety"),
    (GCP, ["resources={infiniband: 1}"], "no node type offers that with midpo-group: safety"),
    (GCP, ["workers=9"], "room for 8"),
    (LOCAL_HOSTS, ["label_selector={midpo-group: safe}"], "labelled midpo-group: safe"),
    (
        LOCAL_HOSTS,
        ["resources={infiniband: 1}"],
        "no node type offers that with midpo-group: safety",
    ),
    (CLUSTER, ["label_selector={zone: a}"], "labelled zone: a"),
    (JOB, ["gpus_per_worker=16"], "no node type offers that with midpo-group: safety"),
]


@pytest.mark.parametrize(("file", "overrides", "expected"), LACKING)
def test_group_that_no_node_type_offers(file, overrides, expected):
    recipe = load_config("alpaca-7b", [f"{GROUP}.{override}" for override in overrides])
    (fault,) = check(ROOT / file, recipe, local=LOCAL)
    assert f"the recipe's {GROUP} needs" in fault
    assert expected in fault


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("a: [", "not YAML"),
        ("", "a mapping of keys is expected"),
        ("- 1", "a mapping of keys is expected"),
    ],
)
def test_file_that_is_none(tmp_path, content, expected):
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=expected):
        check(path, local=LOCAL)


def test_secret_in_a_comment(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text((ROOT / AWS).read_text("utf-8") + f"# old key: {KEY}\n", "utf-8")
    (fault,) = check(path, local=LOCAL)
    assert "an AWS access key by value" in fault
    assert KEY not in fault


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"provider": []},
        {"provider": {}},
        {"provider": {"type": 3}},
        {"kind": "RayJob"},
        {"spec": 1},
        {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": [], "spec": {}},
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": "x"},
            "spec": {"rayVersion": "2.60.0", "headGroupSpec": [{"template": {}}]},
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": "x"},
            "spec": {
                "entrypoint": "x",
                "rayClusterSpec": {
                    "rayVersion": "2.60.0",
                    "headGroupSpec": {"template": {"metadata": [], "spec": [1]}},
                    "workerGroupSpecs": {"groupName": "a"},
                },
            },
        },
        {
            "cluster_name": "x",
            "provider": {"type": "aws", "region": "us-east-1", "security_group": []},
            "auth": [],
            "available_node_types": {"a": {"node_config": [], "resources": {}}},
        },
    ],
)
def test_any_mapping_gets_faults_and_never_a_traceback(tmp_path, document):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    assert check(path, local=LOCAL)


def places(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all keys and items of a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL_HOSTS, CLUSTER, JOB, STORAGE])
def test_a_wrong_value_anywhere_gives_no_traceback(tmp_path, file):
    generator, recipe = random.Random(0), load_config("alpaca-7b")
    source = next(yaml.safe_load_all((ROOT / file).read_text("utf-8")))
    for path in generator.choices(places(source), k=30):
        document = json.loads(json.dumps(source))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = generator.choice([None, -1, "x", [], {}, [1], {"a": 1}, [None]])
        broken = tmp_path / "broken.yaml"
        broken.write_text(yaml.safe_dump(document), "utf-8")
        assert all(isinstance(fault, str) for fault in check(broken, recipe, local=LOCAL))


def test_versions_in_all_shipped_files_agree():
    for file in (AWS, GCP, CLUSTER, JOB):
        assert set(re.findall(r"-ray([\d.]+)-py", (ROOT / file).read_text("utf-8"))) == {RAY}


@pytest.mark.parametrize(
    "text",
    """
    batch_tokens=4096
    token: ~/.ray/auth_token
    HF_TOKEN_PATH=/run/secrets/hf
    RAY_AUTH_MODE=token
    tokenizer=gpt2-large
    password=$PASSWORD
    ssh_private_key: ~/.ssh/id_ed25519
    https://example.com/a:b
    skill-based
    max_new_tokens: 12345678
    """.strip().splitlines(),
)
def test_harmless_texts(text):
    assert looks_secret(text) is None


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        "ghp_" + "a1" * 18,
        "password: hunter2hunter2",
        'api_key="abcd1234efgh"',
        "https://me:hunter2@example.com",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_secret_texts(text):
    assert looks_secret(text)
