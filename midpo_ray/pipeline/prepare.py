"""Before Ray starts: built-in worlds become files, the model is looked at, the data read and tokenised; faults show here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Config, digest
from ..data.schema import Document, Pair
from ..errors import UserError
from ..storage import Storage
from .plan import BUILTIN, scorer_id
from .score import LOGP

Say = Callable[[str], None]


@dataclass
class Prepared:
    """Tokenised pairs, and the fingerprint under which each signal is cached."""

    pairs: list[Pair]
    documents: list[Document]  # one per pair
    null_ids: list[int]
    fingerprints: dict[str, str]
    summary: dict[str, Any]


def resolve(config: Config, cache: Storage, say: Say) -> Config:
    """The configuration with built-in names replaced by the paths of the files that they stand for, made where missing."""
    named = [config.model.path, *(s.path for s in config.data.sets)]
    builtins = {p for p in named if p.startswith(BUILTIN)}
    if not builtins:
        return config
    unknown = builtins - {f"{BUILTIN}miniature"}
    if unknown:
        raise UserError(f"{unknown.pop()}: no such built-in; there is {BUILTIN}miniature")
    built = build_miniature(config, cache, say)
    sets = [
        s.model_copy(update={"path": str(built.pairs), "rows": None})
        if s.path.startswith(BUILTIN)
        else s
        for s in config.data.sets
    ]
    model = config.model
    if model.path.startswith(BUILTIN):
        model = model.model_copy(update={"path": str(built.base)})
    return config.model_copy(
        update={"model": model, "data": config.data.model_copy(update={"sets": tuple(sets)})}
    )


def build_miniature(config: Config, cache: Storage, say: Say) -> Any:
    """The miniature's files in the cache, which must be a local or shared path."""
    from ..miniature.base import build_files

    if cache.local is None:
        raise UserError(
            f"{BUILTIN}miniature needs a local or shared cache, {cache.uri} is remote: set cache=DIR"
        )
    rows = next((s.rows for s in config.data.sets if s.path.startswith(BUILTIN) and s.rows), 2000)

    def progress(step: int, steps: int, loss: float) -> None:
        if step in (1, steps) or step % 100 == 0:
            say(
                f"miniature: training its base model, step {step} of {steps}, loss {loss:.3f} nats a token"
            )

    return build_files(cache.local / "miniature", seed=config.seed, rows=rows, progress=progress)


def check_model(config: Config, scorers: bool = True) -> None:
    """The model's folder, its tokenizer and the LoRA's target modules, and the score models', without loading a weight."""
    from ..models.base import check_targets, load_tokenizer
    from ..models.scorers import describe_scorer

    load_tokenizer(config.model)
    check_targets(config.model, config.lora)
    for scorer in (config.scores.reward, config.scores.cost) if scorers else ():
        if scorer and scorer.model:
            describe_scorer(scorer)


def read_and_tokenise(config: Config, say: Say) -> Prepared:
    """All pairs, read, checked and tokenised, once."""
    from ..data.read import read_pairs
    from ..data.tokens import TEMPLATE_DATE, Tokenization
    from ..models.base import load_tokenizer, model_fingerprint

    pairs, report = read_pairs(config.data.sets, seed=config.seed)
    tokenization = Tokenization(load_tokenizer(config.model), config.data)
    documents = tokenization.documents(pairs)
    kept = [(p, d) for p, d in zip(pairs, documents, strict=True) if d is not None]
    if not kept:
        raise UserError(
            f"{config.data.sets[0].path}: no row is left after tokenising ({dict(tokenization.counts)})"
        )
    for line in report.lines():
        say(f"data: {line}")
    left_out = {**report.dropped, **tokenization.counts}
    summary = {
        "rows": report.rows,
        "kept": report.kept,
        "counts": left_out,
        "conflicts": report.conflicts,
        "pairs": len(kept),
    }
    say(f"data: {len(kept)} pairs" + "".join(f", {v} {k}" for k, v in left_out.items() if v))
    if tokenization.dated:
        say(f"data: the chat template prints a date, which is fixed to {TEMPLATE_DATE}")
    base = model_fingerprint(config.model.path, config.model.revision)
    fingerprints = {LOGP: digest(base, config.model.dtype, tokenization.fingerprint)}
    for signal in ("reward", "cost"):
        scorer = getattr(config.scores, signal)
        if scorer and not scorer.column:
            fingerprints[signal] = scorer_id(scorer)
    return Prepared(
        [p for p, _ in kept], [d for _, d in kept], tokenization.null_ids, fingerprints, summary
    )
