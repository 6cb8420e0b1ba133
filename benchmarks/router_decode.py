"""Milliseconds of a greedy decoding step with a cache: base, base + one adapter, routed folded, routed unfolded.

    python -m benchmarks.router_decode --model DIR [--tokens 64] [--quick]

All models live in one process and take one token each in turn, so that what else the machine does meets all alike; medians count,
and the ratio is the median of the steps' ratios. One thread. Weights are random where a run would have trained ones.
Beside it, what each kind of gate trains at Llama-7B shape, counted on the meta device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from midpo_ray import config
from midpo_ray.models import add_lora, load_adapter, load_base, route
from midpo_ray.models.router import make_gate

from .common import RESULTS, machine, markdown, save

LORA = config.Lora()
D_FF, LAYERS = 11008, 32  # Llama-7B
ADAPTER = "base + one adapter (PEFT)"


def adapter(model: config.Model, folder: Path, seed: int) -> Path:
    """A PEFT folder of an adapter whose B is not zero."""
    adapted = add_lora(load_base(model), LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=1e-2, generator=generator)
    adapted.save_pretrained(str(folder))
    return folder


def contenders(model: config.Model, scratch: Path) -> dict[str, Any]:
    safety, helpful = (
        adapter(model, scratch / name, seed) for seed, name in enumerate(config.EXPERTS)
    )

    def routed(gate: str, scope: str) -> Any:
        settings = config.Router.model_validate({"gate": gate, "scope": scope})
        return route(load_base(model), safety, helpful, settings, base=model)

    merged: Any = load_adapter(load_base(model), safety)
    made = {
        "base": load_base(model),
        ADAPTER: load_adapter(load_base(model), safety),
        "base + one adapter, merged": merged.merge_and_unload(),
        "routed, folded, scope last": routed("linear", "last").fold(),
        "routed, folded, scope token": routed("linear", "token").fold(),
        "routed, bottleneck unfolded, scope token": routed("bottleneck", "token"),
    }
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode(), made["routed, folded, scope last"].force_gates(1.0, 0.0):
        one, other = made["routed, folded, scope last"](ids).logits, made[ADAPTER](ids).logits
    if not torch.allclose(one, other, atol=2e-3):
        raise AssertionError(
            f"gates (1, 0) are {(one - other).abs().max():.1e} off the safety adapter"
        )
    return made


def decoder(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    """A call decodes one token greedily behind a cache, and gives its seconds."""
    made = model.eval()(input_ids=ids, use_cache=True)
    name = "cache" if "cache" in made else "past_key_values"  # by transformers' version
    state = {"token": made.logits[:, -1:].argmax(-1), "cache": made[name]}

    def step() -> float:
        start = time.perf_counter()
        made = model(input_ids=state["token"], use_cache=True, **{name: state["cache"]})
        state["token"] = made.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return step


def measure(models: dict[str, Any], prompt: int, tokens: int) -> dict[str, list[float]]:
    ids = torch.arange(3, 3 + prompt)[None]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        steps = {name: decoder(model, ids) for name, model in models.items()}
        names = list(steps)
        for number in range(tokens + 2):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                taken = steps[name]()
                if number >= 2:
                    seconds[name].append(taken)
    return seconds


def gates_at_7b() -> list[dict[str, Any]]:
    """Trainable parameters of each kind, and the bytes that AdamW keeps for them: a float32 master and two moments."""
    rows = []
    for kind in ("linear", "bottleneck", "mlp"):
        with torch.device("meta"):
            count = LAYERS * sum(p.numel() for p in make_gate(kind, D_FF).parameters())
        rows.append(
            {
                "gate": kind,
                "trainable parameters, M": count / 1e6,
                "optimizer GiB": 12 * count / 2**30,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="timed steps")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/router_decode.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here = machine()
    with tempfile.TemporaryDirectory() as scratch:
        models = contenders(config.Model(path=a.model), Path(scratch))
    seconds = measure(models, a.prompt, 16 if a.quick else a.tokens)
    rows = [
        {
            "": name,
            "ms a token": 1e3 * statistics.median(times),
            "to base + one adapter": statistics.median(
                x / y for x, y in zip(times, seconds[ADAPTER], strict=True)
            ),
        }
        for name, times in seconds.items()
    ]
    gates = gates_at_7b()
    result = {"machine": here, "rows": rows, "gates_at_7b": gates, "seconds": seconds}
    title = f"A greedy decoding step with cache: {Path(a.model).name}, fp32, one thread"
    text = (
        save("router_decode", result, title, rows, a.json)
        + f"\nGates at Llama-7B shape:\n\n{markdown(gates)}\n"
    )
    (a.json or RESULTS / "router_decode.json").with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
