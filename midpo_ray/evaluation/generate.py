"""Answers of a model to prompts: what to load for a WHAT of the command line, and batched generation.

Sampling draws each token by a number that depends on the prompt, the seed and the token's place alone, so that an answer is the
same whatever batch, worker or run it is made in (up to the arithmetic of a batch's padding).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Data, Model, digest, load_config
from ..errors import UserError
from ..storage import Storage
from .cached import Row
from .prompts import Prompt

VERSION = (
    1  # raise it when what a model answers changes, so that no cached answer is taken for a new one
)
PARTS = ("safety", "helpfulness", "base")


@dataclass(frozen=True)
class Contender:
    """One model of the table, and all that decides its answers."""

    name: str
    family: str  # base, expert, routed, baseline (an adapter), model
    fingerprint: str
    model: dict[str, Any]  # config.Model
    template: str
    adapter: str | None = None  # a PEFT folder
    routed: str | None = None  # a run directory
    run: str | None = None  # the run directory that it belongs to


@dataclass(frozen=True)
class Options:
    """How answers are made."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    batch: int = 16


def resolve(what: str, *, template: str = "auto", dtype: str = "float32") -> Contender:
    """The model that a WHAT names: a run directory (``RUN``, ``RUN:safety``, ``RUN:helpfulness``, ``RUN:base``), a PEFT adapter's
    folder, or a causal language model's folder or hub name. Runs keep their own template and dtype.

    Raises:
        UserError: nothing of the kind is there; it says what was looked for.
    """
    path, colon, part = what.rpartition(":")
    if colon and Path(path).is_dir() and part not in (*PARTS, "routed"):
        raise UserError(f"{what}: a part of a run is routed, {', '.join(PARTS)}")
    folder, part = (Path(path), part) if colon and Path(path).is_dir() else (Path(what), "routed")
    if (folder / "run.yaml").is_file() or (folder / "router" / "router.json").is_file():
        return _of_run(folder, part)
    if folder != Path(what):
        raise UserError(f"{what}: {folder} is no run directory, which alone has parts")
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, template, dtype)
    if "://" in what:
        raise UserError(
            f"{what}: a local folder is expected; copy a run to this machine by midpo fetch"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{what}: no run (run.yaml), adapter (adapter_config.json) or model (config.json) is in this folder"
        )
    return _model(
        Model.model_validate({"path": what, "dtype": dtype}), template, folder.resolve().name
    )


def base_of(contender: Contender) -> Contender:
    """The frozen base that a run's model or an adapter stands on."""
    if contender.run is not None:
        return _of_run(Path(contender.run), "base")
    return _model(
        Model.model_validate(contender.model),
        contender.template,
        Path(contender.model["path"]).name,
        "base",
    )


def _model(
    model: Model, template: str, name: str, family: str = "model", run: str | None = None
) -> Contender:
    from ..models.base import model_fingerprint

    fingerprint = digest(model_fingerprint(model.path, model.revision), model.dtype, template)
    return Contender(name, family, fingerprint, model.model_dump(mode="json"), template, run=run)


