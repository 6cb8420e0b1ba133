"""The base model, its tokenizer, and LoRA adapters on it; a fault of a recipe is one line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import Lora, Model
from ..errors import UserError
from .selfcheck import BATCHED, check_generation

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Files that decide what a local model computes.
CONTENT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
ADAPTER_CONFIG = "adapter_config.json"
_PLACEHOLDER = re.compile("image|audio|video|vision")  # tokens that no text holds
_hashes: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> sha256


# --- base -----------------------------------------------------------------------------------------


def load_tokenizer(model: Model, folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one in ``folder``, where an adapter brought its own.

    Raises:
        UserError: it cannot be loaded, has no EOS token, or has a token beyond the model's
            embeddings.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = str(folder or model.path)
    source = {"trust_remote_code": model.trust_remote_code} if folder else _source(model)
    with _explained(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, **source)
        config = AutoConfig.from_pretrained(model.path, **_source(model)).get_text_config()
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer of {where}: it has no EOS token, which ends every response; set "
            "eos_token in its files"
        )
    size = config.vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    for token, number in sorted(beyond.items(), key=lambda item: item[1]):
        if not _PLACEHOLDER.search(token):
            raise UserError(
                f"tokenizer of {where}: token {token!r} has id {number}, and the embedding matrix "
                f"of {model.path} has {size} rows: resize_token_embeddings makes room for it"
            )
    return tokenizer


def load_base(
    model: Model, device: torch.device | str | None = None, *, serve: bool = False
) -> PreTrainedModel:
    """The causal LM in its recipe's dtype, frozen, in evaluation mode.

    ``attention: auto`` is FlexAttention on CUDA for the trees of training, SDPA where the model is
    to ``serve``; elsewhere SDPA, or eager attention where the architecture has no SDPA.

    Raises:
        UserError: the path does not hold a causal LM, the hub does not have it here, or one that is
            to serve fails the self-check of generation.
    """
    from transformers import AutoModelForCausalLM

    if serve and model.attention == "auto" and torch.device(device or "cpu").type == "cuda":
        model = model.model_copy(update={"attention": "sdpa"})
    base = _load(AutoModelForCausalLM, "causal language model", model, device)
    if serve:
        setattr(base, BATCHED, check_generation(base, model.path))
    return base


def load_classifier(model: Model, device: torch.device | str | None = None) -> PreTrainedModel:
    """The same decoder as a classifier of one label, whose head is new where the model has none."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is what is expected here
    try:
        return _load(
            AutoModelForSequenceClassification, "sequence classifier", model, device, num_labels=1
        )
    finally:
        transformers_logging.set_verbosity(verbosity)


def _load(
    auto: Any, what: str, model: Model, device: torch.device | str | None, **settings: Any
) -> PreTrainedModel:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if model.trust_remote_code:
        log.warning("model %s: code from its repository is run (trust_remote_code)", model.path)
    attention: str | None = model.attention
    if attention == "auto":
        on_gpu = torch.device(device or "cpu").type == "cuda"
        attention = "flex_attention" if on_gpu else None
    with _explained(model, what):
        base = auto.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            attn_implementation=attention,
            **_source(model),
            **settings,
        )
    base.requires_grad_(False)
    return (base if device is None else base.to(device)).eval()


def _source(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


@contextmanager
def _explained(model: Model, what: str) -> Iterator[None]:
    """Raises the many ways in which a path does not hold a model as one UserError."""
    from safetensors import SafetensorError

    local = Path(model.path)
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(f"model {model.path}: a folder with config.json is expected, or a hub name")
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"no {what} could be loaded from it"
        if not local.exists():
            problem = f"it is not a folder here, and no {what} of that hub name could be loaded"
        raise UserError(f"model {model.path}: {problem}: {reason}") from None


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """What decides a model's results: a sha256 over a local folder, or the commit of a hub model.

    The sha256 is over configuration, tokenizer and weights. Hashes of files are kept for the
    process, by path, size and time of change.

    Raises:
        UserError: there is no such folder, and no commit of that name is known here.
    """
    folder = Path(path)
    if folder.is_dir():
        files = sorted({file for pattern in CONTENT for file in folder.glob(pattern)})
        if not files:
            raise UserError(f"model {path}: a folder with config.json is expected, or a hub name")
        lines = [f"{file.name}\0{_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
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


# --- adapters -------------------------------------------------------------------------------------


def check_targets(model: Model, lora: Lora, layers: int | None = None) -> None:
    """Compare a recipe with the architecture; no weight is loaded.

    Raises:
        UserError: a target module is in no Linear's name, or the model has fewer than ``layers``.
    """
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

    A is drawn as PEFT draws it (Kaiming uniform), but by ``seed`` alone, whatever the device and
    the number of ranks; B is 0. The adapter has the model's dtype.

    Args:
        task: PEFT's task type; None for a model that is not a causal LM.
        layers: the decoder layers that get it; default: all.

    Raises:
        UserError: a target module is in no Linear's name; it names those that exist.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.target_modules, model.name_or_path)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a fraction too
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
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
    return adapted  # type: ignore[return-value]


def load_adapter(model: PreTrainedModel, folder: str | Path, lora: Lora | None = None) -> PeftModel:
    """The model with an adapter of a PEFT folder, frozen.

    Raises:
        UserError: the folder holds no adapter, one of another base, or one of another rank or other
            modules than ``lora``.
    """
    from peft import PeftModel

    where = Path(folder) / ADAPTER_CONFIG
    settings = adapter_settings(folder)
    if lora is not None:
        targets = settings.get("target_modules") or []
        found: dict[str, Any] = {"r": settings.get("r"), "target_modules": sorted(targets)}
        wanted: dict[str, Any] = {"r": lora.r, "target_modules": sorted(lora.target_modules)}
        for key, value in wanted.items():
            if found[key] != value:
                raise UserError(f"{where}: {key} is {found[key]!r}, lora.{key} is {value!r}")
    check_adapter_base(settings.get("base_model_name_or_path") or "", model.name_or_path, where)
    try:
        return PeftModel.from_pretrained(
            model,  # type: ignore[arg-type]
            str(folder),
            autocast_adapter_dtype=False,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]  # RuntimeError: shapes; TypeError: unknown keys
        raise UserError(
            f"{folder}: this adapter does not fit {model.name_or_path}: {reason}"
        ) from None


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """The configuration of a PEFT folder. UserError where it cannot be read."""
    where = Path(folder) / ADAPTER_CONFIG
    try:
        settings = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: not readable, a PEFT adapter folder is expected ({error.__class__.__name__})"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(f"{where}: a JSON object is expected")
    return settings


def check_adapter_base(named: str, here: str, where: Path) -> None:
    """Compare the base that an adapter names with the base in use, by name or by content.

    A base folder that is not on this machine cannot be compared, and passes.

    Raises:
        UserError: the adapter's configuration names another base.
    """
    if named in ("", here) or os.path.realpath(named) == os.path.realpath(here):
        return
    if os.path.isabs(named) and not os.path.isdir(named):
        return
    both_here = os.path.isdir(named) and os.path.isdir(here)
    if both_here and model_fingerprint(named) == model_fingerprint(here):
        return
    raise UserError(f"{where}: an adapter of {named}, the base here is {here}")
