"""Step time against tokens, pairs and workers, with a fit; and peak memory of a step against tokens at a vocabulary of 128 K.

    python -m benchmarks.scaling --model DIR [--quick]

Pairs of random tokens, a fifth of a row the prompt's; LoRA r 16 on down_proj, fp32, one thread a worker. The fit is
seconds = a + b tokens + c tokens x length (the last is attention's). Memory is that of a decoder of two thin layers, so that the
head decides: what a process's peak grows by in a step, ours against logits of all positions and torch's cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midpo_ray import config
from midpo_ray.data.batching import Document, TokenBatch, collate
from midpo_ray.models import ResponseLogProbs, add_lora, load_base
from midpo_ray.training.engine import PlainEngine, plain

from .common import GIB, RESULTS, isolated, machine, markdown, peak_memory, save

VOCABULARY = 1 << 17
OPTIM = config.Optim(lr=1e-4)


def batch(pairs: int, tokens: int, vocabulary: int, seed: int = 0) -> TokenBatch:
    made = []
    for number in range(pairs):
        ids = torch.randint(
            3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed + number)
        ).tolist()
        prompt, middle = tokens // 5, tokens * 3 // 5
        made.append(Document(ids[:prompt], [ids[prompt:middle], ids[middle:]]))
    return collate(made)


def engine_of(model: str) -> PlainEngine:
    engine = plain(
        ResponseLogProbs(add_lora(load_base(config.Model(path=model)), config.Lora(), 0)), OPTIM
    )
    engine.train()
    engine.set_lr(OPTIM.lr)
    return engine


def step_seconds(engine: PlainEngine, pairs: int, tokens: int, repeats: int) -> float:
    """Median, after one that is dropped."""
    vocabulary = next(
        m for m in engine.module.modules() if isinstance(m, torch.nn.Embedding)
    ).num_embeddings
    seconds = []
    for number in range(repeats + 1):
        made = batch(pairs, tokens, vocabulary, number)
        start = time.perf_counter()
        found = engine(made)
        engine.backward(
            -torch.nn.functional.logsigmoid(found[0::2] - found[1::2]).mean(), last=True
        )
        engine.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def times(a: argparse.Namespace) -> dict[str, Any]:
    engine = engine_of(a.model)
    points = []
    for pairs in a.pairs:
        for tokens in a.tokens:
            points.append(
                {
                    "pairs": pairs,
                    "tokens": tokens,
                    "seconds": step_seconds(engine, pairs, tokens, a.repeats),
                }
            )
    return {"points": points}


def rank(number: int, world: int, a: argparse.Namespace, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(number),
        "WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    seconds = step_seconds(engine_of(a.model), max(a.pairs) // world, max(a.tokens), a.repeats)
    if number == 0:
        Path(a.result).write_text(json.dumps({"seconds": seconds}), "utf-8")
    torch.distributed.destroy_process_group()


def workers(a: argparse.Namespace) -> None:
    """The same global batch on ``a.workers`` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(rank, (a.workers, a, port), nprocs=a.workers)  # type: ignore[no-untyped-call]


def memory(a: argparse.Namespace) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=max(a.tokens),
    )  # fmt: skip
    model = LlamaForCausalLM(settings).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    made = batch(1, a.tokens[0], VOCABULARY)
    policy = ResponseLogProbs(model) if a.contender == "memory" else None
    before = peak_memory()
    if policy is not None:
        found = policy(made)
    else:
        logits = model(
            input_ids=made.input_ids, attention_mask=made.mask(), position_ids=made.position_ids
        ).logits.flatten(0, 1)
        each = -torch.nn.functional.cross_entropy(
            logits[made.predict_index], made.labels, reduction="none"
        )
        found = torch.zeros(2).index_add(0, made.owner, each)
    (found[0] - found[1]).backward()
    return {"gib": (peak_memory() - before) / GIB}