def _adapter(folder: Path, template: str, dtype: str) -> Contender:
    try:
        base = json.loads((folder / "adapter_config.json").read_text("utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder}/adapter_config.json: not a PEFT adapter's configuration that names its base"
        ) from None
    model = Model.model_validate({"path": base, "dtype": dtype})
    return _with_adapter(model, folder, template, folder.resolve().name, "baseline")


def _with_adapter(
    model: Model, folder: Path, template: str, name: str, family: str, run: str | None = None
) -> Contender:
    from ..models.assembly import hash_adapter

    base = _model(model, template, name)
    fingerprint = digest(base.fingerprint, hash_adapter(folder))
    return Contender(name, family, fingerprint, base.model, template, adapter=str(folder), run=run)


def _of_run(folder: Path, part: str) -> Contender:
    name = folder.resolve().name
    router = folder / "router" / "router.json"
    experts = {p: folder / "experts" / p for p in PARTS[:2]}
    if router.is_file():
        settings = json.loads(router.read_text("utf-8"))
        model, template = Model.model_validate(settings["base"]), settings["data"]["template"]
    else:
        config = load_config(folder / "run.yaml")
        model, template = config.model, config.data.template
        if (told := experts["safety"] / "adapter_config.json").is_file() and model.path.startswith(
            "builtin:"
        ):
            model = model.model_copy(
                update={"path": json.loads(told.read_text("utf-8"))["base_model_name_or_path"]}
            )
    if part == "routed":
        if not router.is_file():
            raise UserError(
                f"{folder}: its router is not trained yet; {folder}:safety and {folder}:helpfulness may be"
            )
        files = [
            router,
            router.with_name("router.safetensors"),
            *(f / "adapter_model.safetensors" for f in experts.values()),
        ]
        content = [
            hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
        ]
        print_ = digest(content, _model(model, template, name).fingerprint)
        return Contender(
            name,
            "routed",
            print_,
            model.model_dump(mode="json"),
            template,
            routed=str(folder),
            run=str(folder),
        )
    if part == "base":
        return _model(model, template, f"{name}: base", "base", str(folder))
    return _with_adapter(
        model, experts[part], template, f"{name}: {part} expert", "expert", str(folder)
    )


def folder_of(cache: Storage, contender: Contender, options: Options) -> Storage:
    """Where a contender's answers are kept; the batch's size is no part of it."""
    keys = {k: v for k, v in asdict(options).items() if k != "batch"}
    return cache / f"answers-{digest(VERSION, contender.fingerprint, contender.template, keys)}"


def rows_of(
    prompts: Sequence[Prompt], seeds: Sequence[int], mapped: frozenset[tuple[str, str]]
) -> dict[tuple[str, str, int], Row]:
    """(set, id, seed) -> what a Generator takes, the shortest prompts first; ``mapped`` (set, id) get their gates' heat map."""
    ordered = sorted(prompts, key=lambda p: sum(len(text) for _, text in p.turns))
    rows = {}
    for seed in seeds:
        for p in ordered:
            work = {
                "messages": p.turns,
                "seed": seed,
                "map": seed == seeds[0] and (p.set, p.id) in mapped,
            }
            rows[p.set, p.id, seed] = {"key": digest(work), **work}
    return rows


class Generator:
    """Rows of messages and seed -> response, tokens, truncated; for a routed model the gates too, layer by layer."""

    def __init__(self, contender: dict[str, Any], options: dict[str, Any]) -> None:
        import torch

        from ..data.tokens import Tokenization
        from ..models.base import load_tokenizer

        self.contender, self.options = Contender(**contender), Options(**options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self._load(device)
        model = Model.model_validate(self.contender.model)
        self.tokenizer = load_tokenizer(model)
        self.context = int(getattr(self.model.config, "max_position_embeddings", 4096))
        room = self.context - self.options.max_new_tokens
        if room < 8:
            raise UserError(
                f"--max-new-tokens {self.options.max_new_tokens}: {model.path} has a context of {self.context} tokens"
            )
        lengths = {
            "max_length": self.context,
            "max_prompt_length": room,
            "long_prompts": "truncate",
        }
        data = Data.model_validate(
            {"sets": [{"path": "none"}], "template": self.contender.template, **lengths}
        )
        self.tokens = Tokenization(self.tokenizer, data)
        said = self.model.generation_config.eos_token_id
        self.eos = sorted(
            {self.tokens.eos, *(said if isinstance(said, list) else [] if said is None else [said])}
        )
        self.stop: list[str] = []  # texts that end an answer too, and stay in it

    def _load(self, device: str) -> Any:
        from ..models.assembly import load_routed
        from ..models.base import load_adapter, load_base

        if self.contender.routed is not None:
            return load_routed(self.contender.routed, device=device)
        model = Model.model_validate(self.contender.model)
        base = load_base(model, device, serve=True)
        return (
            base
            if self.contender.adapter is None
            else load_adapter(base, self.contender.adapter).merge_and_unload()
        )

    def __call__(self, rows: list[Row]) -> list[Row]:
        prompts = [
            self.tokens.prompt_ids(tuple((role, text) for role, text in row["messages"]))
            for row in rows
        ]
        made = self._generate(prompts, [digest(row["messages"], row["seed"]) for row in rows])
        values = []
        for ids in made:
            ended = next((i for i, token in enumerate(ids) if token in self.eos), None)
            text = self.tokenizer.decode(ids[:ended], skip_special_tokens=True).strip()
            values.append(
                {
                    "response": text,
                    "tokens": len(ids) if ended is None else ended,
                    "truncated": ended is None,
                }
            )
        return self._with_gates(rows, values) if self.contender.routed is not None else values

    def _generate(self, prompts: list[list[int]], keys: list[str]) -> list[list[int]]:
        """Ids behind each prompt: up to and with EOS where there is one."""
        import torch
        from transformers import LogitsProcessorList

        longest = max(map(len, prompts))
        pad = self.tokens.eos
        ids = torch.tensor(
            [[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device
        )
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device
        )
        draw = LogitsProcessorList([Draw(keys, self.options)] if self.options.temperature else [])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.options.max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.eos,
                pad_token_id=pad,
                logits_processor=draw,
                stop_strings=self.stop or None,
                tokenizer=self.tokenizer,
            )
        answers = []
        for row in out[:, longest:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.eos), len(row) - 1)
            answers.append(row[: end + 1])
        return answers

    def _with_gates(self, rows: list[Row], values: list[Row]) -> list[Row]:
        turns = [[tuple(m) for m in row["messages"]] for row in rows]
        for value, gates in zip(values, self.model.gates(turns), strict=True):
            value["gates"] = {e: [round(v, 5) for v in gates[e][:, -1].tolist()] for e in PARTS[:2]}
        for row, turn, value in zip(rows, turns, values, strict=True):
            if row["map"]:
                gates = self.model.gates([turn], [value["response"]])[0]
                ids = list(gates["tokens"])  # a token by itself may lack the space before it
                said = [self.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
                words = [after[len(before) :] for before, after in pairwise(said)]
                layers = {
                    e: [[round(v, 4) for v in layer] for layer in gates[e].tolist()]
                    for e in PARTS[:2]
                }
                value["map"] = {"tokens": words, "prompt_tokens": gates["prompt_tokens"], **layers}
        return values


class Draw:
    """A logits processor that samples: all but the drawn token get -inf, so that greedy generation takes it."""

    def __init__(self, keys: Sequence[str], options: Options) -> None:
        seeds = [int(key[:16], 16) for key in keys]
        self.uniform = np.stack(
            [np.random.default_rng(seed).random(options.max_new_tokens) for seed in seeds]
        )
        self.temperature, self.top_p, self.step = options.temperature, options.top_p, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores [R, V] -> the same with one finite entry a row: nucleus sampling by inverting the cumulative distribution."""
        import torch

        ordered, token = (scores.double() / self.temperature).softmax(-1).sort(-1, descending=True)
        total = ordered.cumsum(-1)
        ordered = ordered.where(total - ordered < self.top_p, 0.0)  # the fewest that reach top_p
        total = ordered.cumsum(-1)
        drawn = (
            torch.as_tensor(self.uniform[:, self.step : self.step + 1], device=scores.device)
            * total[:, -1:]
        )
        place = torch.searchsorted(total, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token.gather(1, place), 0.0)


def uses_vllm(contender: Contender) -> bool:
    """Whether vLLM answers for it: where it can be imported, for a model that is not routed."""
    return contender.routed is None and importlib.util.find_spec("vllm") is not None


class VllmGenerator:
    """As Generator, by vLLM. Not tested here: no machine that had vLLM has run it."""

    def __init__(self, contender: dict[str, Any], options: dict[str, Any]) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        from ..data.tokens import Tokenization
        from ..models.base import load_tokenizer

        self.contender, self.options = Contender(**contender), Options(**options)
        model = Model.model_validate(self.contender.model)
        self.llm = LLM(
            model.path,
            dtype=model.dtype,
            enable_lora=self.contender.adapter is not None,
            max_lora_rank=64,
        )
        long = {"max_length": 1 << 20, "max_prompt_length": 1 << 19}
        self.tokens = Tokenization(
            load_tokenizer(model),
            Data.model_validate(
                {"sets": [{"path": "none"}], "template": self.contender.template, **long}
            ),
        )

    def __call__(self, rows: list[Row]) -> list[Row]:
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        prompts = [
            {
                "prompt_token_ids": self.tokens.prompt_ids(
                    tuple((role, text) for role, text in row["messages"])
                )
            }
            for row in rows
        ]
        o = self.options
        seeds = [int(digest(row["messages"], row["seed"])[:8], 16) for row in rows]
        how = [
            SamplingParams(
                temperature=o.temperature, top_p=o.top_p, max_tokens=o.max_new_tokens, seed=seed
            )
            for seed in seeds
        ]
        lora = LoRARequest("adapter", 1, self.contender.adapter) if self.contender.adapter else None
        made = [
            r.outputs[0] for r in self.llm.generate(prompts, how, use_tqdm=False, lora_request=lora)
        ]
        return [
            {
                "response": m.text.strip(),
                "tokens": len(m.token_ids),
                "truncated": m.finish_reason == "length",
            }
            for m in made
        ]
