"""Answers of a system to every prompt, their log-ratio to its base, its gates; then verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..config import EXPERTS, Config
from ..data.batching import Document, TokenBatch, collate, split_batch
from ..evaluation.generate import (
    Answer,
    GenerationOptions,
    Generator,
    ModelSpec,
    answer_rows,
    answers_table_rows,
)
from ..evaluation.judges import judge_answers, load_judge
from ..evaluation.prompts import Prompt
from ..evaluation.report import answers_table
from ..models.assembly import load_routed, route
from ..models.base import load_adapter, load_base, load_tokenizer
from ..models.logprobs import ResponseLogProbs
from .spec import Contender

_PASS_TOKENS = 4096  # of one forward pass (ours)
_EXAMPLES = 2  # prompts of each category whose gates are shown token by token


@dataclass
class Served:
    """A system's model, as it generates and scores."""

    model: Any
    logprobs: Callable[[TokenBatch], Tensor]  # [S] nats
    reference: Callable[[], AbstractContextManager[Any]]  # within it the model is its base
    as_served: AbstractContextManager[Any]  # within it the gates are the system's


def serve(config: Config, contender: Contender, trained: Mapping[str, Path]) -> Served:
    """``trained``: the folder of every stage that the system needs, as a run directory has it."""
    kind, device = contender.serve, "cuda" if torch.cuda.is_available() else "cpu"
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
    return _routed(routed, routed.force_gates(*(contender.gates or ())))


def _routed(routed: Any, gates: AbstractContextManager[Any]) -> Served:
    scorer = ResponseLogProbs(routed.model)

    def logprobs(batch: TokenBatch) -> Tensor:
        batch = scorer.arrange(batch)
        with routed.anchored(batch):
            return scorer(batch)

    return Served(routed, logprobs, lambda: routed.force_gates(0.0, 0.0), gates)


def answer_prompts(
    config: Config,
    contender: Contender,
    trained: Mapping[str, Path],
    prompts: Sequence[Prompt],
    options: GenerationOptions,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows of the answers table without verdicts, and what the report shows of a router.

    ``log_ratio`` is log pi(y|x) - log pi_ref(y|x) of the answer, nats: its mean is the KL from the
    base where answers are sampled at temperature 1. Sampling uses common random numbers, keyed by
    prompt and seed, so that comparisons between systems are paired.
    """
    served, seed = serve(config, contender, trained), config.seed_of_training
    routed = str(trained["router"]) if contender.serve == "routed" else None
    mapped = frozenset((p.set, p.id) for p in _examples(prompts) if routed)
    spec = ModelSpec("", "", "", config.model, config.data.template, routed=routed)
    with served.as_served:
        generator = Generator(spec, options, served.model)
        work = answer_rows(prompts, [seed], mapped)
        keys, rows = list(work), list(work.values())
        made: list[Answer] = []
        for start in range(0, len(rows), options.batch):
            made += generator.answer(rows[start : start + options.batch])
        ratios = log_ratios(served, [Document(a.prompt_ids, [a.response_ids]) for a in made])
    values = {key: answer.values for key, answer in zip(keys, made, strict=True)}
    ratio_of = dict(zip(keys, ratios, strict=True))
    table, routing = answers_table_rows(prompts, [seed], values)
    return [{**row, "log_ratio": ratio_of[row["set"], row["id"], seed]} for row in table], routing


def judged(
    rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], judges: Sequence[str]
) -> pa.Table:
    """The answers table: ``rows`` of ``answers`` with the judges' columns."""
    judge_answers(rows, prompts, [load_judge(spec) for spec in judges], cache=None)
    return answers_table(rows)


def _examples(prompts: Sequence[Prompt]) -> list[Prompt]:
    chosen: list[Prompt] = []
    for category in dict.fromkeys(p.category for p in prompts):
        chosen += [p for p in prompts if p.category == category][:_EXAMPLES]
    return chosen[:8]


@torch.inference_mode()
def log_ratios(served: Served, documents: Sequence[Document]) -> list[float]:
    """log pi - log pi_ref of each document's answer, nats."""
    lengths = [len(d.prefix) + len(d.suffixes[0]) for d in documents]
    ratios = [0.0] * len(documents)
    for part in split_batch(range(len(documents)), lengths, 1, _PASS_TOKENS)[0]:
        batch = collate([documents[i] for i in part]).to(served.model.device)
        policy = served.logprobs(batch)
        with served.reference():
            difference = policy - served.logprobs(batch)
        for i, value in zip(part, difference.double().tolist(), strict=True):
            ratios[i] = value
    return ratios
