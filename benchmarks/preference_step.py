"""Seconds a pair and peak memory of preference training: ours against TRL and against the paper's algorithm.

    python -m benchmarks.preference_step --model DIR --data FILE --pairs 48 --batch 4 --dtype fp32 \
        --against trl,trl-precomputed,paper --json OUT

The same model, token ids, batches in the same order, LoRA (also its initial values), AdamW, learning rate and threads, each in a
process of its own; the first steps are dropped. Losses are compared, so that a wrong fast path cannot win.
* trl: TRL's DPOTrainer without gradient checkpointing, its fastest setting. trl-precomputed: with the reference precomputed.
* paper: policy, reference and a reward model of the same size at every step, full logits, a loop over pairs (MidPO's script).
What is scored once before training (our table, TRL's precomputed reference) is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from midpo_ray import config
from midpo_ray.data import read_pairs, select
from midpo_ray.data.batching import Document, collate, split_batch
from midpo_ray.data.tokens import Tokenization
from midpo_ray.models import add_lora, load_base, load_tokenizer
from midpo_ray.models.logprobs import ResponseLogProbs
from midpo_ray.training.engine import plain
from midpo_ray.training.steps import ExpertStep, StepBatch

from .common import GIB, isolated, machine, peak_memory, save, wait

LORA = config.Lora()  # the paper's: r 16, alpha 32 on down_proj
OPTIM = config.Optim(lr=1e-4, schedule="constant", warmup=0.0, clip=1.0)
BETA, SEED, WARMUP = 0.1, 0, 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
Loss = float | torch.Tensor
Arguments = argparse.Namespace


def documents(model: config.Model, data: str, pairs: int) -> list[Document]:
    """The first pairs of the safety expert's view: prompt, chosen, rejected."""
    section = config.Data(sets=(config.DataSet(path=data),))
    rows, _ = read_pairs(section.sets, seed=SEED)
    choices, _ = select(rows, "safety")
    made = Tokenization(load_tokenizer(model), section).documents(
        [rows[i] for i, _ in choices[: pairs + 16]]
    )
    kept = [(d, chosen) for d, (_, chosen) in zip(made, choices, strict=False) if d is not None][
        :pairs
    ]
    return [Document(d.prefix, [d.suffixes[chosen], d.suffixes[1 - chosen]]) for d, chosen in kept]


