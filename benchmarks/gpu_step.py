"""The preference step on a GPU, in plain torch: Llama-7B shape with random weights, LoRA r 16 on down_proj, bf16.

    python -m benchmarks.gpu_step [--tokens 512 2048] [--pairs 4] [--shape 7b|tiny]

Neither Ray nor DeepSpeed is needed, no data and no checkpoint. Each row holds a pair, its prompt once: a fifth of the tokens is
the prompt's, the rest the two responses' (PKU-SafeRLHF behind the paper's template). MFU counts what LoRA needs, 2N forward and
2N backward for a token that passes N weights: the decoder's for every token, the head's for the responses' tokens; against a
matrix product measured on the same card.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from midpo_ray import config
from midpo_ray.data.batching import Document, collate
from midpo_ray.models import ResponseLogProbs, add_lora
from midpo_ray.training.engine import plain
from midpo_ray.training.steps import ExpertStep, StepBatch

from .common import GIB, machine, save, wait

SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
}
PROMPT = 0.2  # share of a row
SIZE = 8192  # of the matrices whose product is timed


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a bf16 product of random square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[3:])


def build(shape: str, device: torch.device, tokens: int, checkpointing: bool) -> ResponseLogProbs:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention = "flex_attention" if device.type == "cuda" else "sdpa"
    settings = LlamaConfig(**SHAPES[shape], max_position_embeddings=tokens)
    with device:
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.bfloat16, attn_implementation=attention
        )
    model = add_lora(model.requires_grad_(False), config.Lora(), seed=0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return ResponseLogProbs(model).train()


def pair(tokens: int, vocabulary: int, generator: torch.Generator) -> Document:
    ids = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
    prompt = int(PROMPT * tokens)
    middle = (prompt + tokens) // 2
    return Document(ids[:prompt], [ids[prompt:middle], ids[middle:]])


def measure(
    a: argparse.Namespace, tokens: int, device: torch.device, rate: float
) -> dict[str, Any]:
    policy = build(a.shape, device, tokens, a.checkpointing)
    engine = plain(policy, config.Optim(), device)
    engine.set_lr(1e-5)
    step = ExpertStep(engine, beta=0.1)
    shape, generator = SHAPES[a.shape], torch.Generator().manual_seed(0)
    neutral = {"margin": 0.0, "weight_chosen": 1.0, "weight_rejected": 1.0, "scale": 1.0}
    neutral |= {"reference_chosen": 0.0, "reference_rejected": 0.0}
    signals = {
        name: torch.full((a.pairs,), value, device=device) for name, value in neutral.items()
    }
    seconds = []
    for number in range(a.warmup + a.steps):
        if number == a.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        documents = [pair(tokens, shape["vocab_size"], generator) for _ in range(a.pairs)]
        wait()
        start = time.perf_counter()
        loss, _ = step(StepBatch(collate(documents).to(device), signals))
        engine.backward(loss / a.pairs, last=True)
        engine.step()
        wait()
        seconds.append(time.perf_counter() - start)
    taken = statistics.median(seconds[a.warmup :])
    decoder = sum(
        p.numel()
        for n, p in policy.named_parameters()
        if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    head = shape["vocab_size"] * shape["hidden_size"]
    row_flops = 4 * (decoder * tokens + head * (tokens - int(PROMPT * tokens)))
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
    return {
        "tokens of a row": tokens,
        "pairs": a.pairs,
        "s a step": taken,
        "tokens/s": a.pairs * tokens / taken,
        "MFU": a.pairs * row_flops / taken / rate,
        "peak GiB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of a row")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute the forward pass: less memory, a third more work",
    )
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu_step.json")
    a = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, SIZE if device.type == "cuda" else 256)
    rows = [measure(a, tokens, device, rate) for tokens in a.tokens]
    title = f"One preference step in bf16, {a.shape} shape; a matrix product runs at {rate / 1e12:.3g} TFLOP/s"
    print(
        save(
            "gpu_step",
            {"machine": machine(), "matmul_flops": rate, "rows": rows},
            title,
            rows,
            a.json,
        )
    )


if __name__ == "__main__":
    main()
