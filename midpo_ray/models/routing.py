"""Which gate a token gets: the state of a routed model's forward passes.

``routing_state`` decides it, once per pass; the state is immutable, and current in the thread or
asyncio task that runs the pass, so that one model serves several threads at once.

Scope ``token`` (MidPO, arXiv 2506.02460) computes a gate at every token. Scope ``last`` (ours)
computes it, in each layer, at the prompt's last token and applies it to the whole document; while
decoding, the gate is kept on the cache object. Scope ``prompt`` (ours) makes one decision per
prompt for all layers, from the base model's features at the prompt's last token: the prompt goes
through the base first.

R rows, T tokens of a row, F d_ff, L layers, G decisions. Gates come in pairs: [..., 2] is (safety,
helpfulness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Scope = Literal["last", "token", "prompt"]
Pool = Callable[[Mapping[int, Tensor]], Tensor]  # layer -> features [G, F], to gates [G, 2]


@dataclass(frozen=True)
class Anchors:
    """Where the decisions of a batch are read, and for which tokens they hold."""

    decision_index: Tensor  # [G] flat positions r*T+t
    decision_of_token: Tensor | None  # [R, T]; None: decision r holds for row r
    token_mask: Tensor  # [R, T] bool, False at padding
    tokens_per_decision: Tensor  # [G] real tokens that follow each decision


def row_anchors(
    shape: tuple[int, int],
    mask: Tensor | None,
    device: torch.device,
    *,
    lengths: Tensor | None = None,
    width: int | None = None,
) -> Anchors:
    """One decision per row, at its last real token.

    Args:
        shape: (R, T).
        mask: [R, T], nonzero at real tokens; None where all tokens are real.
        lengths: [R], real tokens of each row's prompt, at the last of which the decision is read.
        width: the decision is read before this column.

    Raises:
        ValueError: a row has fewer real tokens than ``lengths`` says.
    """
    rows, tokens = shape
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        real = mask.to(device=device).bool()
    if lengths is None:
        column = (real[:, :width] * torch.arange(tokens, device=device)[:width]).amax(-1)
    else:
        wanted = torch.as_tensor(lengths, device=device).view(rows, 1)
        is_last = (real.cumsum(-1) == wanted) & real
        if not bool(is_last.any(-1).all()):
            raise ValueError("prompt_lengths: a prompt is empty or longer than its row")
        column = is_last.long().argmax(-1)
    return Anchors(torch.arange(rows, device=device) * tokens + column, None, real, real.sum(-1))


@dataclass
class RecordedGates:
    """The gates of the newest forward pass within ``RoutedCausalLM.anchored``, with their graph."""

    scope: Scope
    anchors: Anchors
    layers: dict[int, Tensor] = field(default_factory=dict)  # layer -> [R, T, 2] or [G, 2]

    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(safety, helpfulness, mask), the arguments of ``objectives.gate_prior``.

        With scope ``token`` gates are [L, R, T] and the mask is [R, T]. With other scopes gates
        are [L, G], and the mask [G] counts the real tokens that follow each decision, so that a
        mean over decisions is one over real tokens.
        """
        if not self.layers:
            raise RuntimeError("no gates are recorded: run the model within anchored(batch) first")
        gates = torch.stack([self.layers[layer] for layer in sorted(self.layers)])
        anchors = self.anchors
        mask = anchors.token_mask if self.scope == "token" else anchors.tokens_per_decision
        return gates[..., 0], gates[..., 1], mask


@dataclass(frozen=True)
class Generation:
    """One call of ``generate``."""

    number: int  # no other call of this process has it
    prompt_columns: int  # of its input, padding included


