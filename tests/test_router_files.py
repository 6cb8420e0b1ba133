"""Saving and loading a routed model, and the adapters and runs that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from routing_world import make_adapter, make_run, routed_of, tokens
from safetensors.torch import load_file, save_file

from midpo_ray.errors import UserError
from midpo_ray.models import load_routed, save_router


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_llama, byte_tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_llama(), byte_tokenizer)


@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
@pytest.mark.parametrize("kind", ["linear", "bottleneck", "mlp"])
def test_save_and_load(run_dir, tmp_path, byte_tokenizer, kind, scope):
    """Logits as trained equal logits as reloaded, in float32."""
    shutil.copytree(run_dir / "experts", tmp_path / "experts")
    routed, ids = routed_of(run_dir, byte_tokenizer, gate=kind, scope=scope).train(), tokens(2, 9)
    fresh = routed_of(run_dir, byte_tokenizer, random_gates=False, gate=kind, scope=scope)
    save_router(
        fresh, tmp_path / "router", state={k: v.clone() for k, v in routed.gate_state().items()}
    )
    given = (tmp_path / "router/router.safetensors").read_bytes()
    save_router(routed, tmp_path / "router")
    assert (tmp_path / "router/router.safetensors").read_bytes() == given
    assert routed.gate_state().keys() == {
        name for name, p in routed.named_parameters() if p.requires_grad
    }
    assert sorted(p.name for p in (tmp_path / "router").iterdir()) == [
        "router.json",
        "router.safetensors",
    ]
    with torch.no_grad():
        trained = routed(ids).logits
        for path in (tmp_path, tmp_path / "router"):
            again = load_routed(path)
            torch.testing.assert_close(again(ids).logits, trained, atol=1e-5, rtol=0)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert again.data.template == "paper"
    half = load_routed(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 == next(iter(half.layers.values())).lora_A.dtype
    assert half(ids).logits.dtype == torch.bfloat16
    ours, theirs = (
        again.routing(["hello", "a longer prompt"]),
        routed.routing(["hello", "a longer prompt"]),
    )
    assert [pytest.approx(row, abs=1e-5) for row in theirs] == ours


def broken(folder: Path, change: str) -> None:
    """Make one thing of a run directory wrong."""
    experts, router = folder / "experts", folder / "router"
    if change == "hash":
        weights = load_file(experts / "safety/adapter_model.safetensors")
        save_file(
            {k: v + 1 for k, v in weights.items()}, experts / "safety/adapter_model.safetensors"
        )
    elif change == "base":
        settings = json.loads((router / "router.json").read_text())
        settings["fingerprint"] = "0" * 32
        (router / "router.json").write_text(json.dumps(settings))
    elif change == "torn":
        file = router / "router.safetensors"
        file.write_bytes(file.read_bytes()[:50])
    elif change == "missing":
        (experts / "helpfulness/adapter_model.safetensors").unlink()
    else:
        shutil.rmtree(router)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hash", r"safety.adapter_model\.safetensors: not the file that"),
        ("base", r"base: not the base model that"),
        ("torn", r"router\.safetensors: not a readable safetensors"),
        ("missing", r"helpfulness.adapter_model\.safetensors is not readable"),
        ("no router", r"a run directory with router.router\.json is expected"),
    ],
)
def test_a_changed_run_is_refused(run_dir, tmp_path, change, message):
    shutil.copytree(run_dir / "experts", tmp_path / "experts")
    save_router(routed_of(run_dir), tmp_path / "router")
    broken(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        load_routed(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_dtype_is_refused(run_dir, tmp_path):
    shutil.copytree(run_dir / "experts", tmp_path / "experts")
    save_router(routed_of(run_dir), tmp_path / "router")
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_routed(tmp_path, dtype="int8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_rslora", True, "use_rslora is True"),
        ("use_dora", True, "use_dora is True"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
        ("rank_pattern", {"a": 2}, "rank_pattern is"),
        ("target_modules", ["down_proj", "up_proj"], "exactly one module"),
        ("r", 5, "of rank 5"),
        ("base_model_name_or_path", "another/model", "an adapter of another/model"),
    ],
)
def test_adapters_that_cannot_be_honoured(run_dir, tmp_path, key, value, message):
    shutil.copytree(run_dir, tmp_path / "run")
    file = tmp_path / "run/experts/helpfulness/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=message) as error:
        routed_of(tmp_path / "run")
    assert "helpfulness" in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_of_other_modules_or_shapes(run_dir, tmp_path, tiny_llama):
    wide = tmp_path / "wide"
    tiny_llama(intermediate_size=80).save_pretrained(wide / "base")
    make_adapter(wide / "base", wide / "experts/safety", 1)
    make_adapter(run_dir / "base", wide / "experts/helpfulness", 2, target_modules=["up_proj"])
    with pytest.raises(UserError, match="an adapter of"):
        routed_of(wide)
    shutil.rmtree(wide / "experts/helpfulness")
    shutil.copytree(run_dir / "experts/helpfulness", wide / "experts/helpfulness")
    with pytest.raises(UserError, match="an adapter of"):
        routed_of(wide)
    file = wide / "experts/helpfulness/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="maps 64 to 32"):
        routed_of(wide)
