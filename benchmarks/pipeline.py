"""What Ray and DeepSpeed cost a run, and what both experts at once save.

    python -m benchmarks.pipeline --model DIR --safety FILE --helpful FILE [--steps 20] [--quick]

Three runs, each in a process of its own, one thread a worker, ZeRO-2:
* together: score, both experts at the same time, router; the share of its wall time in which some stage trains.
* in turn: the same experts with the score cache there, on a cluster of one core, which can hold but one of them.
* bare: the safety expert's steps in torch alone, without Ray, DeepSpeed, metrics, checkpoints; before and after "in turn".
The experts have about the same work, since both at once take at least the longer one's time. A stage's steady state is the mean
from the start of its third step to the end of its last, logs and checkpoints in it.
The router's dual data is drawn by a cost that says nothing: only the time counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midpo_ray import config
from midpo_ray.storage import Storage

from .common import isolated, machine, save

DROPPED = 2  # first steps
Span = tuple[float, float]


def cost(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Below zero, and rarely the same for two responses."""
    return [-1.0 - len(text) / 1e4 for text in responses]


def recipe(a: argparse.Namespace) -> config.Config:
    optim = {"lr": 1e-4, "steps": a.steps, "batch_size": a.batch, "batch_tokens": 2048}
    expert = {"objective": {"name": "dpo"}, "optim": optim}
    helpful = {**expert, "optim": {**optim, "steps": a.helpful_steps}}
    return config.Config.model_validate(
        {
            "name": "benchmark",
            "model": {"path": a.model},
            "data": {
                "sets": [{"path": a.safety, "rows": a.rows}, {"path": a.helpful, "rows": a.rows}],
                "long_prompts": "drop",
                "validation": 0.0,
            },
            "scores": {"cost": {"function": "benchmarks.pipeline:cost"}},
            "experts": {"safety": expert, "helpfulness": helpful},
            "router": {"rule": "ranked", "optim": {**optim, "steps": max(4, a.steps // 4)}},
            "checkpoint": {"every_steps": 50},
            "cache": f"{a.folder}/cache",
        }
    )


def spans(run: Storage, stage: str) -> list[Span]:
    """[start, end] of every step, seconds since 1970."""
    lines = (run / "metrics").read(f"{stage}.time.jsonl").splitlines()
    return [(begin, end) for line in lines for begin, end in json.loads(line)["steps"]]


def covered(intervals: Sequence[Span]) -> float:
    """Seconds in which at least one interval runs."""
    total, until = 0.0, 0.0
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def steady(steps: Sequence[Span]) -> float:
    """Seconds a step."""
    return (steps[-1][1] - steps[DROPPED][0]) / (len(steps) - DROPPED)


def pipeline(a: argparse.Namespace) -> dict[str, Any]:
    import ray

    from midpo_ray import run

    together = a.contender == "together"
    stages = [*config.EXPERTS, *(["router"] if together else [])]
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=2 if together else 1,
        log_to_driver=False,
        logging_level="ERROR",
    )
    start = time.time()
    folder = Storage(f"{a.folder}/{a.contender}")
    run(recipe(a), run_dir=folder.uri, until=stages[-1])
    wall = time.time() - start
    ray.shutdown()
    return {"wall": wall, "stages": {stage: spans(folder, stage) for stage in stages}}


def bare(a: argparse.Namespace) -> dict[str, Any]:
    """The shortest loop over the same batches: what a step costs when nothing stands around it."""
    import torch

    from midpo_ray.data.batching import collate
    from midpo_ray.models import ResponseLogProbs, add_lora, load_base
    from midpo_ray.objectives import preference_loss
    from midpo_ray.pipeline.signals import Scored, stage_table
    from midpo_ray.training.schedule import BatchSchedule
    from midpo_ray.training.table import StageTable

    torch.set_num_threads(1)
    recipe_, optim = recipe(a), recipe(a).optim("safety")
    table = StageTable(
        stage_table(recipe_, "safety", Scored.load(Storage(f"{a.folder}/together/scored")))[0]
    )
    policy = ResponseLogProbs(
        add_lora(load_base(recipe_.model), recipe_.lora, recipe_.seed)
    ).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=0.0)
    plan, steps = BatchSchedule(table.lengths(optim.layout), optim, recipe_.seed), []
    for number in range(plan.total):
        start = time.time()
        for rows in plan.micro_batches(number, 0, 1):
            found, known = policy(collate(table.documents(rows), optim.layout)), table.signals(rows)
            loss = preference_loss(
                found[0::2],
                found[1::2],
                known["reference_chosen"],
                known["reference_rejected"],
                beta=0.1,
            )
            (loss.sum() / len(plan.batch(number))).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        steps.append((start, time.time()))
    return {"stages": {"safety": steps}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--safety", required=True, help="PKU-SafeRLHF rows with safety labels")
    parser.add_argument("--helpful", required=True, help="the same with helpfulness labels")
    parser.add_argument("--steps", type=int, default=20, help="of the safety expert")
    parser.add_argument(
        "--helpful-steps",
        type=int,
        default=11,
        help="of the other: about the same work, its pairs are longer",
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--rows", type=int, default=64, help="rows of each file")
    parser.add_argument("--quick", action="store_true", help="6 steps on 12 rows")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/pipeline.json")
    parser.add_argument("--contender", choices=("together", "turn", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.contender:
        Path(a.result).write_text(
            json.dumps(bare(a) if a.contender == "bare" else pipeline(a)), "utf-8"
        )
        return
    if a.quick:
        a.steps, a.helpful_steps, a.rows = 6, 4, 12
    here = machine()
    options = {
        "--model": a.model,
        "--safety": a.safety,
        "--helpful": a.helpful,
        "--steps": a.steps,
        "--batch": a.batch,
    }
    options["--helpful-steps"] = a.helpful_steps
    with tempfile.TemporaryDirectory() as folder:
        common = [
            str(x)
            for pair in {**options, "--rows": a.rows, "--folder": folder}.items()
            for x in pair
        ]
        runs = [
            isolated("benchmarks.pipeline", [*common, "--contender", name], 1)
            for name in ("together", "bare", "turn", "bare")
        ]
    together, first, turn, second = (run["stages"] for run in runs)
    bare_step = (steady(first["safety"]) + steady(second["safety"])) / 2
    both = covered([s for name in config.EXPERTS for s in together[name]])
    alone = {name: covered(turn[name]) for name in config.EXPERTS}
    training = covered([s for steps in together.values() for s in steps])
    rows = [
        {"": "a whole run (score, experts, router), s", "value": runs[0]["wall"]},
        {"": "share of it in which a stage trains", "value": training / runs[0]["wall"]},
        {"": "bare loop, s a step", "value": bare_step},
        {"": "pipeline with 1 worker, ZeRO-2, s a step", "value": steady(turn["safety"])},
        {
            "": "share of the bare loop's pairs/s that it keeps",
            "value": bare_step / steady(turn["safety"]),
        },
        *(
            {"": f"{name} expert by itself, training s", "value": seconds}
            for name, seconds in alone.items()
        ),
        {"": "both experts one after the other, training s", "value": sum(alone.values())},
        {"": "both at once, training s", "value": both},
        {"": "at once / one after the other", "value": both / sum(alone.values())},
    ]
    title = f"The pipeline: {Path(a.model).name}, fp32, {a.steps} and {a.helpful_steps} steps of {a.batch} pairs"
    print(save("pipeline", {"machine": here, "rows": rows, "runs": runs}, title, rows, a.json))


if __name__ == "__main__":
    main()
