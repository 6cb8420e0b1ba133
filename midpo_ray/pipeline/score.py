"""Score once: every frozen signal of every distinct (prompt, response), in a cache for all runs.

The folder of a signal is ``<cache>/<signal>-<fingerprint>``; the fingerprint names what the values
depend on (algorithm, model, tokenizer, template, lengths, scorer). See ``cached_map``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from ..config import SCORES, Config
from ..data.schema import Document, Pair
from ..errors import UserError
from ..storage import Storage
from .cached_map import CacheRow, MapJob, Pool, Values, cached_map
from .signals import SIGNALS, Scored

LOGP = "logp"  # the signal with the columns reference_logp and unconditional_logp
_UNIT_TOKENS = {"cpu": 2048, "cuda": 32768}  # tokens of one unit of rows
_PASS_TOKENS = {"cpu": 1024, "cuda": 32768}  # of one forward pass; more would leave a core's caches
_SHARD_UNITS = 32


def score(
    config: Config,
    pairs: Sequence[Pair],
    documents: Sequence[Document],
    fingerprints: Mapping[str, str],
    null_ids: list[int],
    cache: Storage,
) -> Scored:
    """The scored table; only what the cache lacks is computed, on the connected Ray cluster.

    Args:
        documents: the tokens of each pair.
        fingerprints: signal -> what its values depend on: "logp", and "reward" and "cost" where
            they come from a model or a function.
        null_ids: the context of the unconditional log-probability.

    Raises:
        UserError: a scorer fails on a row, or a value is not a finite number.
    """
    rows = response_rows(pairs, documents)
    known: dict[str, dict[str, Values]] = {}
    for signal in SCORES:
        scorer = getattr(config.scores, signal)
        if scorer and scorer.column:
            known[signal] = _column_values(pairs, signal, scorer.column)
    device = "cuda" if config.scores.gpus_per_worker > 0 else "cpu"
    asked, budget = config.scores.workers, config.scores.batch_tokens
    pool = Pool(
        workers=None if asked == "auto" else asked,
        cpus=config.scores.cpus_per_worker,
        gpus=config.scores.gpus_per_worker,
    )
    unit_tokens = _UNIT_TOKENS[device] if budget == "auto" else budget
    for phase in _phases(config, list(fingerprints)):
        options = {
            "config": config.model_dump(mode="json"),
            "signals": phase,
            "null_ids": null_ids,
            "device": device,
        }
        job = MapJob("score", FrozenModels, options, shard_units=_SHARD_UNITS)
        folders = {signal: cache / f"{signal}-{fingerprints[signal]}" for signal in phase}
        known |= cached_map(job, rows, folders, pool, lambda rows: make_units(rows, unit_tokens))
    return _scored(pairs, rows, known)


def response_rows(pairs: Iterable[Pair], documents: Iterable[Document]) -> list[CacheRow]:
    """One row per distinct (prompt, response): key, prompt, texts, token ids, source."""
    rows: dict[str, CacheRow] = {}
    for pair, document in zip(pairs, documents, strict=True):
        texts = zip(document.keys, pair.responses, document.suffixes, strict=True)
        for key, text, ids in texts:
            if key not in rows:
                rows[key] = {
                    "key": key,
                    "prompt": [list(message) for message in pair.prompt],
                    "response": text,
                    "prompt_ids": document.prefix,
                    "response_ids": ids,
                    "source": pair.source,
                }
    return list(rows.values())


def make_units(rows: Sequence[CacheRow], budget: int) -> list[list[CacheRow]]:
    """Units of at most ``budget`` tokens, longest prompts first; a prompt's rows stay together.

    A prompt with more tokens than the budget is a unit by itself.
    """
    groups: dict[str, list[CacheRow]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    tokens = {
        prompt: len(group[0]["prompt_ids"]) + sum(len(row["response_ids"]) for row in group)
        for prompt, group in groups.items()
    }
    units: list[list[CacheRow]] = []
    filled = budget + 1
    for prompt in sorted(groups, key=lambda p: (-tokens[p], p)):
        if filled + tokens[prompt] > budget:
            units.append([])
            filled = 0
        units[-1] += groups[prompt]
        filled += tokens[prompt]
    return units


def _column_values(pairs: Iterable[Pair], signal: str, column: str) -> dict[str, Values]:
    """The signal of each response by key, from a column of the data."""
    values: dict[str, Values] = {}
    for pair in pairs:
        for number, key in enumerate(pair.keys):
            if key not in values:
                values[key] = {signal: _number(pair, column.replace("{i}", str(number)))}
    return values


def _number(pair: Pair, column: str) -> float:
    if column not in pair.extra:
        raise UserError(f"{pair.source}: column {column!r}, which scores name, is missing")
    try:
        value = float(pair.extra[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{pair.source}: column {column!r} is {pair.extra[column]!r}, "
            "a finite number is expected"
        )
    return value


def _phases(config: Config, signals: list[str]) -> list[list[str]]:
    """Which signals one pool of actors computes: each model by itself, functions with the first."""
    functions = [s for s in signals if s != LOGP and getattr(config.scores, s).function]
    models = [[s] for s in signals if s not in functions]
    if not models:
        return [functions] if functions else []
    return [models[0] + functions, *models[1:]]


def _scored(
    pairs: Sequence[Pair], rows: Sequence[CacheRow], known: Mapping[str, Mapping[str, Values]]
) -> Scored:
    ids = pa.list_(pa.int32())
    columns = {
        "key": pa.array([row["key"] for row in rows]),
        "prompt_ids": pa.array([row["prompt_ids"] for row in rows], ids),
        "response_ids": pa.array([row["response_ids"] for row in rows], ids),
    }
    for name in SIGNALS:
        values = known.get(name if name in SCORES else LOGP)
        found = [values[row["key"]][name] if values else None for row in rows]
        columns[name] = pa.array(found, pa.float64())
    return Scored(list(pairs), pa.table(columns))


class FrozenModels:
    """A scoring job's function: the signals of one phase; a model is loaded when needed."""

    def __init__(
        self, config: Mapping[str, Any], signals: Sequence[str], null_ids: list[int], device: str
    ) -> None:
        self._config, self._signals = Config.model_validate(config), signals
        self._null_ids, self._device = null_ids, device
        self._loaded: dict[str, Callable[[list[CacheRow]], list[Values]]] = {}

    def __call__(self, rows: list[CacheRow]) -> list[dict[str, Values]]:
        results: list[dict[str, Values]] = [{} for _ in rows]
        for signal in self._signals:
            wanted = [i for i, row in enumerate(rows) if signal in row["need"]]
            if not wanted:
                continue
            if signal not in self._loaded:
                self._loaded[signal] = self._load(signal)
            values = self._loaded[signal]([rows[i] for i in wanted])
            for i, value in zip(wanted, values, strict=True):
                if not all(map(math.isfinite, value.values())):
                    raise UserError(
                        f"{rows[i]['source']}: {signal} of a response is {value}, "
                        "a finite number is expected"
                    )
                results[i][signal] = value
        return results

    def _load(self, signal: str) -> Callable[[list[CacheRow]], list[Values]]:
        if signal == LOGP:
            return _LogProbs(self._config, self._null_ids, self._device)
        return _Texts(self._config, signal, self._device)


