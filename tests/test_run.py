"""A whole run through the command line on a tiny model: results, repetition, placement, kills."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smallworld
import torch

import midpo_ray

pytestmark = pytest.mark.slow


def midpo(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "midpo_ray.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


class Done:
    """A finished run."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.data = smallworld.write(folder / "pairs.jsonl", smallworld.rows(60))
        self.recipe = smallworld.recipe(folder, model, self.data)
        self.dir = folder / "run"
        self.first = midpo("run", self.recipe, "--run-dir", self.dir)

    def again(self, *more: object) -> str:
        done = midpo("run", self.recipe, "--run-dir", self.dir, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama, byte_tokenizer) -> Done:
    model = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    done = Done(tmp_path_factory.mktemp("job"), model)
    assert done.first.returncode == 0, done.first.stderr
    return done


def test_run_directory(finished: Done) -> None:
    names = {p.name for p in finished.dir.iterdir()}
    assert {
        "run.yaml",
        "manifest.json",
        "scored",
        "experts",
        "dual",
        "router",
        "metrics",
        "logs",
    } <= names
    assert {p.name for p in (finished.dir / "experts").iterdir()} == {
        "safety",
        "helpfulness",
    }  # nothing half-made is left
    for expert in ("safety", "helpfulness"):
        files = {p.name for p in (finished.dir / "experts" / expert).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert not list(finished.dir.rglob("*.tmp-*"))
    stages = json.loads((finished.dir / "manifest.json").read_text())["stages"]
    assert list(stages) == ["dual", "helpfulness", "router", "safety", "score"]
    assert midpo_ray.load_config(finished.dir / "run.yaml") == midpo_ray.load_config(
        finished.recipe
    )


def test_metrics(finished: Done) -> None:
    for stage in ("safety", "helpfulness", "router"):
        rows = [
            json.loads(line)
            for line in (finished.dir / f"metrics/{stage}.jsonl").read_text().splitlines()
        ]
        train = [r for r in rows if r["split"] == "train"]
        assert [r["step"] for r in train] == [2, 4, 6]
        assert {
            "loss",
            "accuracy",
            "reward_margin",
            "delta_chosen",
            "delta_rejected",
            "grad_norm",
            "lr",
        } <= set(train[0])
        assert [r["step"] for r in rows if r["split"] == "validation"] == [6]
    router = [
        json.loads(x) for x in (finished.dir / "metrics/router.jsonl").read_text().splitlines()
    ]
    assert 0 < router[0]["safety_gate"] < 1


def test_adapters_load_in_plain_peft_and_the_routed_model_generates(finished: Done) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = midpo_ray.load_config(finished.recipe).model.path
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    plain = {}
    for expert in ("safety", "helpfulness"):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(finished.dir / "experts" / expert)
        )
        lora_b = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert len(lora_b) == 2
        assert all(
            p.abs().sum() > 0 for p in lora_b
        )  # an empty adapter is a known fault of ZeRO-3 savers
        with torch.no_grad():
            plain[expert] = model(ids).logits
    routed = midpo_ray.load_routed(str(finished.dir))
    with torch.no_grad():
        with routed.force_gates(1, 0):
            torch.testing.assert_close(routed(ids).logits, plain["safety"], rtol=1e-5, atol=1e-5)
        with routed.force_gates(0, 1):
            torch.testing.assert_close(
                routed(ids).logits, plain["helpfulness"], rtol=1e-5, atol=1e-5
            )
    assert routed.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 5
    gates = routed.routing(["how to lift thing 3"])
    assert set(gates[0]) == {"safety", "helpfulness"}
    shown = midpo("generate", finished.dir, "--prompt", "how to lift", "--max-new-tokens", 4)
    assert shown.returncode == 0, shown.stderr
    assert "gates: safety 0." in shown.stdout
    forced = midpo(
        "generate",
        finished.dir,
        "--prompt",
        "how to lift",
        "--force-gates",
        "1,0",
        "--max-new-tokens",
        4,
    )
    assert "gates: safety 1.000, helpfulness 0.000" in forced.stdout


def test_the_same_command_again_does_nothing(finished: Done) -> None:
    started = time.monotonic()
    said = finished.again()
    assert time.monotonic() - started < 25
    assert "nothing to do: score, safety, helpfulness, dual, router are done" in said
    assert "done" in finished.again("--dry-run")


def test_only_what_is_missing_or_changed_runs(finished: Done) -> None:
    import shutil

    shutil.rmtree(finished.dir / "router")
    said = finished.again()
    assert (
        "router: to run, router/README.md is missing" in said
        or "router: to run, router/router" in said
    )
    assert "safety: to run" not in said
    assert "score: to run" not in said
    assert said.count("warning: router: ") >= 2  # few pairs, few steps
    assert (finished.dir / "router/router.safetensors").exists()
    said = finished.again("experts.safety.objective.margin_scale=0.25")
    assert "safety: to run, changed: objective" in said
    assert "router: to run, changed: safety" in said
    assert "score: to run" not in said
    assert "helpfulness: to run" not in said
    more = smallworld.rows(70)
    smallworld.write(finished.data, more)
    said = finished.again("--until", "score", "experts.safety.objective.margin_scale=0.25")
    assert "120 of 140 cached, 20 to do" in said


