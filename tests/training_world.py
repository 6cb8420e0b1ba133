"""A small stage to train on: a two-layer Llama with a LoRA on down_proj, and a table whose reference is that model."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from midpo_ray import config
from midpo_ray.data.batching import TokenBatch, collate
from midpo_ray.models.base import add_lora
from midpo_ray.models.logprobs import ResponseLogProbs
from midpo_ray.training.table import StageTable

VOCABULARY = 40
LORA = config.Lora(r=4, alpha=8)
OPTIM = config.Optim(lr=0.02, warmup=0.2, epochs=2.0, batch_size=6, batch_tokens=60, clip=1.0)


class Policy(nn.Module):
    """[S] log-probabilities by the textbook: full logits under the batch's own mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(batch.mask().shape, dtype=dtype).masked_fill(
            ~batch.mask(), torch.finfo(dtype).min
        )
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits.float()
        logps = (
            logits.flatten(0, 1)[batch.predict_index]
            .log_softmax(-1)
            .gather(-1, batch.labels[:, None])[:, 0]
        )
        return torch.zeros(batch.responses).index_add(0, batch.owner, logps)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        **sizes,
    )
    return LlamaForCausalLM(settings).to(dtype)


def expert(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> ResponseLogProbs:
    """The Llama with a fresh LoRA: the reference, before it is trained."""
    return ResponseLogProbs(
        add_lora(llama(dtype), LORA.model_copy(update={"dropout": dropout}), seed=1)
    )


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    draw, half = random.Random(seed), VOCABULARY // 2
    kinds = {
        "prompt": (3, 9, 3, VOCABULARY),
        "chosen": (2, 8, 3, half),
        "rejected": (2, 8, half, VOCABULARY),
    }  # something to learn
    tokens = {
        name: [
            [draw.randrange(low, high) for _ in range(draw.randint(shortest, longest))]
            for _ in range(count)
        ]
        for name, (shortest, longest, low, high) in kinds.items()
    }
    ones = [1.0] * count
    constants = {
        "margin": [0.0] * count,
        "weight_chosen": ones,
        "weight_rejected": ones,
        "scale": ones,
    }
    return {
        "id": [f"data.jsonl:{i + 1}" for i in range(count)],
        **tokens,
        "reference_chosen": [0.0] * count,
        "reference_rejected": [0.0] * count,
        **constants,
        "validation": [i % 5 == 4 for i in range(count)],
    }


def table(count: int = 30, seed: int = 0, **columns: Any) -> StageTable:
    """``count`` random pairs, a fifth held out, with the Llama's own log-probabilities as reference."""
    data = rows(count, seed)
    batch = collate(StageTable(pa.table(data)).documents(range(count)), "padded")
    with torch.no_grad():
        logps = Policy(llama())(batch)
    return StageTable(
        pa.table(
            {
                **data,
                "reference_chosen": logps[0::2].tolist(),
                "reference_rejected": logps[1::2].tolist(),
                **columns,
            }
        )
    )
