"""The router's layer: two frozen LoRA experts on one Linear, mixed by a learned gate for each (MidPO, arXiv 2506.02460).

    out = W h + B_s (g_s A_s h) + B_h (g_h A_h h)        alpha/r is folded into B_s, B_h

R rows, T tokens of a row, F d_ff, D hidden, L layers, G decisions. Gates are pairs: [..., 2] is (safety, helpfulness).

Scope ``token`` (paper) gates every position by itself. Scope ``last`` (ours) reads the gate, in each layer, at the prompt's last
token and applies it to the whole document; while decoding it is kept, on the cache object, so that it travels with the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GateKind = Literal["linear", "bottleneck", "mlp"]
Scope = Literal["last", "token"]
WIDTH = {"linear": 0, "bottleneck": 512, "mlp": 16}


class Anchors(NamedTuple):
    """Where decisions are read and which tokens they hold for."""

    places: Tensor  # [G] flat positions r*T+t
    of: Tensor | None  # [R, T] the decision of each token; None: row r's tokens follow decision r
    real: Tensor  # [R, T] bool, False at padding
    weight: Tensor  # [G] real tokens that follow each decision


def row_anchors(
    shape: tuple[int, int],
    mask: Tensor | None,
    device: torch.device,
    *,
    lengths: Tensor | None = None,
    width: int | None = None,
) -> Anchors:
    """One decision a row: at its last real token, or at its ``lengths``-th real token, or at the last before column ``width``.

    Args:
        shape: (R, T).
        mask: [R, T], nonzero at real tokens (padding on either side); None where all are real.
        lengths: [R], real tokens of each row's prompt.
    """
    rows, tokens = shape
    real = (
        torch.ones(shape, dtype=torch.bool, device=device)
        if mask is None
        else mask.to(device=device).bool()
    )
    if lengths is None:
        position = torch.arange(tokens, device=device)
        column = (real[:, :width] * position[:width]).amax(-1)
    else:
        reached = (real.cumsum(-1) == torch.as_tensor(lengths, device=device).view(rows, 1)) & real
        if not bool(reached.any(-1).all()):
            raise ValueError(
                "prompt_lengths: a row has fewer real tokens than its prompt, or its prompt has none"
            )
        column = reached.long().argmax(-1)
    return Anchors(torch.arange(rows, device=device) * tokens + column, None, real, real.sum(-1))


def gate_of(logits: Tensor) -> Tensor:
    """Gates in (0, 1), in float32 or better."""
    return torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())


@dataclass(eq=False)
class Pass:
    """The state of one forward pass, shared by its layers; kept for the recomputation of gradient checkpointing."""

    scope: Scope
    anchors: Anchors | None  # None where gates are held, or nothing needs them (scope token)
    held: dict[int, Tensor] | None  # layer -> [R, 2], the gates decided at prefill
    forced: tuple[float, float] | None
    record: bool
    gates: dict[int, Tensor] = field(
        default_factory=dict
    )  # layer -> [G, 2] (last) or [R, T, 2] (token)

    def decide(self, layer: int, gate: nn.Module, h: Tensor, keep: bool) -> Tensor:
        """The gates of ``h`` [R, T, F], float32, broadcastable to [R, T, 2]."""
        if self.scope == "token":
            if self.forced is None:
                return self._kept(layer, gate_of(gate(h)), keep)
            return self._kept(layer, self._constant(h, *h.shape[:2]), keep)
        if self.held is not None and self.forced is None:
            return self.held[layer].unsqueeze(1)
        if self.forced is not None:
            decisions = self._constant(
                h, len(h) if self.anchors is None else len(self.anchors.places)
            )
        else:
            assert self.anchors is not None
            decisions = gate_of(gate(h.flatten(0, 1)[self.anchors.places]))
        decisions = self._kept(layer, decisions, keep)
        if self.anchors is None or self.anchors.of is None:
            return decisions.unsqueeze(1)
        return decisions[self.anchors.of]

    def _constant(self, h: Tensor, *shape: int) -> Tensor:
        return torch.tensor(self.forced, device=h.device).expand(*shape, 2)

    def _kept(self, layer: int, gates: Tensor, keep: bool) -> Tensor:
        if keep and (self.record or self.scope == "last"):
            self.gates[layer] = gates
        return gates


class Routing:
    """What a model's routed layers share: the scope, forced gates, and the forward pass under way. Not a module.

    ``begin`` and ``end`` are hooks of the decoder: every forward pass goes through them, training's, generation's, a user's.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope: Scope = scope
        self.forced: tuple[float, float] | None = None
        self.anchors: Anchors | None = None  # given by the caller for the next passes
        self.record = False
        self.current: Pass | None = None
        self.last: Pass | None = None  # the newest recorded pass, until it is read
        self.recomputing = False
        self.prompt_width: int | None = None  # while generate runs: columns of its prompt
        self.decided = False  # while generate runs: its decision is made

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else kwargs["inputs_embeds"]
        rows, length = tokens.shape[:2]
        anchors, held = self.anchors, None
        if anchors is not None:
            if anchors.real.shape != (rows, length):
                raise RuntimeError(
                    f"the input is {rows} x {length} tokens, the anchors given are for {tuple(anchors.real.shape)}"
                )
        elif self.record or self.scope == "last":
            anchors, held = self._place(
                rows,
                length,
                tokens.device,
                kwargs.get("attention_mask"),
                kwargs.get("past_key_values"),
            )
        self.current = Pass(self.scope, anchors, held, self.forced, self.record)

    def _place(
        self, rows: int, length: int, device: torch.device, mask: Tensor | None, cache: Any
    ) -> tuple[Anchors | None, dict[int, Tensor] | None]:
        """(anchors, None) where this pass makes its decisions, (None, gates) where it keeps the prefill's."""
        generating = self.prompt_width is not None
        past = 0 if cache is None else int(cache.get_seq_length())
        held = vars(cache).get("routing_gates") if past else None
        if held and self.scope == "last" and (length == 1 or (generating and self.decided)):
            if len(held[0]) != rows:
                raise RuntimeError(
                    f"the cache holds the gates of {len(held[0])} rows, the input has {rows}: prefill these rows"
                )
            return None, held
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -length:]  # the new tokens' part
        elif mask is None or generating or self.scope == "token":
            mask = None  # generate's own 4D mask: its padding is on the left, so the last column is the prompt's last token
        else:
            raise RuntimeError(
                "scope last and a mask that is not [rows, tokens]: give the anchors by RoutedCausalLM.anchored"
            )
        self.decided = True
        return row_anchors(
            (rows, length), mask, device, width=None if past else self.prompt_width
        ), None

    def end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        done, self.current = self.current, None
        if output is None or done is None:  # the pass failed
            return
        if self.record:
            self.last = done
        cache = kwargs.get("past_key_values")
        if cache is None and isinstance(output, dict):
            cache = output.get("past_key_values")
        if cache is not None and self.scope == "last" and done.held is None:
            cache.routing_gates = {layer: gates.detach() for layer, gates in done.gates.items()}

    def checkpoint_contexts(self) -> tuple[_Recompute, _Recompute]:
        """torch.utils.checkpoint's ``context_fn``: the recomputation sees the forward pass's state, and records nothing."""
        return _Recompute(self, self.current, False), _Recompute(self, self.current, True)


