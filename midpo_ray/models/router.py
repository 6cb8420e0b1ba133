"""The routed layer: two frozen LoRA experts on one Linear, mixed by learned gates.

    out = W h + B_s (g_s A_s h) + B_h (g_h A_h h)        with alpha/r folded into B_s and B_h

This is MidPO's router (arXiv 2506.02460). R rows, T tokens of a row, F d_ff, D hidden. Gates come
in pairs: [..., 2] is (safety, helpfulness).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from .routing import Scope, current_state

GateKind = Literal["linear", "bottleneck", "mlp"]
_WIDTH = {"linear": 0, "bottleneck": 512, "mlp": 16}


class LinearGate(nn.Linear):
    """Linear(F -> 2), the logits of both gates; a bottleneck gate folds into it."""

    def __init__(self, d_ff: int) -> None:
        super().__init__(d_ff, 2)
        nn.init.zeros_(self.weight)  # both gates start at 0.5
        nn.init.zeros_(self.bias)


class PairGate(nn.Module):
    """One chain of maps per expert, [..., F] -> [..., 2]; the last maps start at zero."""

    def __init__(self, kind: GateKind, d_ff: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.experts = nn.ModuleList()
        for _ in range(2):
            layers: list[nn.Module] = [nn.Linear(d_ff, width), nn.SiLU(), nn.Linear(width, 1)]
            if kind == "bottleneck":
                layers[1:] = [nn.Linear(width, d_ff), nn.Linear(d_ff, 1)]
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)
            self.experts.append(nn.Sequential(*layers))

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([expert(h) for expert in self.experts], dim=-1)


def make_gate(kind: GateKind, d_ff: int, width: int | None = None) -> nn.Module:
    """A gate on torch's default device; ``width`` is the bottleneck's (512) or the mlp's (16)."""
    return LinearGate(d_ff) if kind == "linear" else PairGate(kind, d_ff, width or _WIDTH[kind])


def is_linear(gate: nn.Module) -> bool:
    """Whether a gate is a linear map of h, which can be folded."""
    return not (isinstance(gate, PairGate) and gate.kind == "mlp")


@torch.inference_mode(False)
def fold_gate(gate: nn.Module) -> LinearGate:
    """The one linear map that a gate is, float32 on the CPU; it is multiplied out in float64.

    Raises:
        ValueError: an mlp gate, which is not linear.
    """
    if not is_linear(gate):
        raise ValueError("an mlp gate is not linear and cannot be folded")
    exact = copy.deepcopy(gate).cpu().double().requires_grad_(False)
    zero = torch.zeros(next(exact.parameters()).shape[-1], dtype=torch.float64)
    folded = LinearGate(len(zero)).requires_grad_(False)
    folded.weight.copy_(jacobian(exact, zero))
    folded.bias.copy_(exact(zero))
    return folded


class RoutedLinear(nn.Module):
    """Wraps the Linear that the experts adapt: [R, T, F] -> [R, T, D]; only the gate trains.

    Both experts' A are stacked to [2r, F] and their B, times alpha/r, to [D, 2r]; the expert of
    lower rank is padded with zeros.

    Args:
        base: the Linear.
        experts: (A [r, F], B [D, r], alpha/r) of the safety and of the helpfulness expert.
        gate: [..., F] -> [..., 2] logits.
        layer: number of this layer among the routed ones.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_A_and_gate: Tensor | None  # [2r + 2, F], of a folded gate with scope token

    def __init__(
        self,
        base: nn.Linear,
        experts: list[tuple[Tensor, Tensor, float]],
        gate: nn.Module,
        layer: int,
    ) -> None:
        super().__init__()
        self.base, self.gate, self.layer = base, gate, layer
        rank = max(len(a) for a, _, _ in experts)
        lora_A = [F.pad(a.float(), (0, 0, 0, rank - len(a))) for a, _, _ in experts]
        lora_B = [F.pad(b.float() * scale, (0, rank - len(a))) for a, b, scale in experts]
        self.register_buffer("lora_A", torch.cat(lora_A).to(base.weight), persistent=False)
        self.register_buffer("lora_B", torch.cat(lora_B, 1).to(base.weight), persistent=False)
        self.register_buffer("lora_A_and_gate", None, persistent=False)
        self.gate.to(base.weight.device, base.weight.dtype)

    def forward(self, h: Tensor) -> Tensor:
        low_rank, gate = self._project(h)
        gates = current_state().gates(self.layer, gate, h).to(low_rank.dtype)
        gated = low_rank.unflatten(-1, (2, -1)) * gates.unsqueeze(-1)
        return self.base(h) + F.linear(gated.flatten(-2), self.lora_B)

    def _project(self, h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A h [R, T, 2r], and the gate; one product gives both where the gate is stacked on A."""
        if self.lora_A_and_gate is None:
            return F.linear(h, self.lora_A), self.gate
        both = F.linear(h, self.lora_A_and_gate)
        low_rank, logits = both[..., :-2], both[..., -2:] + self.gate.get_parameter("bias")
        return low_rank, lambda _: logits

    def fold(self, scope: Scope) -> None:
        """Serve by the folded gate, in place; an ``mlp`` gate stays. The gate trains no more."""
        self.gate.requires_grad_(False)
        if not is_linear(self.gate):
            return
        self.gate = fold_gate(self.gate).to(self.lora_A.device, self.lora_A.dtype)
        if scope == "token":  # else one gate per prompt, for which the extra rows cost more
            self.lora_A_and_gate = torch.cat([self.lora_A, self.gate.weight])
