"""A step's work counted by hand, its floor at the rate of this machine's matrix products, and where the measured time goes.

    python -m benchmarks.floor --model DIR --data FILE [--pairs 4] [--quick]

One step of real pairs in tree layout, fp32, one thread. The count is docs/performance.md's, for this model and at Llama-7B shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from midpo_ray import config
from midpo_ray.data.batching import collate

from .common import RESULTS, machine, markdown, save
from .preference_step import documents
from .scaling import engine_of

LLAMA_7B = {"hidden": 4096, "kv": 4096, "ff": 11008, "layers": 32, "vocabulary": 32000}
KINDS = (
    ("matrix products", "aten::mm aten::addmm aten::bmm"),
    ("attention", "aten::_scaled_dot_product"),
    ("copies", "aten::copy_ aten::cat"),
)


def count(
    shape: dict[str, int], tokens: int, responses: int, length: int, rank: int = 16
) -> dict[str, float]:
    """GFLOP of one step: forward and input gradients; weight gradients for the LoRA alone.

    Args:
        tokens: of all rows, padding included.
        responses: tokens whose log-probability is asked.
        length: of a row, which attention computes whole.
    """
    hidden, ff, layers = shape["hidden"], shape["ff"], shape["layers"]
    decoder = layers * (2 * hidden * hidden + 2 * hidden * shape["kv"] + 3 * hidden * ff)
    parts = {
        "decoder's Linears, 4 N a token": 4 * decoder * tokens,
        "head, 4 V D a response token": 4 * shape["vocabulary"] * hidden * responses,
        "attention, 2 + 5 products": 7 * 2 * hidden * layers * length * tokens,
        "LoRA, 6 N a token": 6 * layers * rank * (hidden + ff) * tokens,
    }
    return {name: flops / 1e9 for name, flops in parts.items()}


def matmul_rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns], the best of 20."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="PKU-SafeRLHF rows")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one timed step")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/floor.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    here, engine = machine(), engine_of(a.model)
    made = collate(documents(config.Model(path=a.model), a.data, a.pairs))

    def step() -> float:
        start = time.perf_counter()
        found = engine(made)
        engine.backward(
            -torch.nn.functional.logsigmoid(0.1 * (found[0::2] - found[1::2])).mean(), last=True
        )
        engine.step()
        return time.perf_counter() - start

    step()
    seconds = statistics.median(step() for _ in range(1 if a.quick else 5))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next(
            (k for k, names in KINDS if event.key.startswith(tuple(names.split()))),
            "everything else",
        )
        spent[kind] += event.self_cpu_time_total
    made_of: Any = next(
        m for m in engine.module.modules() if m.__class__.__name__.endswith("ForCausalLM")
    ).config
    kv = made_of.num_key_value_heads * made_of.hidden_size // made_of.num_attention_heads
    shape = {
        "hidden": made_of.hidden_size,
        "kv": kv,
        "ff": made_of.intermediate_size,
        "layers": made_of.num_hidden_layers,
    }
    shape["vocabulary"] = made_of.vocab_size
    rows, length = made.input_ids.shape
    work = count(shape, rows * length, len(made.labels), length)
    rate = matmul_rate(rows * length, made_of.hidden_size, made_of.intermediate_size)
    floor = sum(work.values()) * 1e9 / rate
    table = [{"": name, "value": value} for name, value in work.items()]
    table = [{**row, "": f"{row['']}, GFLOP"} for row in table] + [
        {"": "rate of the model's own matrix product, GFLOP/s", "value": rate / 1e9},
        {"": "floor, s a step", "value": floor},
        {"": "measured, s a step", "value": seconds},
        {"": "floor / measured", "value": floor / seconds},
        *(
            {"": f"share of the profile: {kind}", "value": part / spent.total()}
            for kind, part in spent.most_common()
        ),
    ]
    seven = [
        {"": f"Llama-7B, 1 pair of 512: {k}, GFLOP", "value": v}
        for k, v in count(LLAMA_7B, 512, 410, 512).items()
    ]
    real = int((made.document_ids >= 0).sum())
    title = f"A step of {a.pairs} pairs, {rows} x {length} tokens ({real} real), {Path(a.model).name}, fp32, one thread"
    text = (
        save("floor", {"machine": here, "rows": table, "llama_7b": seven}, title, table, a.json)
        + f"\n{markdown(seven)}\n"
    )
    (a.json or RESULTS / "floor.json").with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