class _Recompute:
    """A context that can be entered again: a backward pass may run twice."""

    def __init__(self, routing: Routing, state: Pass | None, recomputing: bool) -> None:
        self.routing, self.state, self.recomputing = routing, state, recomputing

    def __enter__(self) -> None:
        self.before = self.routing.current, self.routing.recomputing
        self.routing.current, self.routing.recomputing = self.state, self.recomputing

    def __exit__(self, *error: object) -> None:
        self.routing.current, self.routing.recomputing = self.before


class LinearGate(nn.Linear):
    """Linear(F -> 2): the logits of both gates. What ``linear`` trains and what ``bottleneck`` folds into."""

    def __init__(self, d_ff: int) -> None:
        super().__init__(d_ff, 2)
        nn.init.zeros_(self.weight)  # both gates start at 0.5
        nn.init.zeros_(self.bias)


class PairGate(nn.Module):
    """A chain of maps for each expert, [..., F] -> [..., 2]; the last map starts at zero, so that both gates start at 0.5."""

    def __init__(self, kind: GateKind, d_ff: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.experts = nn.ModuleList()
        for _ in range(2):
            if kind == "bottleneck":
                layers: list[nn.Module] = [
                    nn.Linear(d_ff, width),
                    nn.Linear(width, d_ff),
                    nn.Linear(d_ff, 1),
                ]
            else:
                layers = [nn.Linear(d_ff, width), nn.SiLU(), nn.Linear(width, 1)]
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)
            self.experts.append(nn.Sequential(*layers))

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([expert(h) for expert in self.experts], dim=-1)


