"""Shared by the router's tests: a tiny base, two adapters of plain PEFT, and batches."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaModel

from midpo_ray.config import Data, DataSet, Model, Router
from midpo_ray.models.assembly import route

# the name of a forward's cache, which differs between transformers' versions
NAMES = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"
DATA = Data(sets=(DataSet(path="none"),), template="paper")


def make_adapter(
    base: Path, folder: Path, seed: int, r: int = 4, alpha: float = 12, **keys
) -> Path:
    """A PEFT adapter as plain PEFT saves it, with both maps away from zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": ["down_proj"], **keys}),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path | None, **inputs) -> torch.Tensor:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(**inputs).logits


def make_run(folder: Path, model, tokenizer) -> Path:
    """base/, experts/safety (r 4), experts/helpfulness (r 6) under ``folder``."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    make_adapter(folder / "base", folder / "experts/safety", 1)
    make_adapter(folder / "base", folder / "experts/helpfulness", 2, r=6, alpha=9)
    return folder


def routed_of(folder: Path, tokenizer=None, *, random_gates: bool = True, **keys):
    router = Router(**{"scope": "last", "width": 8, **keys})
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    routed = route(
        model, folder / "experts/safety", folder / "experts/helpfulness", router,
        tokenizer=tokenizer, data=DATA, base=Model(path=str(folder / "base")),
    ).eval()  # fmt: skip
    if random_gates:
        generator = torch.Generator().manual_seed(7)
        for tensor in routed.gate_state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return routed


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths as a batch with mask and positions."""
    length = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
