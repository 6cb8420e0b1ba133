"""Score once: every frozen signal of every distinct (prompt, response), by Ray Data actors, into a cache shared by all runs.

The cache is content-addressed: ``<cache>/<signal>-<fingerprint>/part-*.parquet`` with the response's key and its values, where
the fingerprint names whatever the values depend on (model, tokenizer, template, lengths, scorer). Each call of an actor writes
one shard, whole or not at all; so a killed run goes on from its shards, and a bigger set scores only what is new.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..config import SCORES, Config, digest
from ..data.schema import Document, Pair
from ..errors import UserError
from ..storage import Storage
from .signals import Scored, read_table, write_table

LOGP = "logp"
COLUMNS = {
    LOGP: ("reference_logp", "unconditional_logp")
}  # a scorer's one column has the signal's own name


@dataclass(frozen=True)
class Item:
    """One distinct (prompt, response), tokenised."""

    key: str
    pair: Pair
    number: int
    prompt_ids: list[int]
    response_ids: list[int]


def columns(signal: str) -> tuple[str, ...]:
    return COLUMNS.get(signal, (signal,))


def read_cache(folder: Storage, signal: str) -> dict[str, tuple[float, ...]]:
    """All values of a signal that are cached: key -> values in the order of ``columns(signal)``."""
    known: dict[str, tuple[float, ...]] = {}
    for name in folder.names():
        if name.startswith("part-") and name.endswith(".parquet"):
            shard = read_table(folder, name)
            values = [shard.column(c).to_pylist() for c in columns(signal)]
            known.update(
                zip(shard.column("key").to_pylist(), zip(*values, strict=True), strict=True)
            )
    return known


def write_shard(
    folder: Storage, signal: str, keys: Sequence[str], values: Sequence[Sequence[float]]
) -> None:
    named = {
        c: pa.array([v[i] for v in values], pa.float64()) for i, c in enumerate(columns(signal))
    }
    write_table(
        folder, f"part-{digest(list(keys))}.parquet", pa.table({"key": list(keys), **named})
    )


def score(
    config: Config,
    items: Sequence[Item],
    pairs: Sequence[Pair],
    fingerprints: dict[str, str],
    null_ids: list[int],
    cache: Storage,
    say: Callable[[str], None],
) -> Scored:
    """The scored table of ``items``; only what the cache does not hold is computed, on the connected Ray cluster.

    ``fingerprints`` has one entry a signal: "logp", and "reward" and "cost" where they come from a model or function.
    """
    scorers = {s: getattr(config.scores, s) for s in SCORES}
    given = {
        s: {i.key: _from_column(i, c.column) for i in items}
        for s, c in scorers.items()
        if c and c.column
    }
    folders = {s: cache / f"{s}-{f}" for s, f in fingerprints.items()}
    known = {s: read_cache(folder, s) for s, folder in folders.items()}
    need = {s: {i.key for i in items} - known[s].keys() for s in folders}
    for s in folders:
        say(
            f"score: {s}: {len(items) - len(need[s])} of {len(items)} responses are cached, {len(need[s])} to score"
        )
    for phase in _phases(config, [s for s in folders if need[s]]):
        _run_phase(
            config,
            phase,
            items,
            {s: need[s] for s in phase},
            {s: folders[s].uri for s in phase},
            null_ids,
            say,
        )
        known.update({s: read_cache(folders[s], s) for s in phase})
    rows: dict[str, dict[str, Any]] = {}
    for item in items:
        row: dict[str, Any] = {
            "prompt_ids": item.prompt_ids,
            "response_ids": item.response_ids,
            "reward": None,
            "cost": None,
        }
        for s, values in known.items():
            row.update(zip(columns(s), values[item.key], strict=True))
        rows[item.key] = row | {s: values[item.key] for s, values in given.items()}
    return Scored(list(pairs), rows)


def distinct_items(pairs: Iterable[Pair], documents: Iterable[Document]) -> list[Item]:
    """One item per distinct (prompt, response); ``documents`` are the pairs', in the same order."""
    items: dict[str, Item] = {}
    for pair, document in zip(pairs, documents, strict=True):
        for number, (key, ids) in enumerate(zip(document.keys, document.suffixes, strict=True)):
            if key not in items:
                items[key] = Item(key, pair, number, document.prefix, ids)
    return list(items.values())


