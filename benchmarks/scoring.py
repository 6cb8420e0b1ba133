"""Responses a second of the scoring pass with 1 and 2 workers, against a plain padded batched forward for the same columns.

    python -m benchmarks.scoring --model DIR --data FILE [--pairs 96] [--quick]

The columns are each response's log-probability behind its prompt and behind an empty one. Ours is ``midpo_ray.pipeline.score`` as
a run calls it, on Ray: it scores a quarter of the pairs, then all, each into an empty cache. The difference is the steady state,
what is left of the first is the start of the actors. Plain is transformers' forward with its full logits, in the data's order,
for several batch sizes; the best counts. One thread a worker. The values must agree to 1e-4 of themselves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from midpo_ray import config
from midpo_ray.pipeline.cached_map import CacheRow
from midpo_ray.pipeline.prepare import Prepared, read_and_tokenise
from midpo_ray.pipeline.score import response_rows, score
from midpo_ray.storage import Storage

from .common import GIB, isolated, machine, peak_memory, save

Values = dict[str, tuple[float, float]]


def prepared(a: argparse.Namespace) -> tuple[config.Config, Prepared, list[int]]:
    """(configuration, the data, the numbers of a quarter of the pairs, of like lengths)."""
    run = config.Config.model_validate(
        {
            "name": "scoring",
            "model": {"path": a.model},
            "data": {"sets": [{"path": a.data, "rows": a.pairs}], "long_prompts": "drop"},
            "experts": {name: {"objective": {"name": "dpo"}} for name in config.EXPERTS},
            "router": {"rule": "labels"},
            "scores": {"workers": max(1, a.workers)},
        }
    )
    data = read_and_tokenise(run)
    lengths = [len(d.prefix) + sum(map(len, d.suffixes)) for d in data.documents]
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return run, data, sorted(by_length[1::4])


def items_of(data: Prepared) -> list[CacheRow]:
    return response_rows(data.pairs, data.documents)


def ours(a: argparse.Namespace) -> dict[str, Any]:
    import ray

    run, data, quarter = prepared(a)
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=a.workers,
        log_to_driver=False,
        logging_level="ERROR",
    )
    seconds, counts = [], []
    for part in (quarter, range(len(data.pairs))):
        pairs, documents = [data.pairs[i] for i in part], [data.documents[i] for i in part]
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            scored = score(
                run,
                pairs,
                documents,
                data.fingerprints,
                data.null_ids,
                Storage(cache),
            )
            seconds.append(time.perf_counter() - start)
            counts.append(len(scored.responses))
    ray.shutdown()
    each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    columns = ("reference_logp", "unconditional_logp")
    both = zip(*(scored.responses[c].to_pylist() for c in columns), strict=True)
    values = dict(zip(scored.responses["key"].to_pylist(), both, strict=True))
    return {
        "per_second": 1 / each,
        "start": seconds[0] - counts[0] * each,
        "whole": seconds[1],
        "values": values,
    }


def plain(a: argparse.Namespace) -> dict[str, Any]:
    """Right-padded batches through the whole causal LM, log_softmax over all of [R, T, V], the labels gathered."""
    from transformers import AutoModelForCausalLM

    _, data, _ = prepared(a)
    items = items_of(data)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()

    def sums(rows: list[tuple[list[int], list[int]]]) -> list[float]:
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
        real = torch.tensor(
            [[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in rows]
        )
        scored = torch.tensor(
            [[0] * len(p) + [1] * len(r) + [0] * (width - len(p) - len(r)) for p, r in rows]
        )
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (found * scored[:, 1:]).sum(1).tolist()

    values: Values = {}
    with torch.inference_mode():
        sums([(items[0]["prompt_ids"], items[0]["response_ids"])])
        start = time.perf_counter()
        for at in range(0, len(items), a.batch):
            part = items[at : at + a.batch]
            given = sums([(i["prompt_ids"], i["response_ids"]) for i in part])
            alone = sums([(data.null_ids, i["response_ids"]) for i in part])
            values.update(
                {
                    i["key"]: pair
                    for i, pair in zip(part, zip(given, alone, strict=True), strict=True)
                }
            )
        whole = time.perf_counter() - start
    return {"per_second": len(items) / whole, "start": 0.0, "whole": whole, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="PKU-SafeRLHF rows")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--batches", default="1,8", help="batch sizes of the plain forward")
    parser.add_argument("--quick", action="store_true", help="16 pairs")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/scoring.json")
    parser.add_argument(
        "--workers", type=int, default=-1, help=argparse.SUPPRESS
    )  # 0: the plain forward
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.workers >= 0:
        result = ours(a) if a.workers else plain(a)
        Path(a.result).write_text(json.dumps({**result, "peak_gib": peak_memory() / GIB}), "utf-8")
        return
    here = machine()
    common = ["--model", a.model, "--data", a.data, "--pairs", str(16 if a.quick else a.pairs)]
    runs: dict[str, dict[str, Any]] = {}
    for batch in a.batches.split(","):
        runs[f"plain, batches of {batch}"] = isolated(
            "benchmarks.scoring", [*common, "--workers", "0", "--batch", batch], 1
        )
    for workers in (1, 2):
        runs[f"ours, {workers} worker{'s' * (workers > 1)}"] = isolated(
            "benchmarks.scoring", [*common, "--workers", str(workers)], 1
        )
    values = {name: run.pop("values") for name, run in runs.items()}
    truth: Values = next(iter(values.values()))
    best = max(run["per_second"] for name, run in runs.items() if name.startswith("plain"))
    rows = [
        {
            "": name,
            "responses/s": run["per_second"],
            "to plain": run["per_second"] / best,
            "to 1 worker": run["per_second"] / runs["ours, 1 worker"]["per_second"]
            if name.startswith("ours")
            else "",
            "start-up s": run["start"],
            "differs by": max(
                abs(x / y - 1)
                for k, v in values[name].items()
                for x, y in zip(v, truth[k], strict=True)
            ),
        }
        for name, run in runs.items()
    ]
    wrong = [r[""] for r in rows if float(r["differs by"]) > 1e-4]
    if wrong:
        raise AssertionError(f"{', '.join(map(str, wrong))}: other values than the plain forward")
    title = f"Scoring two columns of {len(truth)} responses: {Path(a.model).name}, fp32, one thread a worker"
    print(save("scoring", {"machine": here, "rows": rows, "runs": runs}, title, rows, a.json))


if __name__ == "__main__":
    main()
