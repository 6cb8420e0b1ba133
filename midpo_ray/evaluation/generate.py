"""Answers of models to prompts: which model a WHAT of the command line names, and its generation.

Sampling draws each token by a number that depends on the prompt, the seed and the token's position
alone, so that an answer does not depend on the batch, worker or run it is made in (apart from the
arithmetic of padding), and comparisons between models are paired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..config import EXPERTS, Data, Model, digest, load_config
from ..data.tokens import Tokenization
from ..errors import UserError
from ..models.assembly import hash_adapter, load_routed
from ..models.base import load_adapter, load_base, load_tokenizer, model_fingerprint
from ..models.generation import Draw, end_tokens, generate_ids
from ..pipeline.cached_map import CacheRow, Values
from ..storage import Storage
from .prompts import Prompt

VERSION = 2  # raise it when a model's answers or their columns change: old cached ones are not read
PARTS = (*EXPERTS, "base")


@dataclass(frozen=True)
class ModelSpec:
    """One model to evaluate, and all that decides its answers."""

    name: str
    family: str  # base, expert, routed, baseline (an adapter), model
    fingerprint: str
    model: Model
    template: str
    adapter: str | None = None  # a PEFT folder
    routed: str | None = None  # a run directory
    run: str | None = None  # the run directory that it belongs to

    @property
    def tokenizer(self) -> str | None:
        """The adapter's folder, where a tokenizer came with it."""
        own = self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file()
        return self.adapter if own else None

    @property
    def path(self) -> str:
        return self.routed or self.adapter or self.model.path


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    batch: int = 16


GREEDY = GenerationOptions()


@dataclass(frozen=True)
class Answer:
    """One answer; T tokens of prompt and response, L routed layers."""

    prompt_ids: list[int]
    response_ids: list[int]  # with the token that ends it, unless it is truncated
    response: str
    tokens: int  # of the response, without the token that ends it
    truncated: bool
    gates: dict[str, list[float]] | None = None  # expert -> [L], at the prompt's last token
    gate_map: dict[str, Any] | None = None  # tokens [T], prompt_tokens, and expert -> [L][T]

    @property
    def values(self) -> Values:
        """What is cached of it."""
        values: Values = {"response": self.response, "tokens": self.tokens}
        values |= {"truncated": self.truncated, "gates": self.gates, "gate_map": self.gate_map}
        return values


def resolve_model(what: str, *, template: str = "auto", dtype: str = "float32") -> ModelSpec:
    """The model that a WHAT names.

    That is a run directory (``RUN``, ``RUN:safety``, ``RUN:helpfulness``, ``RUN:base``), the folder
    of a PEFT adapter, or a causal language model's folder or hub name. Runs keep their own template
    and dtype.

    Raises:
        UserError: there is no such thing; the message names what was looked for.
    """
    path, colon, part = what.rpartition(":")
    has_part = bool(colon) and Path(path).is_dir()
    if has_part and part not in (*PARTS, "routed"):
        raise UserError(f"{what}: a part of a run is routed, {', '.join(PARTS)}")
    folder = Path(path if has_part else what)
    if (folder / "run.yaml").is_file() or (folder / "router" / "router.json").is_file():
        return _of_run(folder, part if has_part else "routed")
    if has_part:
        raise UserError(f"{what}: {folder} is not a run directory, and only runs have parts")
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, template, dtype)
    if "://" in what:
        raise UserError(f"{what}: a local folder is expected; copy a run here by midpo fetch")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{what}: the folder holds no run (run.yaml), adapter (adapter_config.json) or model "
            "(config.json)"
        )
    model = Model.model_validate({"path": what, "dtype": dtype})
    return _model(model, template, folder.resolve().name)


def base_of(spec: ModelSpec) -> ModelSpec:
    """The frozen base of a run's model or of an adapter."""
    if spec.run is not None:
        return _of_run(Path(spec.run), "base")
    return _model(spec.model, spec.template, Path(spec.model.path).name, "base")


def _model(
    model: Model, template: str, name: str, family: str = "model", run: str | None = None
) -> ModelSpec:
    fingerprint = digest(model_fingerprint(model.path, model.revision), model.dtype, template)
    return ModelSpec(name, family, fingerprint, model, template, run=run)