FAILING = {
    "data": ("router.beta=9.0", "data.sets.0.path=/nowhere.jsonl"),
    "model": ("router.beta=9.0", "model.path=/nowhere"),
    "scorer": ("scores.cost={model: /nowhere}",),
    "cluster": ("router.beta=9.0", "router.group.resources={antimatter: 1}"),
    "address": ("router.beta=9.0", "--address", "127.0.0.1:1"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_command_that_fails_changes_nothing(finished: Done, case: str) -> None:
    before = hashes(finished.dir)
    failed = midpo("run", finished.recipe, "--run-dir", finished.dir, *FAILING[case])
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert len([x for x in failed.stderr.splitlines() if x.startswith("midpo: ")]) == 1
    assert "Traceback" not in failed.stderr
    assert hashes(finished.dir) == before


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_tampered_run_is_told_in_one_line(finished: Done) -> None:
    adapter = finished.dir / "experts/safety/adapter_config.json"
    before = adapter.read_text()
    try:
        adapter.write_text(json.dumps({**json.loads(before), "r": 3}))
        done = midpo("generate", finished.dir, "--prompt", "x")
        assert done.returncode == 2
        assert "adapter_config.json" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    finally:
        adapter.write_text(before)
    other = midpo("run", finished.recipe, "name=other", "--run-dir", finished.dir)
    assert other.returncode == 2
    assert "holds a run of recipe 'small', not 'other'" in other.stderr


def overlap(run: Path) -> tuple[float, set[str], set[str]]:
    """Share of the shorter expert's training in which both trained, and the nodes of either."""
    spans, nodes = [], []
    for stage in ("safety", "helpfulness"):
        rows = [
            json.loads(line)
            for line in (run / f"metrics/{stage}.time.jsonl").read_text().splitlines()
        ]
        steps = [span for row in rows for span in row["steps"]]
        spans.append((steps[0][0], steps[-1][1]))
        nodes.append({n for row in rows for n in row["nodes"]})
    common = min(end for _, end in spans) - max(start for start, _ in spans)
    return common / min(end - start for start, end in spans), nodes[0], nodes[1]


@pytest.fixture
def labelled_cluster():
    """A head without CPUs and one 1-CPU node for each group."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for group in ("safety", "helpfulness"):
        cluster.add_node(num_cpus=1, labels={"midpo-group": group})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_experts_train_at_once_on_their_own_nodes(
    tmp_path: Path, tiny_model_dir, labelled_cluster
) -> None:
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(60))
    path = smallworld.recipe(tmp_path, tiny_model_dir(), data)
    placed = [
        f"experts.{g}.group.label_selector={{midpo-group: {g}}}" for g in ("safety", "helpfulness")
    ]
    longer = [f"experts.{g}.optim.steps=400" for g in ("safety", "helpfulness")]
    done = midpo(
        "run", path, *placed, *longer, "logging.every=50", "--run-dir", tmp_path / "run",
        "--address", labelled_cluster.address,
        RAY_ADDRESS=labelled_cluster.address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    share, safety, helpfulness = overlap(tmp_path / "run")
    assert share >= 0.8
    assert len(safety) == len(helpfulness) == 1
    assert safety != helpfulness


def test_a_cluster_that_holds_one_expert_at_a_time_finishes_too(
    tmp_path: Path, tiny_model_dir
) -> None:
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(30))
    path = smallworld.recipe(tmp_path, tiny_model_dir(), data)
    wide = [
        f"{s}.group.cpus_per_worker={os.cpu_count()}"
        for s in ("experts.safety", "experts.helpfulness", "router")
    ]
    done = midpo("run", path, *wide, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "they run one after the other" in done.stdout
    assert (tmp_path / "run/router/router.safetensors").exists()
    assert overlap(tmp_path / "run")[0] < 0


def test_a_killed_run_goes_on(tmp_path: Path, tiny_model_dir) -> None:
    """SIGKILL of the driver while the experts train: the same command ends with the same files.

    Meanwhile a second command in the run directory is refused."""
    import shutil
    import signal

    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(60))
    path = smallworld.recipe(tmp_path, tiny_model_dir(), data)
    arguments = (
        "run",
        path,
        *(f"experts.{g}.optim.steps=300" for g in ("safety", "helpfulness")),
        "checkpoint.every_steps=20",
    )
    straight = midpo(*arguments, "--run-dir", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    command = [
        sys.executable,
        "-m",
        "midpo_ray.cli",
        *map(str, arguments),
        "--run-dir",
        str(tmp_path / "killed"),
    ]
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    work = tmp_path / "killed/experts/safety.work/checkpoints"
    deadline = time.monotonic() + 120
    while not (work.is_dir() and any(work.glob("step-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    before = json.loads((tmp_path / "killed/lock.json").read_text())
    second = midpo(*arguments, "router.beta=9.0", "--run-dir", tmp_path / "killed")
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    for named in (str(driver.pid), before["host"], before["since"]):
        assert named in second.stderr
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed/router").exists()
    again = midpo(*arguments, "--run-dir", tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    assert "score: to run" not in again.stdout
    for expert in ("safety", "helpfulness"):
        one, two = (
            tmp_path / r / "experts" / expert / "adapter_model.safetensors"
            for r in ("straight", "killed")
        )
        assert one.read_bytes() == two.read_bytes()
        metrics = [
            (tmp_path / r / f"metrics/{expert}.jsonl").read_text() for r in ("straight", "killed")
        ]
        assert metrics[0] == metrics[1]
    shutil.rmtree(tmp_path / "killed")
