"""The base model, its tokenizer and adapters: what loads, and that every fault is one line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import REPOSITORY

from midpo_ray.config import Lora, Model, load_config
from midpo_ray.errors import UserError
from midpo_ray.models.base import (
    add_lora,
    check_targets,
    load_adapter,
    load_base,
    load_tokenizer,
    model_fingerprint,
)
from midpo_ray.pipeline.prepare import check_models
from midpo_ray.study.run import study
from midpo_ray.tuning.sweep import tune


def test_loads_frozen_in_the_dtype(tiny_model_dir) -> None:
    folder = str(tiny_model_dir())
    for dtype in ("float32", "bfloat16"):
        model = load_base(Model(path=folder, dtype=dtype))
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert load_base(Model(path=folder, attention="eager")).config._attn_implementation == "eager"
    assert load_base(Model(path=folder)).config._attn_implementation == "sdpa"
    assert load_tokenizer(Model(path=folder)).eos_token_id == 2


def test_paths_that_are_no_model(tmp_path, tiny_model_dir) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "notes.txt"
    text.write_text("x")
    torn = tiny_model_dir()
    (torn / "model.safetensors").write_bytes(b"torn")
    bare = tiny_model_dir()
    (bare / "model.safetensors").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    for path in (empty, text, torn, bare, other, tmp_path / "nowhere", "nobody/no-such-model"):
        with pytest.raises(UserError, match="model") as caught:
            load_base(Model(path=str(path)))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_tokenizer(Model(path=str(empty)))
    for path in (str(empty), "nobody/no-such-model"):
        with pytest.raises(UserError):
            model_fingerprint(path)


def test_a_tokenizer_without_eos(tiny_model_dir) -> None:
    folder = tiny_model_dir()
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="EOS"):
        load_tokenizer(Model(path=str(folder)))


def test_an_unmatched_target_module(tiny_llama, tiny_model_dir) -> None:
    lora = Lora(target_modules=("down_proj", "down_prj"))
    for check in (
        lambda: add_lora(tiny_llama(), lora, 0),
        lambda: check_targets(Model(path=str(tiny_model_dir())), lora),
    ):
        with pytest.raises(
            UserError, match=r"'down_prj' matches no Linear .* down_proj, gate_proj"
        ):
            check()
    check_targets(
        Model(path=str(tiny_model_dir())),
        Lora(target_modules=("down_proj", "layers.1.mlp.up_proj")),
    )


def test_lora_starts_by_its_seed_alone(tiny_llama) -> None:
    lora = Lora(r=4)

    def a(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        return {
            n: p for n, p in add_lora(tiny_llama(), lora, seed).named_parameters() if "lora_" in n
        }

    one, again, other = a(0, 1), a(0, 2), a(5, 1)
    assert len(one) == 4
    for name, parameter in one.items():
        assert parameter.requires_grad
        assert torch.equal(parameter, again[name])
        if "lora_B" in name:
            assert not parameter.any()
        else:
            assert not torch.equal(parameter, other[name])
            assert 0.8 / 8 < parameter.abs().max() <= 1 / 8  # kaiming uniform: 1 / sqrt(64)
    state = torch.get_rng_state()
    model = tiny_llama()
    assert {
        p.dtype for n, p in add_lora(model.bfloat16(), lora, 0).named_parameters() if "lora_" in n
    } == {torch.bfloat16}
    assert len(state) == len(torch.get_rng_state())


def test_adapters_are_checked(tiny_model_dir, tmp_path) -> None:
    mine, other, copy = str(tiny_model_dir(0)), str(tiny_model_dir(1)), str(tiny_model_dir(0))
    folder = tmp_path / "adapter"
    model = add_lora(load_base(Model(path=mine)), Lora(r=4), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    for path in (mine, copy):  # a copy of the base is the base
        loaded = load_adapter(load_base(Model(path=path)), folder, Lora(r=4))
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(UserError, match=f"an adapter of {mine}, the base here is {other}"):
        load_adapter(load_base(Model(path=other)), folder)
    with pytest.raises(UserError, match=r"r is 4, lora\.r is 8"):
        load_adapter(load_base(Model(path=mine)), folder, Lora(r=8))
    with pytest.raises(UserError, match="target_modules"):
        load_adapter(load_base(Model(path=mine)), folder, Lora(r=4, target_modules=("up_proj",)))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(load_base(Model(path=mine)), tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = wide = str(tiny_model_dir(0, intermediate_size=80))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(load_base(Model(path=wide)), folder)


def test_a_fingerprint_is_of_the_content(tiny_model_dir) -> None:
    one, same, other = tiny_model_dir(0), tiny_model_dir(0), tiny_model_dir(1)
    first = model_fingerprint(str(one))
    assert first == model_fingerprint(str(same)) != model_fingerprint(str(other))
    (same / "README.md").write_text("notes do not count")
    assert model_fingerprint(str(same)) == first
    weights = same / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))
    assert model_fingerprint(str(same)) != first


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--someone--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_fingerprint("someone/model") == commit


def test_two_target_modules_are_refused_before_an_expert_trains(tiny_model_dir) -> None:
    config = load_config("miniature")
    lora = config.lora.model_copy(update={"target_modules": ("down_proj", "up_proj")})
    model = config.model.model_copy(update={"path": str(tiny_model_dir())})
    config = config.model_copy(update={"model": model, "lora": lora})
    check_models(config, scorers=False, routed=False)
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        check_models(config, scorers=False, routed=True)


def test_two_target_modules_are_refused_in_sweeps_and_studies_too(tmp_path) -> None:
    config = load_config("miniature", ["lora.target_modules=[down_proj, up_proj]"])
    space = REPOSITORY / "tune_spaces" / "router.yaml"
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        tune(str(space), config, "miniature", run_dir=str(tmp_path / "sweep"))
    overrides = ["lora.target_modules=[down_proj, up_proj]"]
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        study("miniature", overrides, run_dir=str(tmp_path / "study"), seeds=[0])
    assert list(tmp_path.iterdir()) == []