def _adapter(folder: Path, template: str, dtype: str) -> ModelSpec:
    path = _base_path(folder)
    if path is None:
        raise UserError(
            f"{folder}/adapter_config.json: base_model_name_or_path is missing, the base model's "
            "folder or hub name is expected"
        )
    model = Model.model_validate({"path": path, "dtype": dtype})
    return _with_adapter(model, folder, template, folder.resolve().name, "baseline")


def _base_path(adapter: Path) -> str | None:
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        path = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if isinstance(path, str) and path else None


def _with_adapter(
    model: Model, folder: Path, template: str, name: str, family: str, run: str | None = None
) -> ModelSpec:
    base = _model(model, template, name)
    fingerprint = digest(base.fingerprint, hash_adapter(folder), _tokenizer_hashes(folder))
    return ModelSpec(name, family, fingerprint, model, template, adapter=str(folder), run=run)


def _tokenizer_hashes(folder: Path) -> list[str]:
    """sha256 of the files of a tokenizer that came with an adapter; none where there is none."""
    files = sorted(folder.glob("tokenizer*")) + sorted(folder.glob("chat_template*"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _of_run(folder: Path, part: str) -> ModelSpec:
    name, run = folder.resolve().name, str(folder)
    router = folder / "router" / "router.json"
    experts = {part: folder / "experts" / part for part in EXPERTS}
    if router.is_file():
        settings = json.loads(router.read_text("utf-8"))
        model, template = Model.model_validate(settings["base"]), settings["data"]["template"]
    else:
        config = load_config(folder / "run.yaml")
        model, template = config.model, config.data.template
        trained_on = _base_path(experts["safety"])
        if model.path.startswith("builtin:") and trained_on is not None:
            model = model.model_copy(update={"path": trained_on})
    if part == "base":
        return _model(model, template, f"{name}: base", "base", run)
    if part in EXPERTS:
        return _with_adapter(
            model, experts[part], template, f"{name}: {part} expert", "expert", run
        )
    if not router.is_file():
        raise UserError(
            f"{folder}: it has no trained router yet; {folder}:safety and {folder}:helpfulness are "
            "its experts"
        )
    files = [router, router.with_name("router.safetensors")]
    files += [expert / "adapter_model.safetensors" for expert in experts.values()]
    content = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    fingerprint = digest(content, _model(model, template, name).fingerprint)
    return ModelSpec(name, "routed", fingerprint, model, template, routed=run, run=run)


def answers_folder(cache: Storage, spec: ModelSpec, options: GenerationOptions) -> Storage:
    """Where a model's answers are cached; the size of a batch does not matter."""
    keys = {name: value for name, value in asdict(options).items() if name != "batch"}
    return cache / f"answers-{digest(VERSION, spec.fingerprint, spec.template, keys)}"


AnswerKey = tuple[str, str, int]  # set, id of the prompt, seed


def answer_rows(
    prompts: Sequence[Prompt], seeds: Sequence[int], mapped: frozenset[tuple[str, str]]
) -> dict[AnswerKey, CacheRow]:
    """What a Generator takes, short prompts first; ``mapped`` (set, id) get a heat map of gates."""
    by_length = sorted(prompts, key=lambda p: sum(len(text) for _, text in p.turns))
    rows: dict[AnswerKey, CacheRow] = {}
    for seed in seeds:
        for p in by_length:
            with_map = seed == seeds[0] and (p.set, p.id) in mapped
            work = {"messages": p.turns, "seed": seed, "map": with_map}
            rows[p.set, p.id, seed] = {"key": digest(work), **work}
    return rows


def answers_table_rows(
    prompts: Sequence[Prompt], seeds: Sequence[int], values: Mapping[AnswerKey, Values]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows of the answers table, and what a report shows of the gates (None without a router)."""
    rows: list[dict[str, Any]] = []
    routing: dict[str, Any] = {"rows": [], "examples": []}
    for seed in seeds:
        for p in prompts:
            value = values[p.set, p.id, seed]
            row = {"seed": seed, "set": p.set, "id": p.id, "prompt": p.text}
            row |= {"harmful": p.harmful, "category": p.category}
            row |= {name: value[name] for name in ("response", "tokens", "truncated")}
            gates, gate_map = value.get("gates"), value.get("gate_map")
            if gates:
                row |= {f"gate_{e}": sum(layers) / len(layers) for e, layers in gates.items()}
                if seed == seeds[0]:
                    routing["rows"].append({"harmful": p.harmful, **gates})
            if gate_map:
                title = {"title": f"{p.set} {p.id}", "harmful": p.harmful}
                routing["examples"].append({**title, **gate_map})
            rows.append(row)
    return rows, routing if routing["rows"] else None


class Generator:
    """Answers rows of messages and seed, in batches.

    Args:
        model: in place of the one that ``spec`` names, which is loaded otherwise.
    """

    def __init__(self, spec: ModelSpec, options: GenerationOptions, model: Any = None) -> None:
        self.spec, self.options = spec, options
        self.model = _load(spec) if model is None else model
        self.tokenizer = load_tokenizer(spec.model, spec.tokenizer)
        self.context = int(getattr(self.model.config, "max_position_embeddings", 4096))
        room = self.context - options.max_new_tokens
        if room < 8:
            raise UserError(
                f"--max-new-tokens {options.max_new_tokens}: {spec.model.path} has a context of "
                f"{self.context} tokens"
            )
        lengths = {"max_length": self.context, "max_prompt_length": room}
        data = {"sets": [{"path": "none"}], "template": spec.template, "long_prompts": "truncate"}
        self.tokens = Tokenization(self.tokenizer, Data.model_validate({**data, **lengths}))
        self.eos = end_tokens(self.model, self.tokens)

    def __call__(self, rows: Sequence[CacheRow]) -> list[dict[str, Values]]:
        return [{"answer": answer.values} for answer in self.answer(rows)]

    def answer(self, rows: Sequence[CacheRow], sampler: Any = None) -> list[Answer]:
        """One answer per row of one batch; ``sampler`` in place of ``Draw``."""
        turns = [tuple((role, text) for role, text in row["messages"]) for row in rows]
        prompts = [self.tokens.prompt_ids(messages) for messages in turns]
        o = self.options
        if sampler is None and o.temperature:
            keys = [digest(row["messages"], row["seed"]) for row in rows]
            sampler = Draw(keys, o.max_new_tokens, o.temperature, o.top_p)
        longest = o.max_new_tokens
        responses = generate_ids(
            self.model, prompts, self.eos, sampler=sampler, max_new_tokens=longest
        )
        routed = self.spec.routed is not None
        gates = self.model.gates(turns) if routed else []
        answers = []
        for i, (row, ids) in enumerate(zip(rows, responses, strict=True)):
            truncated = ids[-1] not in self.eos
            tokens = len(ids) if truncated else len(ids) - 1
            text = self.tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()
            last = None
            if routed:
                last = {e: [round(v, 5) for v in gates[i][e][:, -1].tolist()] for e in EXPERTS}
            gate_map = self._gate_map(turns[i], text) if routed and row["map"] else None
            answers.append(Answer(prompts[i], ids, text, tokens, truncated, last, gate_map))
        return answers

    def _gate_map(self, turns: tuple[tuple[str, str], ...], response: str) -> dict[str, Any]:
        """The gates of every layer at every token of prompt and response."""
        gates = self.model.gates([turns], [response])[0]
        ids = list(gates["tokens"])  # decoded alone, a token may lack the space before it
        texts = [self.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        words = [after[len(before) :] for before, after in pairwise(texts)]
        layers = {e: [[round(v, 4) for v in layer] for layer in gates[e].tolist()] for e in EXPERTS}
        return {"tokens": words, "prompt_tokens": gates["prompt_tokens"], **layers}


def _load(spec: ModelSpec) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if spec.routed is not None:
        return load_routed(spec.routed, device=device)
    base = load_base(spec.model, device, serve=True)
    if spec.adapter is None:
        return base
    return load_adapter(base, spec.adapter).merge_and_unload()