class _LogProbs:
    """Reference and unconditional log-probability of each response, in nats, summed over tokens."""

    def __init__(self, config: Config, null_ids: list[int], device: str) -> None:
        from ..models.base import load_base  # transformers is slow to import
        from ..models.logprobs import ResponseLogProbs

        model = load_base(config.model, device=device)
        model.requires_grad_(False)
        self._module = ResponseLogProbs(model).eval()
        self._device, self._null_ids = device, null_ids
        asked = config.scores.batch_tokens
        self._pass_tokens = _PASS_TOKENS[device] if asked == "auto" else asked

    def __call__(self, rows: list[CacheRow]) -> list[Values]:
        prompts = [list(group) for _, group in groupby(rows, key=lambda row: row["prompt"])]
        responses = [[row["response_ids"] for row in group] for group in prompts]
        reference = self._sums([group[0]["prompt_ids"] for group in prompts], responses)
        unconditional = self._sums([self._null_ids] * len(prompts), responses)
        return [
            {"reference_logp": given, "unconditional_logp": alone}
            for given, alone in zip(reference, unconditional, strict=True)
        ]

    def _sums(self, prefixes: list[list[int]], responses: list[list[list[int]]]) -> list[float]:
        import torch  # slow to import

        from ..data.batching import collate, split_batch

        documents = [Document(p, r) for p, r in zip(prefixes, responses, strict=True)]
        lengths = [len(d.prefix) + sum(map(len, d.suffixes)) for d in documents]
        sums: list[list[float]] = [[] for _ in documents]
        with torch.inference_mode():
            for part in split_batch(range(len(documents)), lengths, 1, self._pass_tokens)[0]:
                batch = collate([documents[i] for i in part]).to(self._device)
                values = iter(self._module(batch).double().cpu().tolist())
                for i in part:
                    sums[i] = list(islice(values, len(documents[i].suffixes)))
        return [value for document in sums for value in document]


class _Texts:
    """The reward or cost of each response, by a score model or a user's function."""

    def __init__(self, config: Config, signal: Any, device: str) -> None:
        from ..models.scorers import load_scorer  # transformers is slow to import

        tokens = config.scores.batch_tokens
        self._signal = signal
        self._score = load_scorer(
            getattr(config.scores, signal),
            signal,
            device=device,
            batch_tokens=None if tokens == "auto" else tokens,
        )

    def __call__(self, rows: list[CacheRow]) -> list[Values]:
        prompts = [tuple((role, text) for role, text in row["prompt"]) for row in rows]
        values = self._score(prompts, [row["response"] for row in rows])
        return [{self._signal: float(value)} for value in values]