@dataclass(frozen=True)
class Request:
    """What the callers of a routed model have asked for, in the current thread or task."""

    forced: tuple[float, float] | None = None
    anchors: Anchors | None = None
    recorded: RecordedGates | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class RoutingState:
    """What decides the gates of one forward pass; its layers share it and do not change it."""

    scope: Scope
    anchors: Anchors | None = None  # None: scope token, or kept gates
    kept: Mapping[int, Tensor] | None = None  # layer -> [R, 2], decided when the cache was filled
    forced: tuple[float, float] | None = None
    decided: Tensor | None = None  # [G, 2], scope prompt: the gates of all layers
    collected: dict[int, Tensor] | None = None  # what the layers decide, for caches and records
    features: dict[int, Tensor] | None = None  # layer -> [G, F], what they read at the anchors

    def gates(self, layer: int, gate: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """The gates of a layer's input h [R, T, F], broadcastable to [R, T, 2]."""
        if self.kept is not None:
            return self.kept[layer].unsqueeze(1)
        if self.anchors is None or self.scope == "token":
            return self._decide(layer, gate, h)
        decided = self._decide(layer, gate, h.flatten(0, 1)[self.anchors.decision_index])
        of_token = self.anchors.decision_of_token
        return decided.unsqueeze(1) if of_token is None else decided[of_token]

    def _decide(self, layer: int, gate: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        if self.features is not None:
            self.features[layer] = h
        if self.decided is not None:
            gates = self.decided
        elif self.forced is None:
            gates = gates_of(gate(h))
        else:
            gates = torch.tensor(self.forced, device=h.device).expand(*h.shape[:-1], 2)
        if self.collected is not None:
            self.collected[layer] = gates
        return gates


def routing_state(
    scope: Scope,
    request: Request,
    shape: tuple[int, int],
    device: torch.device,
    mask: Any = None,
    cache: Any = None,
) -> RoutingState:
    """Decide which gates the tokens of a forward pass get.

    1. Within ``force_gates`` every gate is the constant.
    2. With scope ``token`` every token has its own.
    3. With other scopes and given anchors (training, ``prompt_lengths``) a token has the gate
       that is computed at its document's anchor.
    4. Behind a cache one token, or any number within the call of ``generate``
       that filled the cache, is a decoding step: it has the gates that are kept on the cache.
    5. Else the tokens are a prompt or a new turn, with one gate per row at its last real token.

    Args:
        request: of the caller.
        shape: (R, T) of the new tokens.
        mask: the forward's attention_mask.
        cache: the forward's key-value cache.

    Raises:
        RuntimeError: anchors or a cache of another shape, a mask that does not show prompts, or a
            new turn behind a cache with scope ``prompt``.
    """
    forced, anchors, generation = request.forced, request.anchors, request.generation
    collected: dict[int, Tensor] = {}
    if request.recorded is not None:
        request.recorded.layers = collected
    if anchors is not None:
        if anchors.token_mask.shape != shape:
            given = tuple(anchors.token_mask.shape)
            raise RuntimeError(f"the anchors are for {given} tokens, the input has {shape}")
        return RoutingState(scope, anchors, forced=forced, collected=collected)
    if scope == "token":
        return RoutingState(scope, forced=forced)
    past = 0 if cache is None else int(cache.get_seq_length())
    kept = getattr(cache, "routing_gates", None) if past else None
    filled_by = getattr(cache, "routing_generation", None)
    if kept and (shape[1] == 1 or (generation is not None and filled_by == generation.number)):
        if len(kept[0]) != shape[0]:
            raise RuntimeError(
                f"the cache keeps the gates of {len(kept[0])} rows, the input has {shape[0]} rows: "
                "fill a cache with these rows' prompts"
            )
        if forced is not None:
            kept = dict.fromkeys(kept, torch.tensor(forced, device=device).expand(shape[0], 2))
        return RoutingState(scope, kept=kept)
    if past and scope == "prompt":
        raise RuntimeError(
            "scope prompt reads a whole conversation in the base model: give it without a cache"
        )
    width = None if past or generation is None else generation.prompt_columns
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, -shape[1] :]  # the new tokens' part
    elif generation is not None:
        mask = None  # generate's own mask: prompts are padded on the left
    elif mask is not None:
        raise RuntimeError(
            f"scope {scope} cannot read prompts from a mask that is not [rows, tokens]: give "
            "anchors by RoutedCausalLM.anchored"
        )
    anchors = row_anchors(shape, mask, device, width=width)
    return RoutingState(scope, anchors, forced=forced, collected=collected)


# Threads start without these values, so that each has its own; asyncio tasks start with a copy.
_requests: ContextVar[Mapping[Routing, Request]] = ContextVar(
    "routing_requests", default=MappingProxyType({})
)
_state: ContextVar[RoutingState | None] = ContextVar("routing_state", default=None)


def current_state() -> RoutingState:
    """The state of the pass that runs in this thread.

    Raises:
        RuntimeError: there is none.
    """
    state = _state.get()
    if state is None:
        raise RuntimeError(
            "a routed layer runs outside a forward pass of its model: enable gradient "
            "checkpointing by RoutedCausalLM.gradient_checkpointing_enable"
        )
    return state


class Routing:
    """Connects a model's forward passes to ``routing_state``; it holds no state of a pass itself.

    ``begin`` and ``end`` are hooks of the decoder, which every forward pass runs: training's,
    generation's and a user's.

    Args:
        pool: scope prompt's decision.
    """

    def __init__(self, scope: Scope, pool: Pool | None = None) -> None:
        self.scope: Scope = scope
        self.pool = pool

    @contextmanager
    def request(self, **changes: Any) -> Iterator[None]:
        """Within it this model's passes in this thread or task have these fields of ``Request``."""
        requests = _requests.get()
        mine = replace(requests.get(self, Request()), **changes)
        token = _requests.set({**requests, self: mine})
        try:
            yield
        finally:
            _requests.reset(token)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else kwargs["inputs_embeds"]
        request = _requests.get().get(self, Request())
        shape = (tokens.shape[0], tokens.shape[1])
        mask, cache = kwargs.get("attention_mask"), _cache_among(kwargs.values())
        state = routing_state(self.scope, request, shape, tokens.device, mask, cache)
        if self.pool is not None and state.kept is None and state.forced is None:
            features = base_features(module, args, kwargs, state)
            state = replace(state, decided=self.pool(features))
        _state.set(state)

    def end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep what was decided for a prompt on the cache that the pass has filled."""
        state = _state.get()
        _state.set(None)
        if output is None or state is None or state.kept is not None or self.scope == "token":
            return  # None: the pass has failed
        cache = _cache_among(kwargs.values())
        if cache is None and isinstance(output, dict):
            cache = _cache_among(output.values())
        if cache is not None:
            generation = _requests.get().get(self, Request()).generation
            decided = state.collected or {}
            cache.routing_gates = {layer: gates.detach() for layer, gates in decided.items()}
            cache.routing_generation = None if generation is None else generation.number


def base_features(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: RoutingState
) -> dict[int, Tensor]:
    """Layer -> [G, F], the base model's inputs of the routed Linears at the state's anchors.

    Args:
        args, kwargs: of the decoder's forward; a cache is neither read nor filled.
    """
    features: dict[int, Tensor] = {}
    base = replace(state, scope="last", forced=(0.0, 0.0), collected=None, features=features)
    cache = _cache_among(kwargs.values())
    inputs = {name: value for name, value in kwargs.items() if value is not cache}
    with torch.no_grad(), _Within(base):
        decoder.forward(*args, **{**inputs, "use_cache": False})
    return features


def _cache_among(values: Iterable[Any]) -> Any:
    """The cache among arguments or outputs, whose name differs between transformers' versions."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """``context_fn`` of torch.utils.checkpoint: a recomputation has the state of its forward pass.

    It may run in another thread (autograd's), and it records nothing.
    """
    state = _state.get()
    return nullcontext(), _Within(None if state is None else replace(state, collected=None))


class _Within:
    """Makes a state current; it can be entered again, because a backward pass may run twice."""

    def __init__(self, state: RoutingState | None) -> None:
        self._state = state
        self._tokens: list[Token[RoutingState | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_state.set(self._state))

    def __exit__(self, *error: object) -> None:
        _state.reset(self._tokens.pop())


def gates_of(logits: Tensor) -> Tensor:
    """Gates in (0, 1), in float32 or better."""
    return torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())