def make_gate(kind: GateKind, d_ff: int, width: int | None = None) -> nn.Module:
    """A gate of the kind, on torch's default device; ``width`` of the bottleneck (512) or the mlp (16)."""
    return LinearGate(d_ff) if kind == "linear" else PairGate(kind, d_ff, width or WIDTH[kind])


def fold_gate(gate: nn.Module) -> LinearGate:
    """The one linear map that a linear or bottleneck gate is: multiplied out in float64, returned in float32 on the CPU."""
    if isinstance(gate, LinearGate):
        weight, bias = gate.weight.detach().cpu(), gate.bias.detach().cpu()
    else:
        assert isinstance(gate, PairGate)
        rows = []
        for expert in gate.experts:
            row = torch.ones(1, 1, dtype=torch.float64)
            offset = torch.zeros(1, dtype=torch.float64)
            for layer in reversed(list(expert.children())):  # from the gate back to h
                assert isinstance(layer, nn.Linear), "an mlp gate is not linear and does not fold"
                offset = offset + row @ layer.bias.detach().cpu().double()
                row = row @ layer.weight.detach().cpu().double()
            rows.append((row, offset))
        weight, bias = (
            torch.cat([row for row, _ in rows]),
            torch.cat([offset for _, offset in rows]),
        )
    folded = LinearGate(weight.shape[1])
    with torch.no_grad():
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded.requires_grad_(False)


class RoutedLinear(nn.Module):
    """Wraps the one Linear that the experts adapt: [R, T, F] -> [R, T, D]. Base and experts are frozen, the gate trains.

    Both experts' low-rank maps are one pair of GEMMs: A [2r, F] stacked, gated, then B [D, 2r] stacked, with alpha/r in B. The
    expert of lower rank is filled up with zeros.

    Args:
        base: the Linear.
        experts: (A [r, F], B [D, r], alpha/r) of the safety and of the helpfulness expert.
        gate: [..., F] -> [..., 2] logits.
        layer: number of this layer among the routed ones.
    """

    low: Tensor
    high: Tensor
    fused: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        experts: list[tuple[Tensor, Tensor, float]],
        gate: nn.Module,
        routing: Routing,
        layer: int,
    ) -> None:
        super().__init__()
        self.base, self.gate, self.routing, self.layer = base, gate, routing, layer
        rank = max(len(a) for a, _, _ in experts)
        low = torch.cat([F.pad(a.float(), (0, 0, 0, rank - len(a))) for a, _, _ in experts])
        high = torch.cat(
            [F.pad(b.float() * scale, (0, rank - len(a))) for a, b, scale in experts], dim=1
        )
        self.register_buffer("low", low.to(base.weight), persistent=False)
        self.register_buffer("high", high.to(base.weight), persistent=False)
        self.register_buffer(
            "fused", None, persistent=False
        )  # [2r + 2, F]: A with the folded gate's rows, scope token
        self.gate.to(base.weight.device, base.weight.dtype)

    def forward(self, h: Tensor) -> Tensor:
        out = self.base(h)
        routing = self.routing
        state, keep = routing.current, not routing.recomputing
        if state is None:
            raise RuntimeError(
                "a routed layer ran outside a forward pass of its model: "
                "turn gradient checkpointing on by RoutedCausalLM.gradient_checkpointing_enable"
            )
        if self.fused is not None and state.forced is None and not state.record:
            low = F.linear(h, self.fused)
            assert isinstance(self.gate, LinearGate)
            gates = gate_of(low[..., -2:] + self.gate.bias)
            low = low[..., :-2]
        else:
            low = F.linear(h, self.low)
            gates = state.decide(self.layer, self.gate, h, keep)
        gated = low.unflatten(-1, (2, -1)) * gates.to(low.dtype).unsqueeze(-1)
        return out + F.linear(gated.flatten(-2), self.high)

    def fold(self) -> None:
        """Serve by the folded gate, in place; an ``mlp`` gate stays as it is. The gate no longer trains."""
        self.gate.requires_grad_(False)
        if isinstance(self.gate, PairGate) and self.gate.kind == "mlp":
            return
        self.gate = fold_gate(self.gate).to(self.low.device, self.low.dtype)
        if (
            self.routing.scope == "token"
        ):  # scope last decides once a prompt: there the rows would cost more than they save
            self.fused = torch.cat([self.low, self.gate.weight])
