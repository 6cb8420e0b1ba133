"""``midpo reward``: a reward and a cost model, trained as the experts are, and then measured.

<run>/reward/reward, <run>/reward/cost    classifiers of one label, with their tokenizer
<run>/reward/report.json                  accuracy, sign, calibration on the held-out prompts
<run>/reward/KIND.held_out.parquet        the scores that the report is made of
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..config import SCORES, Config, Scorer, digest
from ..data.batching import Document
from ..data.schema import Pair, prompt_key
from ..data.selection import is_validation
from ..errors import UserError
from ..metrics import describe_score_metrics, score_metrics
from ..storage import Storage
from . import cluster
from .lock import run_lock
from .manifest import Manifest
from .plan import FOLDERS, VERSIONS, Step, inputs, scorer_id
from .prepare import check_length, resolve
from .run import cache_folder, run_directory
from .signals import write_table
from .train import train, wait_for_groups

log = logging.getLogger(__name__)
REPORT = "reward/report.json"


@dataclass(frozen=True)
class Row:
    """A pair that is labelled for a kind; its better or safer response is the document's first."""

    pair: Pair
    chosen: int
    document: Document
    signs: tuple[float, float]  # of chosen and rejected: +1 unsafe, -1 safe, 0 not known
    held_out: bool


def train_score_models(
    config: Config,
    address: str | None = None,
    *,
    run_dir: str | None = None,
    kinds: Sequence[str] = SCORES,
) -> dict[str, Any]:
    """Train and measure what is missing of the reward and the cost model.

    Args:
        config: its section ``reward_model``; prompts are held out as in the run itself.
        address, run_dir: as for ``pipeline.run.run``.

    Returns:
        The content of the report, by kind.

    Raises:
        UserError: bad input; a model that is finished stays finished.
    """
    run = run_directory(config, run_dir)
    if run.local is None:
        raise UserError(
            f"{run.uri}: score models need a local or shared run directory: name another --run-dir"
        )
    manifest = Manifest(run)
    manifest.refuse_other(config)
    scoring = scoring_config(config)
    parts = {kind: fingerprint(scoring, kind) for kind in kinds}
    steps = [Step(kind, parts[kind], manifest.why(kind, parts[kind])) for kind in kinds]
    report: dict[str, Any] = json.loads(run.read(REPORT)) if run.exists(REPORT) else {}
    stale = [s for s in steps if s.reason or report.get(s.stage, {}).get("digest") != s.digest]
    if not stale:
        log.info("nothing to do: %s are done in %s", ", ".join(kinds), run.uri)
    else:
        cache = cache_folder(config, run)
        scoring = resolve(scoring, cache)
        rows = read_score_pairs(scoring, [s.stage for s in stale])
        todo = [s for s in stale if s.reason]
        with run_lock(run):
            session = cluster.connect(address)
            try:
                wait_for_groups(scoring, [s.stage for s in todo])
                manifest.claim(config)  # nothing is written before this
                _train(scoring, run, manifest, todo, rows)
                for step in stale:
                    report[step.stage] = {
                        "digest": step.digest,
                        **_measure(scoring, run, cache, step.stage, rows[step.stage]),
                    }
                    run.write(REPORT, json.dumps(report, indent=1).encode())
            finally:
                if session is not None:
                    cluster.disconnect()
    for kind in kinds:
        log.info("%s", describe_score_metrics(kind, report[kind]))
    return report


def scoring_config(config: Config) -> Config:
    """The recipe with the score models' own base and data in place of the policy's."""
    section = config.reward_model
    own = {"model": section.model or config.model, "data": section.data or config.data}
    return config.model_copy(update=own)


def fingerprint(config: Config, kind: str) -> dict[str, str]:
    section = config.reward_model.model_dump(exclude={"group", "model", "data"})
    return {
        **inputs(config),
        "kind": kind,
        "version": str(VERSIONS["score model"]),
        "reward_model": digest(section),
        "deepspeed": digest(config.deepspeed),
        "seed of training": str(config.seed_of_training),
    }


