"""What happens before Ray starts: built-in data is written, models are checked, pairs are read.

All that can fail because of a user's input is tried here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..config import Config, Model, digest
from ..data.read import read_pairs
from ..data.schema import Document, Pair
from ..errors import UserError
from ..storage import Storage
from .plan import BUILTIN, VERSIONS, scorer_id
from .score import LOGP

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Tokenised pairs, and the fingerprint under which each signal is cached."""

    pairs: list[Pair]
    documents: list[Document]  # one per pair
    null_ids: list[int]
    fingerprints: dict[str, str]
    summary: dict[str, Any]


def resolve(config: Config, cache: Storage) -> Config:
    """The configuration with built-in names replaced by files, which are made where missing."""
    named = [config.model.path, *(s.path for s in config.data.sets)]
    builtins = {path for path in named if path.startswith(BUILTIN)}
    if not builtins:
        return config
    unknown = builtins - {f"{BUILTIN}miniature"}
    if unknown:
        raise UserError(f"{unknown.pop()}: no such built-in; there is {BUILTIN}miniature")
    built = build_miniature(config, cache)
    sets = [
        s.model_copy(update={"path": str(built.pairs), "rows": None})
        if s.path.startswith(BUILTIN)
        else s
        for s in config.data.sets
    ]
    model = config.model
    if model.path.startswith(BUILTIN):
        model = model.model_copy(update={"path": str(built.base)})
    data = config.data.model_copy(update={"sets": tuple(sets)})
    return config.model_copy(update={"model": model, "data": data})


def build_miniature(config: Config, cache: Storage) -> Any:
    """The miniature's files in the cache, which must be a local or shared path."""
    from ..miniature.base import build_files  # torch is slow to import

    if cache.local is None:
        raise UserError(
            f"{BUILTIN}miniature needs a local or shared cache, not {cache.uri}: set cache=DIR"
        )
    rows = next((s.rows for s in config.data.sets if s.path.startswith(BUILTIN) and s.rows), 2000)

    return build_files(cache.local / "miniature", seed=config.seed, rows=rows)


def check_models(config: Config, scorers: bool = True, routed: bool = True) -> None:
    """Check the model, its tokenizer, the LoRA's targets and the score models; load no weight."""
    from ..models.base import check_targets, load_tokenizer  # transformers is slow to import
    from ..models.scorers import describe_scorer

    load_tokenizer(config.model)
    check_targets(config.model, config.lora)
    if routed:
        check_router_target(config)
    check_length(config.model, config.data.max_length)
    for scorer in (config.scores.reward, config.scores.cost) if scorers else ():
        if scorer and scorer.model:
            describe_scorer(scorer)


def check_router_target(config: Config) -> None:
    """Raise UserError where the experts adapt several modules, before any of them is trained."""
    targets = list(config.lora.target_modules)
    if len(targets) != 1:
        raise UserError(
            f"lora.target_modules is {targets}, and a router takes exactly one: name one, or stop "
            "before the router (--until)"
        )


def check_length(model: Model, max_length: int, key: str = "data.max_length") -> None:
    """Raise UserError where documents may be longer than the model has positions."""
    from transformers import AutoConfig  # slow to import

    settings = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise UserError(
            f"{key} is {max_length}, but the model {model.path} has {positions} positions"
        )


def read_and_tokenise(config: Config) -> Prepared:
    """All pairs: read, checked and tokenised once.

    Raises:
        UserError: a row is not as it must be, or no row is left.
    """
    from ..data.tokens import TEMPLATE_DATE, Tokenization  # transformers is slow to import
    from ..models.base import load_tokenizer, model_fingerprint

    pairs, report = read_pairs(config.data.sets, seed=config.seed)
    tokenization = Tokenization(load_tokenizer(config.model), config.data)
    kept = [
        (pair, document)
        for pair, document in zip(pairs, tokenization.documents(pairs), strict=True)
        if document is not None
    ]
    if not kept:
        raise UserError(
            f"{config.data.sets[0].path}: no row is left after tokenising "
            f"({dict(tokenization.counts)})"
        )
    for line in report.lines():
        log.info("data: %s", line)
    left_out = {**report.dropped, **tokenization.counts}
    summary = {
        "rows": report.rows,
        "kept": report.kept,
        "counts": left_out,
        "conflicts": report.conflicts,
        "read_as": report.as_dict()["read_as"],
        "pairs": len(kept),
    }
    counted = "".join(f", {count} {reason}" for reason, count in left_out.items() if count)
    log.info("data: %d pairs%s", len(kept), counted)
    if tokenization.dated:
        log.info("data: the chat template prints a date, which is fixed to %s", TEMPLATE_DATE)
    base = model_fingerprint(config.model.path, config.model.revision)
    tokens = tokenization.fingerprint
    fingerprints = {LOGP: digest(VERSIONS["score"], base, config.model.dtype, tokens)}
    for signal in ("reward", "cost"):
        scorer = getattr(config.scores, signal)
        if scorer and not scorer.column:
            fingerprints[signal] = digest(VERSIONS["score"], scorer_id(scorer))
    return Prepared(
        [pair for pair, _ in kept],
        [document for _, document in kept],
        tokenization.null_ids,
        fingerprints,
        summary,
    )
