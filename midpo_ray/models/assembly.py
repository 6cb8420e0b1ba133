"""Plain PEFT adapter folders to a routed model, and the routed model to files and back.

``route`` assembles, ``save_router`` writes router.safetensors and router.json, ``load_routed``
reads a run directory. Ranks, module names, shapes, the base and the hashes of the adapters are
checked, and every mismatch is one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import EXPERTS, Data, Model, Router
from ..errors import UserError
from .base import check_adapter_base, load_base, load_tokenizer, model_fingerprint
from .logprobs import prove
from .routed import RoutedCausalLM, template_data
from .router import GateKind, RoutedLinear, fold_gate, make_gate
from .selfcheck import BATCHED, check_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ROUTER_FILES = ("router.json", "router.safetensors")
_ROUTER_KEYS = {"gate", "width", "scope", "decision", "temperature"}  # of config.Router
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# config.Data's keys that decide how a prompt becomes tokens
_TEMPLATE_KEYS = {"template", "null_context", "max_length", "max_prompt_length", "long_prompts"}
# PEFT's names of a LoRA adapter's tensors
_PREFIX, _LORA_A, _LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings of an adapter that would add more than A and B, and their values that do not.
_PLAIN = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "use_qalora": False,
    "target_parameters": None,
    "trainable_token_indices": None,
}


@dataclass(frozen=True)
class Adapter:
    """A plain PEFT LoRA adapter of one kind of Linear."""

    folder: Path
    base: str  # the base model that its configuration names
    target: str
    weights: dict[str, tuple[Tensor, Tensor, float]]  # module path -> A [r, F], B [D, r], alpha/r
    hashes: dict[str, str]  # file name -> sha256

    @property
    def config_file(self) -> Path:
        return self.folder / ADAPTER_FILES[0]

    @property
    def weights_file(self) -> Path:
        return self.folder / ADAPTER_FILES[1]


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter of a PEFT folder.

    Raises:
        UserError: names the file, and the key or tensor, with which it cannot be routed.
    """
    folder = Path(folder)
    where, file = (folder / name for name in ADAPTER_FILES)
    hashes = hash_adapter(folder)
    config = _read_json(where)
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None, [], {}):
            raise UserError(
                f"{where}: {key} is {config[key]!r}, but only plain LoRA adapters can be routed, "
                f"where it is {plain!r}"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or len(targets) != 1:
        raise UserError(
            f"{where}: target_modules is {targets!r}, but only adapters of exactly one module can "
            "be routed, for example ['down_proj']"
        )
    rank, alpha, target = config["r"], config["lora_alpha"], str(targets[0])
    tensors = _read_tensors(file)
    weights: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name in tensors:
        path = name.removeprefix(_PREFIX).removesuffix(_LORA_A).removesuffix(_LORA_B)
        adapts_target = path.rpartition(".")[2] == target.rpartition(".")[2]
        if not name.endswith((_LORA_A, _LORA_B)) or not adapts_target:
            raise UserError(f"{file}: tensor {name} is not the A or B of a {target}")
        lora_A, lora_B = (
            tensors.get(_PREFIX + path + _LORA_A),
            tensors.get(_PREFIX + path + _LORA_B),
        )
        if lora_A is None or lora_B is None or {lora_A.shape[0], lora_B.shape[1]} != {rank}:
            raise UserError(
                f"{file}: {path} does not have an A and a B of rank {rank}, the r of {where.name}"
            )
        weights[path] = (lora_A, lora_B, alpha / rank)
    if not weights:
        raise UserError(f"{file}: it has no tensors, an A and a B per {target} are expected")
    return Adapter(folder, config.get("base_model_name_or_path") or "", target, weights, hashes)


def hash_adapter(folder: Path) -> dict[str, str]:
    """sha256 of an adapter's two files, by name."""
    hashes = {}
    for name in ADAPTER_FILES:
        try:
            hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError:
            raise UserError(
                f"{folder / name} is not readable: a PEFT adapter folder with "
                f"{' and '.join(ADAPTER_FILES)} is expected"
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
    """``model`` with both experts and new gates, which start at 0.5; only the gates train.

    Modules are wrapped in place.

    Args:
        safety_dir, helpfulness_dir: PEFT adapter folders for this base and one target module; their
            ranks may differ.
        tokenizer, data: how prompts become tokens; saved with the router.
        base: where the model comes from; default: the path that it knows.
        seed: of the gates' initial values.

    Raises:
        UserError: names the adapter's file and what would have been right.
    """
    base = base or Model(path=model.name_or_path or "unknown")
    experts = [read_adapter(safety_dir), read_adapter(helpfulness_dir)]
    for expert in experts:
        if expert.base != base.path:
            check_adapter_base(expert.base, model.name_or_path or base.path, expert.config_file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = _wrap(model, experts, router, router.gate, base.path)
    return _routed(model, layers, experts, router, base, tokenizer, data)


def _wrap(
    model: PreTrainedModel, experts: Sequence[Adapter], router: Router, gate: GateKind, name: str
) -> dict[str, RoutedLinear]:
    """Freeze the model, and route the Linears that both experts adapt, the lowest layer first."""
    first, second = experts
    if first.target != second.target or first.weights.keys() != second.weights.keys():
        raise UserError(
            f"{second.config_file}: it adapts {len(second.weights)} {second.target}, but "
            f"{first.folder} adapts {len(first.weights)} {first.target}; both experts must adapt "
            "the same modules"
        )
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for expert in experts:
        for path, (lora_A, lora_B, _) in expert.weights.items():
            linear = modules.get(path)
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"{expert.weights_file}: it adapts {path}, which is not a Linear of {name}: an "
                    "adapter of another base?"
                )
            adapter_shape = (lora_A.shape[1], lora_B.shape[0])
            shape = (linear.in_features, linear.out_features)
            if adapter_shape != shape:
                raise UserError(
                    f"{expert.weights_file}: {path} maps {adapter_shape[0]} to {adapter_shape[1]}, "
                    f"in {name} it maps {shape[0]} to {shape[1]}: an adapter of another base"
                )
    prove(model)  # while its modules are its own
    layers: dict[str, RoutedLinear] = {}
    for path, linear in modules.items():
        if path in first.weights:
            assert isinstance(linear, nn.Linear)
            pair = [expert.weights[path] for expert in experts]
            new = make_gate(gate, linear.in_features, router.width)
            layers[path] = RoutedLinear(linear, pair, new, len(layers))
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return layers


def _routed(
    model: PreTrainedModel,
    layers: dict[str, RoutedLinear],
    experts: Sequence[Adapter],
    router: Router,
    base: Model,
    tokenizer: Any,
    data: Data | None,
) -> RoutedCausalLM:
    hashes = {name: expert.hashes for name, expert in zip(EXPERTS, experts, strict=True)}
    origin: dict[str, Any] = {"base": base, "hashes": hashes, "target": experts[0].target}
    return RoutedCausalLM(model, layers, router=router, tokenizer=tokenizer, data=data, **origin)


def save_router(
    routed: RoutedCausalLM, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write router.safetensors and router.json; linear and bottleneck gates are saved folded.

    Args:
        state: the gates' state, where the model does not hold it: gathered from ZeRO-3's shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    router, folded = routed.router, routed.router.gate != "mlp"
    tensors: dict[str, Tensor] = {}
    for path, layer in routed.layers.items():
        prefix, gate = f"model.{path}.gate.", layer.gate
        if state is not None:
            gate = make_gate(router.gate, layer.base.in_features, router.width)
            gate.load_state_dict({name: state[prefix + name] for name in gate.state_dict()})
        gate = fold_gate(gate) if folded else gate
        for name, parameter in gate.named_parameters():
            tensors[prefix + name] = parameter.detach().float().cpu().contiguous()
    settings = {
        "format": 1,
        "gate": router.gate,
        "width": router.width,
        "scope": router.scope,
        "decision": router.decision,
        "temperature": router.temperature,
        "folded": folded,
        "base": routed.base.model_dump(mode="json"),
        "fingerprint": model_fingerprint(routed.base.path, routed.base.revision),
        "target": routed.target,
        "adapters": routed.hashes,
        "data": routed.data.model_dump(mode="json", include=_TEMPLATE_KEYS),
    }
    save_file(tensors, folder / "router.safetensors")
    (folder / "router.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def load_routed(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RoutedCausalLM:
    """The routed model of a run directory or of its router folder, to serve.

    Args:
        path: a local folder with router/, experts/safety/ and experts/helpfulness/, or its router/.
        device: default: the base's.
        dtype: torch.dtype or its name; default: the run's.

    Raises:
        UserError: a file is missing or torn, or an adapter or the base is not the one that the
            router was trained on.
    """
    folder = Path(path)
    if (folder / "router").is_dir():
        folder = folder / "router"
    settings_file, weights_file = (folder / name for name in _ROUTER_FILES)
    if not settings_file.is_file():
        raise UserError(
            f"{path}: no routed model, a run directory with router/router.json is expected"
        )
    settings = _read_json(settings_file)
    experts = []
    for name in EXPERTS:
        adapter = folder.resolve().parent / "experts" / name
        for file, digest in hash_adapter(adapter).items():
            if digest != settings["adapters"][name][file]:
                raise UserError(
                    f"{adapter / file}: not the file that {settings_file} was trained on (its "
                    "sha256 differs)"
                )
        experts.append(read_adapter(adapter))
    base = Model(**settings["base"])
    if dtype is not None:
        base = base.model_copy(update={"dtype": _dtype_name(dtype)})
    if model_fingerprint(base.path, base.revision) != settings["fingerprint"]:
        raise UserError(
            f"{base.path}: not the base model that {settings_file} was trained on (its content "
            "differs)"
        )
    router = Router.model_validate({key: settings[key] for key in _ROUTER_KEYS & settings.keys()})
    gate = "linear" if settings["folded"] else router.gate
    model = load_base(base, device, serve=True)
    layers = _wrap(model, experts, router, gate, base.path)
    data = template_data(settings["data"])
    routed = _routed(model, layers, experts, router, base, load_tokenizer(base), data)
    routed.load_gate_state(_read_tensors(weights_file), str(weights_file))
    routed.fold().eval()
    setattr(model, BATCHED, check_generation(routed, str(path), routed=True))
    return routed


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not known, allowed are {', '.join(_DTYPES)}")
    return name


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: not a readable JSON file ({kind}: {error})") from None