def read_score_pairs(config: Config, kinds: Sequence[str]) -> dict[str, list[Row]]:
    """Each kind's labelled pairs, tokenised. Bad input is found here, before Ray starts."""
    from ..data.read import read_pairs
    from ..models.base import check_targets
    from ..models.score_model import score_documents, scoring_tokenizer

    tokenizer = scoring_tokenizer(config)
    check_length(config.model, config.data.max_length)
    if config.reward_model.train == "lora":
        check_targets(config.model, config.reward_model.lora, config.reward_model.layers)
    pairs, report = read_pairs(config.data.sets, seed=config.seed)
    for line in report.lines():
        log.info(f"data: {line}")
    rows: dict[str, list[Row]] = {}
    for kind in kinds:
        label = "better_response_id" if kind == "reward" else "safer_response_id"
        labels = [(p, p.better if kind == "reward" else p.safer) for p in pairs]
        labelled = [(pair, chosen) for pair, chosen in labels if chosen is not None]
        responses = [(p.responses[c], p.responses[1 - c]) for p, c in labelled]
        documents = score_documents(tokenizer, [p.prompt for p, _ in labelled], responses)
        rows[kind] = [
            Row(p, c, d, _signs(p, c), is_validation(p.prompt, config.data.validation, config.seed))
            for (p, c), d in zip(labelled, documents, strict=True)
            if d is not None
        ]
        left_out = Counter(report.dropped)
        left_out[f"no {label}"] += len(pairs) - len(labelled)
        left_out["the same within max_length"] += len(labelled) - len(rows[kind])
        held_out = sum(row.held_out for row in rows[kind])
        reasons = "".join(f", {count} {reason}" for reason, count in left_out.items() if count)
        log.info("%s: %d pairs, %d of them held out%s", kind, len(rows[kind]), held_out, reasons)
        if not 0 < held_out < len(rows[kind]):
            what = f"left to train on{reasons}"
            if rows[kind] and not held_out:
                what = "held out to measure the model on"
            raise UserError(
                f"{config.data.sets[0].path}: no pair with {label} is {what}; "
                f"data.validation is {config.data.validation}"
            )
    return rows


def _signs(pair: Pair, chosen: int) -> tuple[float, float]:
    sign = {None: 0.0, True: -1.0, False: 1.0}
    return sign[pair.safe[chosen]], sign[pair.safe[1 - chosen]]


def _train(
    config: Config,
    run: Storage,
    manifest: Manifest,
    todo: list[Step],
    rows: dict[str, list[Row]],
) -> None:
    if not todo:
        return
    for step in todo:
        log.info("%s: to run, %s", step.stage, step.reason)
        write_table(run / f"{FOLDERS[step.stage]}.work", "pairs.parquet", _table(rows[step.stage]))

    def commit(kind: str, seconds: float) -> None:
        parts = next(step.parts for step in todo if step.stage == kind)
        manifest.commit(kind, parts, FOLDERS[kind], seconds)
        (run / f"{FOLDERS[kind]}.work").delete()
        log.info("%s: done in %.1f s", kind, seconds)

    train(config, run, todo, commit)


def _table(rows: Sequence[Row]) -> pa.Table:
    lists = pa.list_(pa.int32())
    return pa.table(
        {
            "id": [row.pair.source for row in rows],
            "prompt": pa.array([row.document.prefix for row in rows], lists),
            "chosen": pa.array([row.document.suffixes[0] for row in rows], lists),
            "rejected": pa.array([row.document.suffixes[1] for row in rows], lists),
            "sign_chosen": [row.signs[0] for row in rows],
            "sign_rejected": [row.signs[1] for row in rows],
            "validation": [row.held_out for row in rows],
        }
    )


def _measure(
    config: Config, run: Storage, cache: Storage, kind: str, rows: Sequence[Row]
) -> dict[str, Any]:
    """The metrics of the saved model, which is loaded as any other scorer."""
    from .score import score

    folder = (run / FOLDERS[kind]).local
    scorer = Scorer(model=str(folder), max_length=config.data.max_length)
    scores = config.scores.model_copy(update={"reward": scorer, "cost": scorer})
    held_out = [row for row in rows if row.held_out]
    pairs = [row.pair for row in held_out]
    documents = [
        Document(
            r.document.prefix,
            [r.document.suffixes[i != r.chosen] for i in (0, 1)],
            r.pair.keys,
        )
        for r in held_out
    ]
    fingerprints = {kind: digest(VERSIONS["score"], scorer_id(scorer))}
    config = config.model_copy(update={"scores": scores})
    scored = score(config, pairs, documents, fingerprints, [], cache)
    table = pa.table(
        {
            "id": [row.pair.source for row in held_out],
            "prompt": [prompt_key(row.pair.prompt) for row in held_out],
            "chosen": scored.rows(pairs, [row.chosen for row in held_out])[kind],
            "rejected": scored.rows(pairs, [1 - row.chosen for row in held_out])[kind],
            "sign_chosen": [row.signs[0] for row in held_out],
            "sign_rejected": [row.signs[1] for row in held_out],
        }
    )
    write_table(run / "reward", f"{kind}.held_out.parquet", table)
    return {
        "model": str(folder),
        "training_pairs": len(rows) - len(held_out),
        **score_metrics(kind, table.to_pydict()),
    }
