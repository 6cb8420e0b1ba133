"""Every shipped cluster file passes its check; each broken copy fails with a line that names the fault."""

from __future__ import annotations

import json
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
BROKEN = [
    # Ray's own schema, with the nearest key
    (AWS, set_("max_worker", 3), "max_worker: unknown key, did you mean max_workers?"),
    (AWS, set_("max_workers", "two"), "max_workers: integer is expected, this is str"),
    (
        AWS,
        set_("idle_timeout_minutes", -1),
        "idle_timeout_minutes: -1 is less than the minimum of 0",
    ),
    (AWS, drop("cluster_name"), "cluster_name: missing"),
    (AWS, drop("provider"), "provider: missing"),
    (AWS, set_("docker/imagee", "x"), "docker.imagee: unknown key, did you mean image?"),
    (
        AWS,
        set_(f"{NODE}/lables", {}),
        "available_node_types.safety.lables: unknown key, did you mean labels?",
    ),
    (AWS, drop(f"{NODE}/resources"), "available_node_types.safety.resources: missing"),
    # what it misses: provider, node_config
    (
        AWS,
        set_("provider/type", "awz"),
        "provider.type: 'awz' is not a provider, did you mean aws?",
    ),
    (
        AWS,
        set_("provider/avaliability_zone", "us-east-1a"),
        "provider.avaliability_zone: unknown key, did you mean availability_zone?",
    ),
    (
        AWS,
        set_(f"{NODE}/node_config/InstanceTyp", "p4d"),
        "node_config.InstanceTyp: unknown key, did you mean InstanceType?",
    ),
    (
        AWS,
        set_(f"{NODE}/node_config/BlockDeviceMappings/0/Ebs", {"VolumSize": 9}),
        "Ebs.VolumSize: unknown key, did you mean VolumeSize?",
    ),
    (
        AWS,
        drop(f"{NODE}/node_config/InstanceType"),
        "available_node_types.safety.node_config.InstanceType: missing",
    ),
    (
        GCP,
        set_(f"{NODE}/node_config/machinetype", "a2"),
        "node_config.machinetype: unknown key, did you mean machineType?",
    ),
    (
        GCP,
        set_(f"{NODE}/node_config/scheduling", [{"premptible": True}]),
        "scheduling.premptible: unknown key, did you mean preemptible?",
    ),
    (
        LOCAL_HOSTS,
        set_("provider/worker_ip", []),
        "provider.worker_ip: unknown key, did you mean worker_ips?",
    ),
    # region, zone, project, auth
    (AWS, drop("provider/region"), "provider.region: missing"),
    (AWS, set_("provider/region", "us-east"), "provider.region: 'us-east' is not a region of aws"),
    (
        AWS,
        set_("provider/availability_zone", "us-west-2a"),
        "provider.availability_zone: us-west-2a is not in region us-east-1",
    ),
    (GCP, drop("provider/availability_zone"), "provider.availability_zone: missing"),
    (GCP, set_("provider/project_id", None), "provider.project_id: missing"),
    (AWS, drop("auth"), "auth.ssh_user: missing"),
    (LOCAL_HOSTS, drop("auth/ssh_user"), "auth.ssh_user: missing"),
    (LOCAL_HOSTS, set_("auth/ssh_usr", "x"), "auth.ssh_usr: unknown key, did you mean ssh_user?"),
    (LOCAL_HOSTS, drop("provider/head_ip"), "provider.head_ip: missing"),
    (
        LOCAL_HOSTS,
        set_("provider/worker_ips/0", "192.168.1.10"),
        "provider.worker_ips: 192.168.1.10 stands there twice, or is head_ip too",
    ),
    # sizes
    (
        AWS,
        set_(f"{NODE}/min_workers", 2),
        "available_node_types.safety.min_workers: 2 is above its max_workers, 1",
    ),
    (
        AWS,
        both(set_(f"{NODE}/min_workers", 1), set_("max_workers", 0)),
        "max_workers: 0 is below the sum of the node types' min_workers, 1",
    ),
    (
        LOCAL_HOSTS,
        both(set_("min_workers", 3), set_("max_workers", 3)),
        "max_workers: 3 is above the number of provider.worker_ips, 2",
    ),
    (
        AWS,
        set_("head_node_type", "haed"),
        "head_node_type: one of head, safety, helpfulness is expected, this is 'haed'",
    ),
    # versions
    (
        AWS,
        set_("docker/image", f"rayproject/ray:2.9.3-py{LOCAL.python.replace('.', '')}"),
        f"docker.image: Ray 2.9.3 differs from the local {RAY}",
    ),
    (
        AWS,
        set_("docker/image", f"rayproject/ray:{RAY}-py39-gpu"),
        "docker.image: Python 3.9 differs from the local",
    ),
    (
        GCP,
        set_("docker/image", "rayproject/ray:latest"),
        "docker.image: the image names no Ray version",
    ),
    (
        AWS,
        set_("setup_commands/0", 'pip install -U "ray[default]==2.8.0"'),
        "setup_commands.0: Ray 2.8.0 differs from the local",
    ),
    (
        LOCAL_HOSTS,
        set_("setup_commands/0", "conda create -n midpo python=3.9"),
        "setup_commands.0: Python 3.9 differs from the local",
    ),
    # starting, token mode
    (AWS, drop("head_start_ray_commands"), "head_start_ray_commands: 0.0.0.0 without token mode"),
    (
        AWS,
        both(
            set_(HEAD, text("127.0.0.1", "0.0.0.0")),
            set_(HEAD, text("=token", "=")),
            set_(WORKER, text("=token", "=")),
        ),
        "head_start_ray_commands: 0.0.0.0 without token mode",
    ),
    (
        GCP,
        set_(WORKER, text("RAY_AUTH_MODE=token", "A=b")),
        "worker_start_ray_commands: RAY_AUTH_MODE=token is missing",
    ),
    (AWS, set_("file_mounts", {}), "file_mounts: ~/.ray/auth_token: ~/.ray/auth_token is missing"),
    (
        AWS,
        set_("head_start_ray_commands", ["ray stop"]),
        "head_start_ray_commands: no command there is `ray start --head`",
    ),
    (
        AWS,
        set_(HEAD, text("--autoscaling-config", "--autoscaling")),
        "head_start_ray_commands: --autoscaling-config=",
    ),
    (
        AWS,
        set_(HEAD, text("=6379", "=6380")),
        "worker_start_ray_commands: --address names port 6379, the head's --port is 6380",
    ),
    (
        LOCAL_HOSTS,
        set_(HEAD, text("v2=0", "v2=1")),
        "head_start_ray_commands: RAY_enable_autoscaler_v2=0 is missing",
    ),
    # secrets by value
    (
        AWS,
        set_("setup_commands/1", f"export AWS_ACCESS_KEY_ID={KEY}"),
        "setup_commands.1: an AWS access key by value",
    ),
    (
        AWS,
        set_("setup_commands/1", "echo hf_" + "a1" * 17),
        "setup_commands.1: a Hugging Face token by value",
    ),
    (
        GCP,
        set_("setup_commands/1", "export OPENAI_API_KEY=sk-proj-" + "a1" * 20),
        "setup_commands.1: an OpenAI or Anthropic key by value",
    ),
    (
        GCP,
        set_("setup_commands/1", "export WANDB_API_KEY=" + "a1" * 20),
        "setup_commands.1: a Weights & Biases key by value",
    ),
    (
        GCP,
        set_(
            "provider/gcp_credentials",
            {"type": "service_account", "credentials": "-----BEGIN PRIVATE KEY-----\nx"},
        ),
        "credentials: a private key by value",
    ),
    (
        LOCAL_HOSTS,
        set_("worker_start_ray_commands/0", "export DB_PASSWORD=correct-horse"),
        "worker_start_ray_commands.0: a literal password, token or key",
    ),
    (
        JOB,
        set_(
            "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/env/0",
            {"name": "HF_TOKEN", "value": "abcdefgh1234"},
        ),
        "env.0.HF_TOKEN: a literal password, token or key by value",
    ),
    # Kubernetes
    (
        CLUSTER,
        set_("kind", "RayClusterr"),
        "kind: one of RayCluster, RayJob is expected, this is 'RayClusterr'",
    ),
    (CLUSTER, set_("apiVersion", "ray.io/v1alpha1"), "apiVersion: one of ray.io/v1 is expected"),
    (
        CLUSTER,
        set_("spec/workerGroupSpec", []),
        "spec.workerGroupSpec: unknown key, did you mean workerGroupSpecs?",
    ),
    (
        CLUSTER,
        set_("spec/rayVersion", "2.9.0"),
        f"spec.rayVersion: 2.9.0 differs from the local {RAY}",
    ),
    (
        CLUSTER,
        set_(f"{SPEC}/rayStartParams/num-cpus", 0),
        "spec.headGroupSpec.rayStartParams.num-cpus: string is expected, this is int",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/0/minReplicas", 2),
        "spec.workerGroupSpecs.0.minReplicas: 2 is above maxReplicas, 1",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/0/replicas", 5),
        "spec.workerGroupSpecs.0.replicas: 5 is not between minReplicas, 0, and maxReplicas, 1",
    ),
    (
        CLUSTER,
        set_("spec/enableInTreeAutoscaling", False),
        "spec.enableInTreeAutoscaling: must be true for safety, helpfulness to grow",
    ),
    (
        CLUSTER,
        set_("spec/workerGroupSpecs/1/groupName", "safety"),
        "spec.workerGroupSpecs.1.groupName: safety stands there twice",
    ),
    (
        CLUSTER,
        set_(f"{POD}/containers/0/imag", "x"),
        "spec.workerGroupSpecs.0.template.spec.containers.0.imag: unknown key, did you mean image?",
    ),
    (
        CLUSTER,
        set_(f"{POD}/containers/0/ports", [{"containerPort": "x"}]),
        "ports.0.containerPort: integer is expected, this is str",
    ),
    (
        CLUSTER,
        drop(f"{POD}/containers"),
        "spec.workerGroupSpecs.0.template.spec.containers: missing",
    ),
    (CLUSTER, set_(f"{POD}/volumes/0/name", "disk"), "no volume is called storage"),
    (
        JOB,
        drop("spec/rayClusterSpec/authOptions"),
        "spec.rayClusterSpec.authOptions: 0.0.0.0 without token mode",
    ),
    (JOB, set_("spec/entrypont", "x"), "spec.entrypont: unknown key, did you mean entrypoint?"),
    (JOB, drop("spec/entrypoint"), "spec.entrypoint: missing"),
    (JOB, set_("spec/submissionMode", "Http"), "spec.submissionMode: one of K8sJobMode, HTTPMode"),
    (
        JOB,
        set_("spec/shutdownAfterJobFinishes", False),
        "spec.ttlSecondsAfterFinished: has no effect without shutdownAfterJobFinishes",
    ),
    (
        STORAGE,
        set_("spec/accessMode", []),
        "spec.accessMode: unknown key, did you mean accessModes?",
    ),
    (
        STORAGE,
        set_("kind", "PersistentVolumClaim"),
        "kind: v1 PersistentVolumClaim is no kind of Kubernetes",
    ),
]


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL_HOSTS, CLUSTER, JOB, STORAGE])
def test_shipped_file_is_sound(file):
    assert check(ROOT / file, local=LOCAL) == []


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL_HOSTS, CLUSTER, JOB])
def test_shipped_file_offers_the_groups_of_the_7b_recipes(file):
    assert check(ROOT / file, load_config("alpaca-7b"), local=LOCAL) == []


@pytest.mark.parametrize(
    ("file", "change", "expected"), BROKEN, ids=[f"{f}-{e.partition(':')[0]}" for f, _, e in BROKEN]
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
    assert faults[0].startswith(f"{broken}: ")
    assert expected in faults[0]
    assert "\n" not in faults[0]
    assert KEY not in faults[0]


# Overrides of alpaca-7b that no shipped cluster can hold, and what is said of it.
GROUP = "experts.safety.group"
LACKING = [
    (AWS, ["label_selector={midpo-group: safe}"], "none is labelled midpo-group: safe"),
    (AWS, ["gpus_per_worker=9"], "no node type offers that with midpo-group: safety"),
    (AWS, ["cpus_per_worker=97"], "no node type offers that with midpo-group: safety"),
    (GCP, ["resources={infiniband: 1}"], "no node type offers that with midpo-group: safety"),
    (GCP, ["workers=9"], "needs 9 worker(s) of 1 CPU, 1 GPU: there are too few at full scale"),
    (LOCAL_HOSTS, ["label_selector={midpo-group: safe}"], "none is labelled midpo-group: safe"),
    (
        LOCAL_HOSTS,
        ["resources={infiniband: 1}"],
        "no node type offers that with midpo-group: safety",
    ),
    (CLUSTER, ["label_selector={zone: a}"], "none is labelled zone: a"),
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
    ],
)
def test_any_mapping_gets_faults_and_never_a_traceback(tmp_path, document):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    assert check(path, local=LOCAL)


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
