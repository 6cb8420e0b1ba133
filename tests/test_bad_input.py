"""Bad input through the real command line: one line, exit code 2, nothing computed is lost."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import smallworld
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

GOOD = smallworld.rows(12)


class Bench:
    """A folder with a good recipe, whose parts a case spoils."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = smallworld.write(folder / "pairs.jsonl", GOOD)
        self.recipe = smallworld.recipe(folder, model, self.data)

    def row(self, number: int = 2, **changes: object) -> None:
        rows = [dict(r) for r in GOOD]
        rows[number].update(changes)
        smallworld.write(self.data, rows)

    def without(self, column: str) -> None:
        smallworld.write(self.data, [{k: v for k, v in r.items() if k != column} for r in GOOD])


def midpo(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "midpo_ray.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("midpo: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama, byte_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bench(tmp_path: Path, model: Path) -> Bench:
    return Bench(tmp_path, model)


def no_eos(bench: Bench) -> list[str]:
    import shutil

    folder = bench.folder / "no-eos"
    shutil.copytree(bench.model, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("eos_token", None)
            (folder / name).write_text(json.dumps(settings))
    return [f"model.path={folder}"]


def not_a_model(bench: Bench) -> list[str]:
    (bench.folder / "empty").mkdir()
    return [f"model.path={bench.folder / 'empty'}"]


def text_as_cost(bench: Bench) -> list[str]:
    smallworld.write(bench.data, [{**r, "note": "cheap"} for r in GOOD])
    return ["scores.cost={column: note}"]


def long_prompt(bench: Bench) -> None:
    bench.row(prompt="how to " + "very " * 60 + "slowly")


def spoil(action: Callable[[Bench], object]) -> Callable[[Bench], list[str]]:
    def case(bench: Bench) -> list[str]:
        action(bench)
        return []

    return case


def sets(*keys: str) -> Callable[[Bench], list[str]]:
    return lambda bench: list(keys)


CASES: dict[str, tuple[Callable[[Bench], list[str]], list[str]]] = {
    "unknown key": (
        sets("experts.safety.objective.bta=1"),
        ["experts.safety.objective.bta", "did you mean beta?"],
    ),
    "wrong type": (sets("experts.safety.optim.lr=fast"), ["experts.safety.optim.lr", "'fast'"]),
    "missing file": (spoil(lambda b: b.data.unlink()), ["pairs.jsonl"]),
    "empty file": (spoil(lambda b: b.data.write_text("")), ["pairs.jsonl", "empty"]),
    "malformed line": (
        spoil(
            lambda b: b.data.write_text(
                json.dumps(GOOD[0]) + "\n" + json.dumps(GOOD[1]) + '\n{"prompt": \n'
            )
        ),
        ["pairs.jsonl:3"],
    ),
    "missing column": (spoil(lambda b: b.without("response_1")), ["response_1"]),
    "label out of range": (
        spoil(lambda b: b.row(better_response_id=2)),
        ["pairs.jsonl:3", "better_response_id", "2", "0, 1"],
    ),
    "flag of the wrong type": (
        spoil(lambda b: b.row(is_response_0_safe="yes")),
        ["pairs.jsonl:3", "is_response_0_safe"],
    ),
    "no row for a stage": (
        spoil(
            lambda b: smallworld.write(
                b.data, [r for r in GOOD if r["is_response_0_safe"] == r["is_response_1_safe"]]
            )
        ),
        ["stage safety", "both safe"],
    ),
    "no such model": (sets("model.path=no/such-model"), ["no/such-model"]),
    "a folder that is no model": (not_a_model, ["empty"]),
    "tokenizer without EOS": (no_eos, ["EOS"]),
    "unmatched target module": (
        sets("lora.target_modules=[down_porj]"),
        ["down_porj", "down_proj"],
    ),
    "margin without scorer": (sets("scores.cost=null"), ["spe_dpo", "scores.cost"]),
    "a column that is no score": (text_as_cost, ["pairs.jsonl:1", "'note'", "number"]),
    "no such score column": (sets("scores.cost={column: 'cots_{i}'}"), ["pairs.jsonl:1", "cots_0"]),
    "no such function": (sets("scores.cost={function: 'no_module:cost'}"), ["no_module"]),
    "a function that gives no numbers": (
        sets("scores.cost={function: 'builtins:zip'}"),
        ["builtins:zip", "list of numbers"],
    ),
    "not UTF-8": (
        spoil(lambda b: b.data.write_bytes(b.data.read_bytes() + b'{"prompt": "\xff\xfe"}\n')),
        ["pairs.jsonl", "UTF-8"],
    ),
    "longer than the model's positions": (
        sets("data.max_length=4096"),
        ["data.max_length", "4096", "512"],
    ),
    "workers below 1": (sets("scores.workers=-3"), ["scores.workers", "-3"]),
    "prompt too long": (spoil(long_prompt), ["pairs.jsonl:3", "max_length"]),
    "response of no tokens": (
        spoil(lambda b: b.row(response_1="")),
        ["pairs.jsonl:3", "response_1"],
    ),
    "unknown stage": (sets("--until", "rooter"), ["rooter", "router"]),
    "run directory in a file": (lambda b: ["--run-dir", str(b.data / "run")], ["run"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(bench: Bench, case: str) -> None:
    action, words = CASES[case]
    arguments = action(bench)
    if "--run-dir" not in arguments:
        arguments += ["--run-dir", str(bench.folder / "run")]
    refused(midpo("run", bench.recipe, *arguments), *words)


def test_unknown_recipe(tmp_path: Path) -> None:
    refused(midpo("run", "miniatur", cwd=tmp_path), "miniatur", "did you mean miniature?")
    refused(midpo("run", tmp_path / "none.yaml"), "none.yaml")


def test_inspect_names_the_row_in_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"'))
    refused(midpo("inspect", path), "pairs.jsonl.gz:1")


def test_a_group_that_the_cluster_cannot_hold(bench: Bench) -> None:
    wide = f"experts.helpfulness.group.workers={4 * (os.cpu_count() or 1)}"
    refused(
        midpo("run", bench.recipe, wide, "--run-dir", bench.folder / "run"),
        "group of stage helpfulness",
        "CPU",
        "are needed",
    )
    assert not (bench.folder / "run").exists()


def test_no_space_is_told_and_nothing_half_written(bench: Bench) -> None:
    """On a file system of 200 KB."""
    small = bench.folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (root is needed)")
    try:
        (small / "fill").write_bytes(b"0" * 190_000)
        done = midpo("run", bench.recipe, "--run-dir", small / "run")
        refused(done, "no space is left")
        assert not list(small.rglob("*.tmp-*"))
    finally:
        subprocess.run(["umount", small], check=False)


def adapter(folder: Path, base: Path, rank: int) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=rank, target_modules=["down_proj"])
    )
    model.save_pretrained(str(folder))
    return folder


def test_adapters_of_another_base_or_rank(tmp_path: Path, model: Path, tiny_model_dir) -> None:
    """A run directory made by hand; each of its parts is replaced by one that does not fit."""
    from transformers import AutoModelForCausalLM

    from midpo_ray.config import Model, Router
    from midpo_ray.models.assembly import route, save_router
    from midpo_ray.models.base import load_tokenizer

    run = tmp_path / "run"
    folders = [adapter(run / "experts" / name, model, 4) for name in ("safety", "helpfulness")]
    base = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(Model(path=str(model)))
    routed = route(base, *folders, Router(), tokenizer=tokenizer, base=Model(path=str(model)))
    save_router(routed, run / "router")
    good = midpo("generate", run, "--prompt", "how", "--max-new-tokens", "2")
    assert good.returncode == 0, good.stderr
    other = tiny_model_dir(seed=5, hidden_size=48, num_attention_heads=4)
    adapter(folders[0], other, 4)
    refused(midpo("generate", run, "--prompt", "how"), "experts/safety")
    adapter(folders[0], model, 4)
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    save_file(
        {k: torch.cat([v, v]) if "lora_A" in k else v for k, v in tensors.items()},
        folders[0] / "adapter_model.safetensors",
    )
    refused(midpo("generate", run, "--prompt", "how"), "experts/safety")
    refused(midpo("generate", tmp_path / "nowhere", "--prompt", "how"), "nowhere")
    refused(midpo("generate", run, "--prompt", "how", "--force-gates", "1"), "--force-gates", "1,0")