def fit(points: list[dict[str, Any]]) -> tuple[list[float], float]:
    """([a, b, c], R squared) of seconds = a + b tokens + c tokens x length; relative errors are what is least."""
    total = np.array([p["pairs"] * p["tokens"] for p in points], dtype=float)
    length, seconds = (np.array([p[k] for p in points], dtype=float) for k in ("tokens", "seconds"))
    design = np.stack([np.ones_like(total), total, total * length], axis=1)
    found = np.linalg.lstsq(design / seconds[:, None], np.ones_like(seconds), rcond=None)[0]
    rest = ((seconds - design @ found) ** 2).sum()
    return found.tolist(), float(1 - rest / ((seconds - seconds.mean()) ** 2).sum())


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    a, b, c = result["fit"]
    for pairs in sorted({p["pairs"] for p in result["points"]}):
        own = [p for p in result["points"] if p["pairs"] == pairs]
        total = np.array([p["tokens"] * pairs for p in own])
        (line,) = left.plot(total, [p["seconds"] for p in own], "o", label=f"{pairs} pairs")
        left.plot(total, a + b * total + c * total * total / pairs, color=line.get_color())
    left.set(
        xlabel="tokens of a step", ylabel="seconds", title=f"step time; fit R² {result['r2']:.3f}"
    )
    count = [p["workers"] for p in result["workers"]]
    middle.plot(count, [p["pairs/s"] for p in result["workers"]], "o-", label="measured")
    middle.plot(
        count, [n * result["workers"][0]["pairs/s"] for n in count], "--", label="in proportion"
    )
    middle.set(
        xlabel="workers",
        ylabel="pairs/s",
        title="the same batch on more workers",
        xticks=count,
        ylim=0,
    )
    for name, label in (("memory", "ours"), ("logits", "logits of all positions")):
        own = [p for p in result["memory"] if p["contender"] == name]
        right.plot([p["tokens"] for p in own], [p["gib"] for p in own], "o-", label=label)
    right.set(
        xlabel="tokens of a row",
        ylabel="GiB that a step adds",
        title="peak memory, vocabulary 128 K",
        ylim=0,
    )
    for axis in (left, middle, right):
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 128, 256, 512], help="of a row"
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/scaling.json")
    parser.add_argument(
        "--contender", choices=("times", "workers", "memory", "logits"), help=argparse.SUPPRESS
    )
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.quick:
        a.tokens, a.pairs, a.memory_tokens, a.repeats = [32, 64, 128], [1, 2], [128, 256, 512], 2
    if a.contender:
        torch.set_num_threads(1)
        if a.contender == "workers":
            workers(a)
        else:
            Path(a.result).write_text(
                json.dumps(times(a) if a.contender == "times" else memory(a)), "utf-8"
            )
        return
    here = machine()

    def contend(name: str, tokens: list[int], *more: str) -> dict[str, Any]:
        numbers = [
            x
            for key, values in (("--tokens", tokens), ("--pairs", a.pairs))
            for x in (key, *map(str, values))
        ]
        common = [
            "--model",
            a.model,
            *numbers,
            "--repeats",
            str(a.repeats),
            "--contender",
            name,
            *more,
        ]
        return isolated("benchmarks.scaling", common, 1)

    points = contend("times", a.tokens)["points"]
    crew = [{"workers": n, **contend("workers", a.tokens, "--workers", str(n))} for n in (1, 2)]
    peaks = [
        {"contender": name, "tokens": tokens, **contend(name, [tokens])}
        for name in ("memory", "logits")
        for tokens in a.memory_tokens
    ]
    found, r2 = fit(points)
    crew = [
        {**p, "pairs/s": max(a.pairs) // p["workers"] * p["workers"] / p["seconds"]} for p in crew
    ]
    result = {
        "machine": here,
        "fit": found,
        "r2": r2,
        "points": points,
        "workers": crew,
        "memory": peaks,
    }
    own, other = (
        [p["gib"] for p in peaks if p["contender"] == name] for name in ("memory", "logits")
    )
    rows = [
        {"tokens": t, "ours, GiB": x, "logits of all, GiB": y}
        for t, x, y in zip(a.memory_tokens, own, other, strict=True)
    ]
    title = f"Scaling of a step: {Path(a.model).name}, fp32, one thread a worker"
    path = a.json or RESULTS / "scaling.json"
    title_memory = f"\nMemory that a step adds, vocabulary {VOCABULARY}:\n\n{markdown(rows)}\n"
    fitted = f"\nseconds = {found[0]:.3g} + {found[1]:.3g} tokens + {found[2]:.3g} tokens x length, R² {r2:.4f}\n"
    text = (
        save("scaling", result, title, [*points], path)
        + fitted
        + f"\n{markdown(crew)}\n"
        + title_memory
    )
    path.with_suffix(".md").write_text(text + f"\n![scaling]({path.stem}.png)\n", "utf-8")
    plot(result, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
