"""From plain PEFT adapter folders to a routed model, and to its files and back.

``route`` assembles, ``save_router`` writes router.safetensors and router.json, ``load_routed`` reads a run directory. Nothing is
trusted: ranks, module names, shapes, the base and the adapters' hashes are compared, and a mismatch is one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import EXPERTS, Data, Model, Router
from ..errors import UserError
from .routed import RoutedCausalLM, template_data
from .router import RoutedLinear, fold_gate, make_gate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TEMPLATE_KEYS = (
    "template",
    "null_context",
    "max_length",
    "max_prompt_length",
    "long_prompts",
)  # of config.Data
PREFIX, LOW, HIGH = (
    "base_model.model.",
    ".lora_A.weight",
    ".lora_B.weight",
)  # PEFT's names of a LoRA adapter's tensors
# what an adapter may hold beyond A and B of one Linear, and the value that says it does not
PLAIN = {
    "peft_type": "LORA", "use_rslora": False, "use_dora": False, "bias": "none", "lora_bias": False, "fan_in_fan_out": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "use_qalora": False,
    "target_parameters": None, "trainable_token_indices": None,
}  # fmt: skip

# --- adapters ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A plain PEFT LoRA adapter of one kind of Linear."""

    folder: Path
    base: str  # the base model that it names
    target: str
    weights: dict[str, tuple[Tensor, Tensor, float]]  # module path -> A [r, F], B [D, r], alpha/r
    hashes: dict[str, str]  # file name -> sha256


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter of a PEFT folder. UserError names the file, and the key or tensor, that the router cannot honour."""
    folder = Path(folder)
    where, file = (folder / name for name in ADAPTER_FILES)
    hashes = hash_adapter(folder)
    config = _json(where)
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None, [], {}):
            raise UserError(
                f"{where}: {key} is {config[key]!r}, the router takes plain LoRA adapters, where it is {plain!r}"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or len(targets) != 1:
        raise UserError(
            f"{where}: target_modules is {targets!r}, the router takes exactly one module, for example ['down_proj']"
        )
    rank, alpha, target = config["r"], config["lora_alpha"], str(targets[0])
    tensors = _tensors(file)
    weights = {}
    for name in tensors:
        path = name.removeprefix(PREFIX).removesuffix(LOW).removesuffix(HIGH)
        if not name.endswith((LOW, HIGH)) or path.rpartition(".")[2] != target.rpartition(".")[2]:
            raise UserError(f"{file}: tensor {name} is not the A or B of a {target}")
        low, high = (tensors.get(PREFIX + path + end) for end in (LOW, HIGH))
        if low is None or high is None or low.shape[0] != rank or high.shape[1] != rank:
            raise UserError(
                f"{file}: {path} does not hold an A and a B of rank {rank}, which {where.name} says (r)"
            )
        weights[path] = (low, high, alpha / rank)
    if not weights:
        raise UserError(f"{file}: holds no tensor, an A and a B for each {target} are expected")
    return Adapter(folder, config.get("base_model_name_or_path") or "", target, weights, hashes)


def hash_adapter(folder: Path) -> dict[str, str]:
    """sha256 of an adapter's two files, by name."""
    hashes = {}
    for name in ADAPTER_FILES:
        try:
            hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            raise UserError(
                f"{folder / name} is not readable: a PEFT adapter folder holds {' and '.join(ADAPTER_FILES)}"
            ) from None
    return hashes


def route(
    model: PreTrainedModel,
    safety_dir: str | Path,
    helpfulness_dir: str | Path,
    router: Router,
    *,
    tokenizer: Any = None,
    data: Data | None = None,
    base: Model | None = None,
    seed: int = 0,
) -> RoutedCausalLM:
    """``model`` with both experts and new gates, which start at 0.5; everything but the gates is frozen. Wraps modules in place.

    Args:
        safety_dir, helpfulness_dir: PEFT adapter folders for this base and one target module; their ranks may differ.
        tokenizer, data: how prompts become tokens, for ``routing``; kept with the saved router.
        base: where the model came from; default: the path that it knows itself.
        seed: of the gates' initial values.

    Raises:
        UserError: names the adapter's file and what would have been right.
    """
    from .base import check_adapter_base

    base = base or Model(path=model.name_or_path or "unknown")
    experts = [read_adapter(safety_dir), read_adapter(helpfulness_dir)]
    for expert in experts:
        if expert.base != base.path:
            check_adapter_base(
                expert.base, model.name_or_path or base.path, expert.folder / ADAPTER_FILES[0]
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _assemble(
            model,
            experts,
            router,
            lambda d_ff: make_gate(router.gate, d_ff, router.width),
            base,
            tokenizer,
            data,
        )


def _assemble(
    model: PreTrainedModel,
    experts: list[Adapter],
    router: Router,
    gate: Callable[[int], nn.Module],
    base: Model,
    tokenizer: Any,
    data: Data | None,
) -> RoutedCausalLM:
    first, second = experts
    if first.target != second.target or first.weights.keys() != second.weights.keys():
        raise UserError(
            f"{second.folder / ADAPTER_FILES[0]}: adapts {len(second.weights)} {second.target}, {first.folder} adapts "
            f"{len(first.weights)} {first.target}; both experts must adapt the same modules"
        )
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    layers: dict[str, RoutedLinear] = {}
    for path in first.weights:
        for expert in experts:
            low, high, _ = expert.weights[path]
            linear = modules.get(path)
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"{expert.folder / ADAPTER_FILES[1]}: adapts {path}, which is no Linear of {base.path}: another base?"
                )
            if (low.shape[1], high.shape[0]) != (linear.in_features, linear.out_features):
                raise UserError(
                    f"{expert.folder / ADAPTER_FILES[1]}: {path} maps {low.shape[1]} to {high.shape[0]}, in {base.path} it maps "
                    f"{linear.in_features} to {linear.out_features}: an adapter of another base"
                )
    for number, path in enumerate(sorted(first.weights, key=list(modules).index)):
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        pair = [expert.weights[path] for expert in experts]
        layers[path] = RoutedLinear(linear, pair, gate(linear.in_features), number)
        model.set_submodule(path, layers[path])
    hashes = {name: expert.hashes for name, expert in zip(EXPERTS, experts, strict=True)}
    return RoutedCausalLM(
        model,
        layers,
        router=router,
        base=base,
        hashes=hashes,
        target=first.target,
        tokenizer=tokenizer,
        data=data,
    )