class Clock:
    """Wall and processor seconds of every step; the latter, over all threads, is what a busy machine leaves comparable."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def start(self) -> None:
        wait()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._began[0])
        self.cpu_seconds.append(time.process_time() - self._began[1])

    def run(self, step: Callable[[int], Loss], steps: int) -> list[float]:
        """The loss of each step."""
        losses = []
        for number in range(steps):
            self.start()
            losses.append(step(number))
            self.stop()
        return [float(loss) for loss in losses]


def ours(
    a: Arguments, model: config.Model, docs: list[Document], device: torch.device, clock: Clock
) -> dict[str, Any]:
    policy = ResponseLogProbs(add_lora(load_base(model, device), LORA, SEED))
    lengths = [len(d.prefix) + sum(map(len, d.suffixes)) for d in docs]
    start = time.perf_counter()
    reference = torch.zeros(len(docs), 2)
    with torch.no_grad():
        for part in (
            p for p in split_batch(range(len(docs)), lengths, 1, a.batch_tokens, a.layout)[0]
        ):
            reference[part] = (
                policy(collate([docs[i] for i in part], a.layout).to(device)).view(-1, 2).cpu()
            )
    scoring = time.perf_counter() - start
    engine = plain(policy, OPTIM, device)
    engine.set_lr(OPTIM.lr)
    engine.train()
    step = ExpertStep(engine, beta=BETA)
    neutral = {
        "margin": torch.zeros,
        "weight_chosen": torch.ones,
        "weight_rejected": torch.ones,
        "scale": torch.ones,
    }

    def run(number: int) -> Loss:
        batch = range(number * a.batch, (number + 1) * a.batch)
        parts = split_batch(batch, lengths, 1, a.batch_tokens, a.layout)[0]
        total: Loss = 0.0
        for part in parts:
            signals = {
                "reference_chosen": reference[part, 0],
                "reference_rejected": reference[part, 1],
            }
            signals |= {name: make(len(part)) for name, make in neutral.items()}
            tokens = collate([docs[i] for i in part], a.layout).to(device)
            loss, _ = step(StepBatch(tokens, {k: v.to(device) for k, v in signals.items()}))
            engine.backward(loss / a.batch, part is parts[-1])
            total = total + loss.detach() / a.batch
        engine.step()
        return total

    return {"losses": clock.run(run, len(docs) // a.batch), "scoring": scoring}


def trl(
    a: Arguments, model: config.Model, docs: list[Document], device: torch.device, clock: Clock
) -> dict[str, Any]:
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes our token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    class Callback(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

    rows = [
        {"prompt_ids": d.prefix, "chosen_ids": d.suffixes[0], "rejected_ids": d.suffixes[1]}
        for d in docs
    ]
    dataset = Dataset.from_list(
        [{**row, "prompt": "", "chosen": "", "rejected": ""} for row in rows]
    )
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, model.dtype))
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, per_device_train_batch_size=a.batch, max_length=512, beta=BETA, learning_rate=OPTIM.lr,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, num_train_epochs=1, logging_steps=1,
            train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, fp16=False, report_to=[],
            save_strategy="no", use_cpu=device.type == "cpu", disable_tqdm=True, seed=SEED,
            precompute_ref_log_probs=a.contender == "trl-precomputed",
        )  # fmt: skip
        lora = LoraConfig(
            r=LORA.r,
            lora_alpha=LORA.alpha,
            target_modules=list(LORA.target_modules),
            task_type="CAUSAL_LM",
        )
        start = time.perf_counter()
        trainer = Tokenised(
            model=base,
            args=settings,
            train_dataset=dataset,
            processing_class=load_tokenizer(model),
            peft_config=lora,
        )
        scoring = time.perf_counter() - start
        initial = [
            p
            for n, p in add_lora(load_base(model), LORA, SEED).named_parameters()
            if ".lora_A." in n
        ]
        adapters = [p for n, p in trainer.model.named_parameters() if ".lora_A." in n]
        with torch.no_grad():
            for own, value in zip(adapters, initial, strict=True):
                own.copy_(value)
        del initial
        trainer.add_callback(Callback())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "scoring": scoring}


def paper(
    a: Arguments, model: config.Model, docs: list[Document], device: torch.device, clock: Clock
) -> dict[str, Any]:
    policy, reference = (
        add_lora(load_base(model, device), LORA, SEED).train(),
        load_base(model, device),
    )
    reward = load_base(model, device).get_decoder()
    score = torch.zeros(
        reward.config.hidden_size, device=device, dtype=reward.dtype
    )  # its margin is 0: the loss is DPO's
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.lr, weight_decay=0.0)

    def log_probabilities(network: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(-1)

    def run(number: int) -> Loss:
        batch = docs[number * a.batch : (number + 1) * a.batch]
        rows = [d.prefix + d.suffixes[side] for side in (0, 1) for d in batch]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        values = log_probabilities(policy, ids, mask)
        with torch.no_grad():
            before = log_probabilities(reference, ids, mask)
            states = reward(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            scores = states[torch.arange(len(rows)), mask.sum(1) - 1] @ score
        losses = []
        for i, document in enumerate(batch):
            ratios = []
            for side in (0, 1):
                row = side * a.batch + i
                part = slice(len(document.prefix) - 1, len(rows[row]) - 1)
                ratios.append((values[row, part].float() - before[row, part].float()).sum())
            margin = (scores[i] - scores[a.batch + i]).clamp_min(0.0)
            losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1]) - margin))
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {"losses": clock.run(run, len(docs) // a.batch), "scoring": 0.0}


CONTENDERS = {"ours": ours, "trl": trl, "trl-precomputed": trl, "paper": paper}


def contend(a: argparse.Namespace) -> None:
    """One contender, in this process."""
    torch.manual_seed(SEED)
    torch.set_num_threads(a.threads)
    model = config.Model(
        path=a.model, dtype=DTYPES[a.dtype], attention="auto" if a.contender == "ours" else "sdpa"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    docs = documents(model, a.data, a.pairs)
    docs = docs[: len(docs) // a.batch * a.batch]
    clock = Clock()
    result = CONTENDERS[a.contender](a, model, docs, device, clock)
    per_pair = [s / a.batch for s in clock.seconds][WARMUP:]
    tokens = sum(
        len(d.prefix) * 2 + sum(map(len, d.suffixes)) for d in docs[WARMUP * a.batch :]
    )  # as a user counts them
    Path(a.result).write_text(
        json.dumps(
            {
                "contender": a.contender,
                "pairs": len(docs),
                "mean_s_per_pair": statistics.mean(per_pair),
                "median_s_per_pair": statistics.median(per_pair),
                "cpu_s_per_pair": statistics.mean(clock.cpu_seconds[WARMUP:]) / a.batch,
                "tokens_per_s": tokens / sum(clock.seconds[WARMUP:]),
                "peak_gib": peak_memory() / GIB,
                "scoring_s": result["scoring"],
                "losses": result["losses"],
                "seconds": clock.seconds,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="PKU-SafeRLHF rows")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--against", default="trl,trl-precomputed,paper")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="all contenders in turn, so often; the mean of the rounds counts",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layout", choices=("tree", "packed", "padded"), default=OPTIM.layout)
    parser.add_argument("--batch-tokens", type=int, default=OPTIM.batch_tokens)
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/preference_step_DTYPE.json"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.contender:
        contend(a)
        return
    here = machine()
    names = ["ours", *filter(None, a.against.split(","))]
    options = {
        "--model": a.model, "--data": a.data, "--pairs": a.pairs, "--batch": a.batch, "--dtype": a.dtype, "--threads": a.threads,
        "--layout": a.layout, "--batch-tokens": a.batch_tokens,
    }  # fmt: skip
    arguments = [str(x) for pair in options.items() for x in pair]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(a.rounds):
        for name in names:
            runs[name].append(
                isolated("benchmarks.preference_step", [*arguments, "--contender", name], a.threads)
            )
    rows = []
    best = runs["ours"][0]["losses"][:10]
    for name in names:
        mean = statistics.mean(r["mean_s_per_pair"] for r in runs[name])
        mine = statistics.mean(r["mean_s_per_pair"] for r in runs["ours"])
        cpu, my_cpu = (
            statistics.mean(r["cpu_s_per_pair"] for r in runs[n]) for n in (name, "ours")
        )
        peak, my_peak = (max(r["peak_gib"] for r in runs[n]) for n in (name, "ours"))
        theirs = runs[name][0]["losses"][:10]
        rows.append(
            {
                "": name,
                "mean s a pair": mean,
                "median s a pair": statistics.median(r["median_s_per_pair"] for r in runs[name]),
                "CPU s a pair": cpu,
                "tokens/s": statistics.mean(r["tokens_per_s"] for r in runs[name]),
                "peak GiB": peak,
                "time / ours": mean / mine,
                "CPU time / ours": cpu / my_cpu,
                "our memory / theirs": my_peak / peak,
                "loss differs by": max(abs(x / y - 1.0) for x, y in zip(best, theirs, strict=True)),
                "scoring before, s": statistics.mean(r["scoring_s"] for r in runs[name]),
            }
        )
    title = f"One preference step: {Path(a.model).name}, {runs['ours'][0]['pairs']} pairs, batches of {a.batch}, {a.dtype}"
    result = {
        "machine": here,
        "arguments": {k: str(v) for k, v in vars(a).items() if v is not None},
        "rows": rows,
        "runs": runs,
    }
    print(save(f"preference_step_{a.dtype}", result, title, rows, a.json))


if __name__ == "__main__":
    main()
