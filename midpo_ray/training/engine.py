"""Engines: forward, backward over several micro-batches, optimizer step, trained state in and out.

There are two, plain torch and DeepSpeed (ZeRO 0 to 3), which is imported here alone. Both
* average gradients over the ranks, and leave it to the loop to divide the loss by the pairs;
* step AdamW on float32 masters of the trainable parameters, whatever the model's dtype;
* give and take the trained state as full float32 tensors under the parameters' names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import config
from .checkpoint import KINDS

T = TypeVar("T")


class ProcessGroup:
    """The ranks that train together; one process is a group of one.

    Control messages take gloo, so that no GPU waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self._control = None
        if self.world > 1 and dist.get_backend() != "gloo":
            self._control = dist.new_group(backend="gloo")

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on ``device``, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each number over the ranks, on all of them."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def broadcast_object(self, value: T) -> T:
        """Rank 0's object, on all ranks."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's object, by rank, on all ranks."""
        box: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(box, value, group=self._control)
        return box


class Engine(Protocol):
    group: ProcessGroup
    module: nn.Module  # as it was given; its parameters' names are the trained state's

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""

    def train(self, mode: bool = True) -> None: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; ``last``: the last of a step. All ranks call alike."""

    def step(self) -> Tensor | float:
        """One optimizer step; the gradient's l2 norm before clipping (may be infinite)."""

    def set_lr(self, lr: float) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """``<kind>/<name>`` for the ``KINDS``: full float32 tensors on the CPU, on all ranks."""

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters alone, as in ``state`` without the prefix."""

    def load(self, state: dict[str, Tensor], step: int, prime: Callable[[], Tensor]) -> None:
        """Restore ``state`` (the same on all ranks) after ``step`` steps.

        Args:
            prime: the loss of some micro-batch. DeepSpeed makes its moments only in a step, so that
                one is taken at learning rate 0 before the moments are overwritten.
        """


def trained_state(engine: Engine, of: nn.Module, *, keep_dtype: bool = False) -> dict[str, Tensor]:
    """The trained parameters under their names in ``of``, a module inside the engine's.

    All ranks call it. Full tensors on the CPU, float32, or the model's dtype with ``keep_dtype``.
    """
    names = {id(parameter): name for name, parameter in of.named_parameters()}
    values, state = engine.parameters(), {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and id(parameter) in names:
            dtype = parameter.dtype if keep_dtype else torch.float32
            state[names[id(parameter)]] = values[name].to(dtype)
    return state


def plain(
    module: nn.Module, optim: config.Optim, device: torch.device | str = "cpu"
) -> PlainEngine:
    """An engine of torch alone, data parallel where torch.distributed is initialised."""
    return PlainEngine(module.to(device), optim, torch.device(device))


class PlainEngine:
    def __init__(self, module: nn.Module, optim: config.Optim, device: torch.device) -> None:
        self.module, self.group, self._clip = module, ProcessGroup(device), optim.clip
        self._named = trainable(module)
        for parameter in self._named.values():
            if self.group.world > 1:
                dist.broadcast(parameter.data, src=0)
        self._masters = {
            n: p if p.dtype == torch.float32 else p.detach().float() for n, p in self._named.items()
        }
        self._adamw = adamw(list(self._masters.values()), optim)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        for master, parameter in self._pairs():
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def step(self) -> Tensor:
        gradients = [
            torch.zeros_like(m) if m.grad is None else m.grad for m in self._masters.values()
        ]
        if self.group.world > 1:
            flat = (
                self.group.all_reduce(torch.cat([g.flatten() for g in gradients]))
                / self.group.world
            )
            for gradient, part in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        for (master, _), gradient in zip(self._pairs(), gradients, strict=True):
            master.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._clip or float("inf"))
        self._adamw.step()
        for master, parameter in self._pairs():
            master.grad = None
            if master is not parameter:
                parameter.data.copy_(master)
        return norm

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        return zip(self._masters.values(), self._named.values(), strict=True)

    def set_lr(self, lr: float) -> None:
        set_lr(self._adamw, lr)

    def parameters(self) -> dict[str, Tensor]:
        return {name: master.detach().cpu().clone() for name, master in self._masters.items()}

    def state(self) -> dict[str, Tensor]:
        state = {f"parameter/{name}": value for name, value in self.parameters().items()}
        for kind in KINDS[1:]:
            for name, master in self._masters.items():
                moment = self._adamw.state[master].get(kind, torch.zeros_like(master))
                state[f"{kind}/{name}"] = moment.detach().cpu().clone()
        return state

    def load(self, state: dict[str, Tensor], step: int, prime: Callable[[], Tensor]) -> None:
        for name, master in self._masters.items():
            values = {kind: state[f"{kind}/{name}"].to(master.device, copy=True) for kind in KINDS}
            master.data.copy_(values.pop("parameter"))
            self._named[name].data.copy_(master)
            self._adamw.state[master] = {**values, "step": torch.tensor(float(step))}


def deepspeed(
    module: nn.Module, optim: config.Optim, settings: dict[str, Any], device: torch.device | str
) -> Engine:
    """A DeepSpeed engine, after ``prepare``; ``settings`` come from ``deepspeed_settings``.

    bfloat16 without ZeRO is the plain engine's: DeepSpeed has no float32 gradients there.
    """
    if settings["zero_optimization"]["stage"] == 0 and settings["bf16"]["enabled"]:
        return plain(module, optim, device)
    return DeepSpeedEngine(module, optim, settings, torch.device(device))


class DeepSpeedEngine:
    def __init__(
        self, module: nn.Module, optim: config.Optim, settings: dict[str, Any], device: torch.device
    ) -> None:
        import deepspeed as ds

        self.module, self.group = module, ProcessGroup(device)
        self._stage = settings["zero_optimization"]["stage"]
        self._named = trainable(module)
        self._gathered = lambda: ds.zero.GatheredParameters(
            list(self._named.values()), 0, enabled=self._stage == 3
        )
        self._engine, *_ = ds.initialize(
            model=module,
            config=settings,
            dist_init_required=False,
            optimizer=adamw(list(self._named.values()), optim),
        )
        self._unwrapped = self._stage == 0  # DeepSpeed leaves the optimizer as it is

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> Tensor | float:
        norm = None
        if self._unwrapped:  # DeepSpeed clips here and hides the norm
            gradients = [p.grad for p in self._named.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        if not self._engine.was_step_applied():
            return float("nan")
        return norm if norm is not None else self._engine.get_global_grad_norm()

    def set_lr(self, lr: float) -> None:
        set_lr(self._engine.basic_optimizer, lr)

    def parameters(self) -> dict[str, Tensor]:
        return {name: self._get(parameter, "parameter") for name, parameter in self._named.items()}

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{name}": self._get(p, kind)
            for kind in KINDS
            for name, p in self._named.items()
        }

    def load(self, state: dict[str, Tensor], step: int, prime: Callable[[], Tensor]) -> None:
        self.set_lr(0.0)
        self.backward(prime() * 0.0, last=True)
        self._engine.step()
        with self._gathered():
            for name, parameter in self._named.items():
                parameter.data.copy_(state[f"parameter/{name}"])
        for kind in KINDS:
            for name, parameter in self._named.items():
                self._set(parameter, kind, state[f"{kind}/{name}"])
        for moments in self._engine.basic_optimizer.state.values():
            moments["step"] = (
                torch.full_like(moments["step"], step) if torch.is_tensor(moments["step"]) else step
            )

    def _get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed import utils

        if self._unwrapped:
            value = (
                parameter
                if kind == "parameter"
                else self._engine.basic_optimizer.state[parameter][kind]
            )
        elif kind == "parameter":
            value = utils.safe_get_full_fp32_param(parameter)
        else:
            value = utils.safe_get_full_optimizer_state(parameter, kind)
        return value.detach().float().cpu().clone()

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        value = value.to(self.group.device)
        if self._unwrapped:
            if kind != "parameter":
                self._engine.basic_optimizer.state[parameter][kind].copy_(value)
        elif self._stage == 3:  # DeepSpeed's "full" setters fail where shares need padding (0.19.8)
            size = utils.safe_get_local_fp32_param(parameter).numel()
            flat = nn.functional.pad(value.flatten(), (0, size * self.group.world - value.numel()))
            share = flat.narrow(0, size * self.group.rank, size)
            if kind == "parameter":
                utils.safe_set_local_fp32_param(parameter, share)
            else:
                utils.safe_set_local_optimizer_state(parameter, share, kind)
        elif kind == "parameter":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


def prepare(settings: dict[str, Any], on_gpu: bool) -> Any:
    """Start DeepSpeed over the process group, in every process, before the model is loaded.

    Returns:
        What must be kept until the model is loaded: with ZeRO-3 it makes ``from_pretrained`` load
        each rank's share only.
    """
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as ds
    import deepspeed.ops

    if not on_gpu:  # or a shared-memory all-reduce is compiled, for half a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ds.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    if settings["zero_optimization"]["stage"] != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def deepspeed_settings(
    section: config.DeepSpeed, optim: config.Optim, dtype: str, world: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration; ``section.extra`` is merged last. Batches are the loop's."""
    zero: dict[str, Any] = {"stage": section.stage}
    if section.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": section.offload_optimizer}
    if section.offload_param != "none":
        zero["offload_param"] = {"device": section.offload_param}
    settings: dict[str, Any] = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip or 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    return _merged(settings, section.extra)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    named = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    if not named:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    return named


def adamw(parameters: list[Any], optim: config.Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged
