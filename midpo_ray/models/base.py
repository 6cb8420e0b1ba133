"""The base model, its tokenizer, and LoRA adapters on it: every fault that a recipe can cause is one line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import Lora, Model
from ..errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTENT = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.py",
)  # files that decide what a local model computes
ADAPTER_CONFIG = "adapter_config.json"
_hashes: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> sha256


# --- base -------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be loaded, or has no EOS token.
    """
    from transformers import AutoTokenizer

    with _explained(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model.path, **_source(model))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer of {model.path}: it has no EOS token, which ends every response; set eos_token in its files"
        )
    return tokenizer


def load_base(
    model: Model, device: torch.device | str | None = None, *, serve: bool = False
) -> PreTrainedModel:
    """The causal LM in its recipe's dtype, frozen, in evaluation mode.

    ``attention: auto`` is FlexAttention on CUDA, which is for the trees of training and not where a model is to ``serve``;
    elsewhere SDPA, or eager attention where the architecture has no SDPA.

    Raises:
        UserError: the path is no causal LM, or the hub does not have it here.
    """
    from transformers import AutoModelForCausalLM

    if serve and model.attention == "auto" and torch.device(device or "cpu").type == "cuda":
        model = model.model_copy(update={"attention": "sdpa"})
    return _load(AutoModelForCausalLM, "causal language model", model, device)


def load_classifier(model: Model, device: torch.device | str | None = None) -> PreTrainedModel:
    """The same decoder as a classifier of one label, whose head is new where the model has none."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is no news
    try:
        return _load(
            AutoModelForSequenceClassification, "sequence classifier", model, device, num_labels=1
        )
    finally:
        transformers_logging.set_verbosity(said)


def _load(
    auto: Any, what: str, model: Model, device: torch.device | str | None, **settings: Any
) -> PreTrainedModel:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if model.trust_remote_code:
        logging.getLogger("midpo_ray").warning(
            "model %s: code from its repository is run (trust_remote_code)", model.path
        )
    settings |= {"dtype": getattr(torch, model.dtype), "use_safetensors": True, **_source(model)}
    settings["attn_implementation"] = model.attention
    if model.attention == "auto":
        settings["attn_implementation"] = (
            "flex_attention" if torch.device(device or "cpu").type == "cuda" else None
        )
    with _explained(model, what):
        base = auto.from_pretrained(model.path, **settings)
    base.requires_grad_(False)
    return (base if device is None else base.to(device)).eval()


def _source(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


@contextmanager
def _explained(model: Model, what: str) -> Iterator[None]:
    """The many ways in which a path is no model, as one UserError."""
    from safetensors import SafetensorError

    local = Path(model.path)
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(
            f"model {model.path}: no model there, a folder with config.json is expected (or a hub name)"
        )
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if local.exists():
            raise UserError(
                f"model {model.path}: no {what} could be loaded from it: {reason[:300]}"
            ) from None
        raise UserError(
            f"model {model.path}: no such folder, and no {what} of that hub name could be loaded: {reason[:300]}"
        ) from None


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """What decides a model's results: sha256 over a local folder's configuration, tokenizer and weights; a hub model's commit.

    Hashes of files are kept for the process, by path, size and time of change.

    Raises:
        UserError: no such folder, and no commit of that name is known here.
    """
    folder = Path(path)
    if folder.is_dir():
        files = sorted({file for pattern in CONTENT for file in folder.glob(pattern)})
        if not files:
            raise UserError(
                f"model {path}: no model there, a folder with config.json is expected (or a hub name)"
            )
        return hashlib.sha256(
            "".join(f"{file.name}\0{_sha256(file)}\n" for file in files).encode()
        ).hexdigest()
    from transformers.utils.hub import cached_file, extract_commit_hash

    with _explained(Model(path=path, revision=revision), "model"):
        config = cached_file(path, "config.json", revision=revision)
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise UserError(f"model {path}: its commit is not known")
    return commit


def _sha256(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        with file.open("rb") as opened:
            _hashes[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    return _hashes[key]


# --- adapters ---------------------------------------------------------------------------------------------------------------


def check_targets(model: Model, lora: Lora, layers: int | None = None) -> None:
    """Raises UserError where a target module is in no Linear's name, or where there are not so many ``layers``; looks at the
    architecture, loads no weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(model, "causal language model"):
        config = AutoConfig.from_pretrained(model.path, **_source(model))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code
            )
    _check_targets(skeleton, lora.target_modules, model.path)
    there = config.get_text_config().num_hidden_layers
    if layers is not None and layers > there:
        raise UserError(f"reward_model.layers is {layers}, {model.path} has {there}")


def _check_targets(model: nn.Module, targets: Iterable[str], name: str) -> None:
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linears):
            there = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise UserError(
                f"lora.target_modules: {target!r} matches no Linear of {name}; it has {there}"
            )


def add_lora(
    model: PreTrainedModel,
    lora: Lora,
    seed: int,
    *,
    task: str | None = "CAUSAL_LM",
    layers: list[int] | None = None,
) -> PeftModel:
    """The model with a fresh adapter, which alone is trainable; at first it changes nothing.

    A is drawn as PEFT draws it (Kaiming uniform), but by ``seed`` alone, whatever the device and the number of ranks; B is 0.
    The adapter has the model's dtype.

    Args:
        task: PEFT's task type; None for a model that is no causal LM.
        layers: the decoder layers that get it; default: all.

    Raises:
        UserError: a target module is in no Linear's name; it names those that exist.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.target_modules, model.name_or_path)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a fraction is fine
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        layers_to_transform=layers,
        task_type=task,
    )
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
                parameter.copy_(
                    torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                )
    return adapted  # type: ignore[return-value]


def load_adapter(model: PreTrainedModel, folder: str | Path, lora: Lora | None = None) -> PeftModel:
    """The model with an adapter of a PEFT folder, frozen.

    Raises:
        UserError: no adapter there, one of another base, or of another rank or other modules than ``lora`` says.
    """
    from peft import PeftModel

    where = Path(folder) / ADAPTER_CONFIG
    try:
        settings = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: not readable, a PEFT adapter folder is expected ({error.__class__.__name__})"
        ) from None
    if lora is not None:
        found = {
            "r": settings.get("r"),
            "target_modules": sorted(settings.get("target_modules") or []),
        }
        for key, value in {"r": lora.r, "target_modules": sorted(lora.target_modules)}.items():
            if found[key] != value:
                raise UserError(f"{where}: {key} is {found[key]!r}, lora.{key} is {value!r}")
    check_adapter_base(settings.get("base_model_name_or_path") or "", model.name_or_path, where)
    _check_targets(model, settings.get("target_modules") or [], model.name_or_path)
    try:
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes
        raise UserError(
            f"{folder}: this adapter does not fit {model.name_or_path}: {' '.join(str(error).split())[:300]}"
        ) from None


def check_adapter_base(said: str, here: str, where: Path) -> None:
    """Raises UserError where an adapter's configuration names another base: by name, or by content where both are folders.

    A base folder that is not on this machine cannot be compared, and passes.
    """
    if said in ("", here) or os.path.realpath(said) == os.path.realpath(here):
        return
    if os.path.isabs(said) and not os.path.isdir(said):
        return
    if (
        os.path.isdir(said)
        and os.path.isdir(here)
        and model_fingerprint(said) == model_fingerprint(here)
    ):
        return
    raise UserError(f"{where}: an adapter of {said}, the base here is {here}")