# --- files ------------------------------------------------------------------------------------------------------------------


def save_router(
    routed: RoutedCausalLM, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write router.safetensors (linear and bottleneck gates folded) and router.json. The model stays as it is.

    ``state`` is the gates' state where it is not in the model: gathered from the shards of ZeRO-3.
    """
    from safetensors.torch import save_file

    from .base import model_fingerprint

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folded = routed.router.gate != "mlp"
    kept: dict[str, Tensor] = {}
    for path, layer in routed.layers.items():
        prefix, gate = f"model.{path}.gate.", layer.gate
        if state is not None:
            gate = make_gate(routed.router.gate, layer.base.in_features, routed.router.width)
            gate.load_state_dict({name: state[prefix + name] for name in gate.state_dict()})
        gate = fold_gate(gate) if folded else gate
        kept |= {
            prefix + name: p.detach().float().cpu().contiguous()
            for name, p in gate.named_parameters()
        }
    settings = {
        "format": 1,
        "gate": routed.router.gate,
        "width": routed.router.width,
        "scope": routed.router.scope,
        "folded": folded,
        "base": routed.base.model_dump(mode="json"),
        "fingerprint": model_fingerprint(routed.base.path, routed.base.revision),
        "target": routed.target,
        "adapters": routed.hashes,
        "data": routed.data.model_dump(mode="json", include=set(TEMPLATE_KEYS)),
    }
    save_file(kept, folder / "router.safetensors")
    (folder / "router.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def load_routed(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RoutedCausalLM:
    """The routed model of a run directory (router/, experts/safety/, experts/helpfulness/) or of its router folder, to serve.

    Args:
        path: a local folder.
        device: default: the base's.
        dtype: torch.dtype or its name; default: the run's.

    Raises:
        UserError: a file is missing or torn, an adapter is not the one that the router was trained on, or the base is another.
    """
    from .base import load_base, load_tokenizer, model_fingerprint

    folder = Path(path)
    if (folder / "router").is_dir():
        folder = folder / "router"
    if not (folder / "router.json").is_file():
        raise UserError(
            f"{path}: no routed model, a run directory with router/router.json is expected"
        )
    settings = _json(folder / "router.json")
    experts = []
    for name in EXPERTS:
        home = folder.resolve().parent / "experts" / name
        for file, digest in hash_adapter(home).items():
            if digest != settings["adapters"][name][file]:
                raise UserError(
                    f"{home / file}: not the file that {folder / 'router.json'} was trained on (its sha256 differs)"
                )
        experts.append(read_adapter(home))
    base = Model(**settings["base"])
    if dtype is not None:
        base = base.model_copy(update={"dtype": _dtype_name(dtype)})
    if model_fingerprint(base.path, base.revision) != settings["fingerprint"]:
        raise UserError(
            f"{base.path}: not the base model that {folder / 'router.json'} was trained on (its content differs)"
        )
    router = Router.model_validate({key: settings[key] for key in ("gate", "width", "scope")})
    kind = "linear" if settings["folded"] else router.gate
    data = template_data(settings["data"])
    model = load_base(base, device, serve=True)
    routed = _assemble(
        model,
        experts,
        router,
        lambda d_ff: make_gate(kind, d_ff, router.width),
        base,
        load_tokenizer(base),
        data,
    )
    routed.load_gate_state(
        _tensors(folder / "router.safetensors"), str(folder / "router.safetensors")
    )
    return routed.fold().eval()


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(
            f"dtype {name!r} is not known, allowed are float32, bfloat16, float16, float64"
        )
    return name


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error.__class__.__name__}: {error})"
        ) from None