def _from_column(item: Item, column: str) -> float:
    name = column.replace("{i}", str(item.number))
    try:
        value = float(item.pair.extra[name])
    except KeyError:
        raise UserError(
            f"{item.pair.source}: column {name!r}, which scores name, is missing"
        ) from None
    except (TypeError, ValueError):
        raise UserError(
            f"{item.pair.source}: column {name!r} is {item.pair.extra[name]!r}, a number is expected"
        ) from None
    if not math.isfinite(value):
        raise UserError(
            f"{item.pair.source}: column {name!r} is {value}, a finite number is expected"
        )
    return value


def _phases(config: Config, signals: list[str]) -> list[list[str]]:
    """Which signals one pool of actors computes: each model has its turn on the devices, functions ride with the first."""
    functions = [s for s in signals if s != LOGP and getattr(config.scores, s).function]
    models = [[s] for s in signals if s not in functions]
    if not models:
        return [functions] if functions else []
    return [models[0] + functions, *models[1:]]


def make_units(
    items: Sequence[Item], need: dict[str, set[str]], budget: int
) -> list[list[dict[str, Any]]]:
    """Groups of one prompt's responses, longest first, cut into units of at most ``budget`` tokens (a longer group is one)."""
    groups: dict[str, dict[str, Any]] = {}
    for item in items:
        wanted = [s for s, keys in need.items() if item.key in keys]
        if wanted:
            prompt = json.dumps(item.pair.prompt)
            group = groups.setdefault(
                prompt, {"prompt": item.pair.prompt, "ids": item.prompt_ids, "responses": []}
            )
            text = item.pair.responses[item.number]
            group["responses"].append(
                {
                    "key": item.key,
                    "text": text,
                    "ids": item.response_ids,
                    "need": wanted,
                    "at": item.pair.source,
                }
            )
    size = {
        p: len(g["ids"]) + sum(len(r["ids"]) for r in g["responses"]) for p, g in groups.items()
    }
    units: list[list[dict[str, Any]]] = []
    filled = budget + 1
    for prompt in sorted(groups, key=lambda p: (-size[p], p)):
        if filled + size[prompt] > budget:
            units.append([])
            filled = 0
        units[-1].append(groups[prompt])
        filled += size[prompt]
    return units


