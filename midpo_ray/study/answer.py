"""What a contender says to every prompt, how far it is from its base, and what its gates did; then the judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..config import EXPERTS, Config
from ..data.batching import Document, TokenBatch, collate, split_batch
from ..evaluation import generate
from ..evaluation.judges import load_judge, rows_for
from ..evaluation.prompts import Prompt
from ..evaluation.report import answers_table
from ..models.assembly import load_routed, route
from ..models.base import load_adapter, load_base, load_tokenizer
from ..models.logprobs import ResponseLogProbs

PASS_TOKENS = 4096  # of one forward pass (ours)
EXAMPLES = 2  # prompts of each category whose gates are shown token by token


@dataclass
class Served:
    """A contender's model, as it generates and scores."""

    model: Any
    logprobs: Callable[[TokenBatch], Tensor]  # [S] nats
    reference: Callable[[], AbstractContextManager[Any]]  # within it the model is its base
    as_served: AbstractContextManager[Any]  # within it the gates are the contender's


def serve(config: Config, contender: Mapping[str, Any], trained: Mapping[str, Path]) -> Served:
    """``trained``: the folder of every stage that the contender needs, as a run directory has it."""
    kind, device = contender["serve"], "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "routed":
        return _routed(load_routed(trained["router"], device), nullcontext())
    model = load_base(config.model, device, serve=True)
    if kind == "base":
        return Served(model, ResponseLogProbs(model), nullcontext, nullcontext())
    if kind in EXPERTS:
        adapted = load_adapter(model, trained[kind]).eval()
        return Served(adapted, ResponseLogProbs(adapted), adapted.disable_adapter, nullcontext())
    safety, helpfulness = (trained[name] for name in EXPERTS)
    texts: dict[str, Any] = {"tokenizer": load_tokenizer(config.model), "data": config.data}
    routed = route(model, safety, helpfulness, config.router, base=config.model, **texts).eval()
    return _routed(routed, routed.force_gates(*contender["gates"]))


def _routed(routed: Any, gates: AbstractContextManager[Any]) -> Served:
    scorer = ResponseLogProbs(routed.model)

    def logprobs(batch: TokenBatch) -> Tensor:
        with routed.anchored(batch):
            return scorer(batch)

    return Served(routed, logprobs, lambda: routed.force_gates(0.0, 0.0), gates)


class Speaker(generate.Generator):
    """Answers of a model that is here already; the tokens of what was said are kept."""

    def __init__(
        self, served: Served, config: Config, routed: str | None, options: generate.Options
    ) -> None:
        self.served = served
        self.said: list[Document] = []
        model = config.model.model_dump(mode="json")
        super().__init__(
            asdict(generate.Contender("", "", "", model, config.data.template, routed=routed)),
            asdict(options),
        )

    def _load(self, device: str) -> Any:
        return self.served.model

    def _generate(self, prompts: list[list[int]], keys: list[str]) -> list[list[int]]:
        made = super()._generate(prompts, keys)
        self.said += [Document(p, [ids]) for p, ids in zip(prompts, made, strict=True)]
        return made


def answers(
    config: Config,
    contender: Mapping[str, Any],
    trained: Mapping[str, Path],
    prompts: Sequence[Prompt],
    options: generate.Options,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """One row a prompt of the answers table, not judged yet, and what the report shows of a router; plain values.

    ``log_ratio`` is log pi(y|x) - log pi_ref(y|x) of the answer, nats: its mean is the KL from the base where answers are sampled
    at temperature 1. What is drawn hangs on prompt and seed alone, so contenders share their luck.
    """
    served, seed = serve(config, contender, trained), config.seed_of_training
    routed = str(trained["router"]) if contender["serve"] == "routed" else None
    mapped = frozenset((p.set, p.id) for p in _examples(prompts) if routed)
    with served.as_served:
        speaker = Speaker(served, config, routed, options)
        wanted = generate.rows_of(prompts, [seed], mapped)
        work, values = list(wanted.values()), list[dict[str, Any]]()
        for start in range(0, len(work), options.batch):
            values += speaker(work[start : start + options.batch])
        ratios = log_ratios(served, speaker.said)
    made = {key: (value, ratio) for key, value, ratio in zip(wanted, values, ratios, strict=True)}
    rows, routing = list[dict[str, Any]](), {"rows": list[Any](), "examples": list[Any]()}
    for p in prompts:
        value, ratio = made[p.set, p.id, seed]
        gates = value.get("gates") or {}
        row: dict[str, Any] = {
            "seed": seed,
            "set": p.set,
            "id": p.id,
            "prompt": p.text,
            "harmful": p.harmful,
            "category": p.category,
        }
        row |= {k: value[k] for k in ("response", "tokens", "truncated")} | {"log_ratio": ratio}
        rows.append(
            row | {f"gate_{expert}": sum(layers) / len(layers) for expert, layers in gates.items()}
        )
        if gates:
            routing["rows"].append({"harmful": p.harmful, **gates})
        if "map" in value:
            routing["examples"].append(
                {"title": f"{p.category} {p.id}", "harmful": p.harmful, **value["map"]}
            )
    return rows, routing if routed else None


def judged(
    rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], judges: Sequence[str]
) -> pa.Table:
    """The answers table: ``rows`` of ``answers`` with the judges' columns."""
    turns = {(p.set, p.id): p.turns for p in prompts}
    for spec in judges:
        job = load_judge(spec).job
        verdicts = job.make(**job.options)(rows_for(rows, turns))
        for row, verdict in zip(rows, verdicts, strict=True):
            row.update(verdict)
    for row in rows:
        if row.get("cost") is not None:
            row.setdefault("safe", row["cost"] < 0)
    return answers_table(rows)


def _examples(prompts: Sequence[Prompt]) -> list[Prompt]:
    kinds = dict.fromkeys(p.category for p in prompts)
    return [p for kind in kinds for p in [p for p in prompts if p.category == kind][:EXAMPLES]][:8]


@torch.inference_mode()
def log_ratios(served: Served, documents: Sequence[Document]) -> list[float]:
    """log pi - log pi_ref of each document's answer, nats."""
    lengths = [len(d.prefix) + len(d.suffixes[0]) for d in documents]
    ratios = [0.0] * len(documents)
    for part in split_batch(range(len(documents)), lengths, 1, PASS_TOKENS)[0]:
        batch = collate([documents[i] for i in part]).to(served.model.device)
        policy = served.logprobs(batch)
        with served.reference():
            difference = policy - served.logprobs(batch)
        for i, value in zip(part, difference.double().tolist(), strict=True):
            ratios[i] = value
    return ratios
