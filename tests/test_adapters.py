"""Adapters as others make them: evaluation gives PEFT's logits, a router takes plain ones alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from midpo_ray.config import Model
from midpo_ray.errors import UserError
from midpo_ray.evaluation.generate import GREEDY, Generator
from midpo_ray.evaluation.generate import resolve_model as resolve
from midpo_ray.models.assembly import read_adapter
from midpo_ray.models.base import load_adapter, load_base, load_tokenizer

IDS = torch.tensor([[5, 60, 61, 62, 9]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.0.mlp.down_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    "bias": {"bias": "lora_only"},
    "all_linear": {"target_modules": "all-linear"},
    "regular_expression": {"target_modules": r".*\.(down|up)_proj"},
    "saved_head": {"modules_to_save": ["lm_head"]},
}


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of the kind, with random values in place of zeros, as PEFT saves it."""
    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**{**keys, **settings}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and "lora_" not in name):
            noise = torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
            parameter.data += noise
    adapted.save_pretrained(str(folder))
    return folder


def plain_logits(base: Path, folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_plain_pefts(kind: str, tmp_path: Path, tiny_model_dir) -> None:
    base = tiny_model_dir()
    folder = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    expected = plain_logits(base, folder)
    untouched = transformers.AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    assert float((expected - untouched).abs().max()) > 0.05  # the adapter does something
    model = load_base(Model(path=str(base)))
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(model, folder)(input_ids=IDS).logits, expected)
        served = Generator(resolve(str(folder)), GREEDY).model(input_ids=IDS).logits
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_a_router_refuses_what_is_not_plain(kind: str, tmp_path: Path, tiny_model_dir) -> None:
    folder = make_adapter(tiny_model_dir(), tmp_path / "adapter", **KINDS[kind])
    with pytest.raises(UserError) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    key = next(iter(KINDS[kind]))
    assert key in str(caught.value)


def test_a_base_that_is_null(tmp_path: Path, tiny_model_dir) -> None:
    base = tiny_model_dir()
    folder = make_adapter(base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="base_model_name_or_path"):
        resolve(str(folder))
    with torch.no_grad():  # with a base at hand it can be used
        adapted = load_adapter(load_base(Model(path=str(base))), folder)
        torch.testing.assert_close(adapted(input_ids=IDS).logits, plain_logits(base, folder))


def test_a_broken_adapter_is_one_line(tmp_path: Path, tiny_model_dir) -> None:
    base = tiny_model_dir()
    folder = make_adapter(base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change in ({"peft_type": "NONE"}, {"r": "four"}, {"target_modules": ["no_proj"]}):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(UserError) as caught:
            load_adapter(load_base(Model(path=str(base))), folder)
        assert "\n" not in str(caught.value)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(load_base(Model(path=str(base))), folder)


def test_a_tokenizer_that_came_with_the_adapter(tmp_path: Path, tiny_model_dir) -> None:
    base = tiny_model_dir()
    folder = make_adapter(base, tmp_path / "adapter")
    before = resolve(str(folder))
    assert before.tokenizer is None
    tokenizer = load_tokenizer(Model(path=str(base)))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    spec = resolve(str(folder))
    assert spec.tokenizer == str(folder)
    assert spec.fingerprint != before.fingerprint
    generator = Generator(spec, GREEDY)
    prompt = generator.tokens.prompt_ids((("user", "hi"),))
    assert generator.tokenizer.decode(prompt).endswith("<hi>")


def test_a_quantised_base_without_its_library(tiny_model_dir) -> None:
    folder = tiny_model_dir()
    file = folder / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(UserError) as caught:
        load_base(Model(path=str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_beyond_the_embedding_matrix(tiny_model_dir) -> None:
    folder = tiny_model_dir()
    tokenizer = load_tokenizer(Model(path=str(folder)))
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # a placeholder, which no text holds
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(Model(path=str(folder)))) == size + 1
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(Model(path=str(folder)))
    for part in ("'<tool>'", str(size + 1), f"{size} rows", str(folder)):
        assert part in str(caught.value)