def _run_phase(
    config: Config,
    signals: list[str],
    items: Sequence[Item],
    need: dict[str, set[str]],
    folders: dict[str, str],
    null_ids: list[int],
    say: Callable[[str], None],
) -> None:
    import ray

    on_gpu = config.scores.gpus_per_worker > 0
    budget = (
        (32768 if on_gpu else 2048)
        if config.scores.batch_tokens == "auto"
        else config.scores.batch_tokens
    )
    units = make_units(items, need, budget)
    workers = _workers(config, ray.cluster_resources(), len(units))
    a_call = max(
        1, min(32, len(units) // (workers * 16))
    )  # the last calls leave no worker idle for long
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    calls = [json.dumps(units[start : start + a_call]) for start in range(0, len(units), a_call)]
    done = ray.data.from_items(
        [{"units": c} for c in calls], override_num_blocks=len(calls)
    ).map_batches(
        FrozenModels,
        fn_constructor_kwargs={
            "config": config.model_dump(mode="json"),
            "folders": folders,
            "null_ids": null_ids,
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=config.scores.cpus_per_worker,
        num_gpus=config.scores.gpus_per_worker,
    )
    total, scored = sum(len(g["responses"]) for u in units for g in u), 0
    next_told = total / 4
    for batch in done.iter_batches(batch_size=None):
        for fault in filter(None, batch["fault"]):
            raise UserError(str(fault))
        scored += int(batch["responses"].sum())
        if scored >= next_told:
            say(
                f"score: {' and '.join(signals)}: {scored} of {total} responses on {workers} worker(s)"
            )
            next_told += total / 4


def _workers(config: Config, resources: dict[str, float], units: int) -> int:
    """As many actors as there is work and room for; auto: every GPU, or up to 8 CPUs."""
    each_cpu, each_gpu = config.scores.cpus_per_worker, config.scores.gpus_per_worker
    room = (
        resources.get("CPU", 0) / each_cpu if not each_gpu else resources.get("GPU", 0) / each_gpu
    )
    if room < 1:
        raise UserError(
            f"scores: a worker needs {each_cpu:g} CPU and {each_gpu:g} GPU, the cluster has "
            f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
        )
    asked = config.scores.workers
    most = (room if each_gpu else min(room, 8)) if asked == "auto" else min(asked, room)
    return max(1, min(int(most), units))


class FrozenModels:
    """The Ray Data actor: the frozen models of one phase, and the shards that they write. A user's fault comes back as text."""

    def __init__(
        self, config: dict[str, Any], folders: dict[str, str], null_ids: list[int]
    ) -> None:
        self.config = Config.model_validate(config)
        self.folders = {s: Storage(uri) for s, uri in folders.items()}
        self.null_ids = null_ids
        self.compute: dict[str, Callable[[list[dict[str, Any]]], list[tuple[float, ...]]]] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        try:
            if not self.compute:  # here and not in __init__, whose faults Ray would only repeat
                self._load()
            return {"responses": [self._score(batch["units"])], "fault": [""]}
        except UserError as error:  # raised, it would reach the driver wrapped, or not at all
            return {"responses": [0], "fault": [str(error)]}

    def _score(self, calls: Iterable[str]) -> int:
        scored = 0
        for units in calls:
            results: dict[str, list[tuple[str, tuple[float, ...]]]] = {s: [] for s in self.compute}
            for unit in json.loads(units):
                for signal, compute in self.compute.items():
                    groups = [
                        {**g, "responses": [r for r in g["responses"] if signal in r["need"]]}
                        for g in unit
                    ]
                    groups = [g for g in groups if g["responses"]]
                    values = compute(groups) if groups else []
                    rows = [r for g in groups for r in g["responses"]]
                    for row, value in zip(rows, values, strict=True):
                        if not all(map(math.isfinite, value)):
                            raise UserError(
                                f"{row['at']}: {signal} of a response is {value}, a finite number is expected"
                            )
                        results[signal].append((row["key"], value))
                scored += sum(len(g["responses"]) for g in unit)
            for signal, rows in results.items():
                if rows:
                    write_shard(
                        self.folders[signal], signal, [k for k, _ in rows], [v for _, v in rows]
                    )
        return scored

    def _load(self) -> None:
        import torch

        threads = max(1, int(self.config.scores.cpus_per_worker))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        device = "cuda" if self.config.scores.gpus_per_worker > 0 else "cpu"
        for signal in self.folders:
            if signal == LOGP:
                self.compute[signal] = LogProbs(self.config, device, self.null_ids)
            else:
                self.compute[signal] = Texts(self.config, signal, device)


class LogProbs:
    """Reference and unconditional log-probability of each response, in nats, summed over its tokens."""

    def __init__(self, config: Config, device: str, null_ids: list[int]) -> None:
        from ..models.base import load_base
        from ..models.logprobs import ResponseLogProbs

        model = load_base(config.model, device=device)
        model.requires_grad_(False)
        self.module = ResponseLogProbs(model).eval()
        self.device, self.null_ids = device, null_ids
        auto = 1024 if device == "cpu" else 32768  # more would leave a core's caches (ours)
        self.pass_tokens = (
            auto if config.scores.batch_tokens == "auto" else config.scores.batch_tokens
        )

    def __call__(self, groups: list[dict[str, Any]]) -> list[tuple[float, ...]]:
        import torch

        from ..data.batching import collate, split_batch

        responses = [[r["ids"] for r in g["responses"]] for g in groups]
        sides = []
        for prefixes in ([g["ids"] for g in groups], [self.null_ids] * len(groups)):
            documents = [Document(p, r) for p, r in zip(prefixes, responses, strict=True)]
            lengths = [len(d.prefix) + sum(map(len, d.suffixes)) for d in documents]
            values: list[list[float]] = [[] for _ in documents]
            with torch.inference_mode():
                for part in split_batch(range(len(documents)), lengths, 1, self.pass_tokens)[0]:
                    made = iter(
                        self.module(collate([documents[i] for i in part]).to(self.device))
                        .double()
                        .cpu()
                        .tolist()
                    )
                    for i in part:
                        values[i] = [next(made) for _ in responses[i]]
            sides.append([value for document in values for value in document])
        return list(zip(*sides, strict=True))


class Texts:
    """A reward or cost of each response, by a model or a function of texts."""

    def __init__(self, config: Config, kind: Any, device: str) -> None:
        from ..models.scorers import load_scorer

        tokens = config.scores.batch_tokens
        scorer = getattr(config.scores, kind)
        self.score = load_scorer(
            scorer, kind, device=device, batch_tokens=None if tokens == "auto" else tokens
        )

    def __call__(self, groups: list[dict[str, Any]]) -> list[tuple[float, ...]]:
        prompts = [
            tuple((role, text) for role, text in g["prompt"])
            for g in groups
            for _ in g["responses"]
        ]
        return [
            (float(v),)
            for v in self.score(prompts, [r["text"] for g in groups for r in g["responses"]])
        ]
