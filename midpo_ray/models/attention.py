"""Attention over rows that hold a tree of responses, for every attention that a model may have.

On CUDA it is FlexAttention's block mask. On CPUs each prompt and each response is a segment that
attends to exactly what it sees, by GEMMs, so that nothing is spent on other responses, other
documents or padding, and no [T, T] is ever computed; torch's fused attention for CPUs computes it.

R rows, T tokens of a row, H heads over K key-value heads, d a head's size (of a value it may
differ), n tokens of a segment, m of those that it sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batching import Segment, TokenBatch

NAME = "midpo_tree"  # among transformers' attention implementations
_SCORES = 1 << 20  # attention scores that exist at once; those of one key-value head at least
_LOWEST = torch.finfo(torch.float32).min


def register() -> None:
    """Make ``NAME`` an attention implementation of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by segments where the mask is a tree's ``mark``; SDPA in all other uses."""
    tree, window = getattr(attention_mask, "tree", (None, None))
    if tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and attention_mask.shape[-2:] != (
            query.shape[2],
            key.shape[2],
        ):
            raise ValueError("the model does not pass its attention mask on as it is given")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("sliding_window", window) not in (window, *tree.windows):
        raise ValueError("the model's sliding window is not its configuration's")
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention with dropout, a soft cap or sinks needs model.attention: eager")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, tree, window, scaling).transpose(1, 2), None


class Tree:
    """A batch's segments, and what is added to the scores of each: 0 where it sees, else -inf."""

    def __init__(self, batch: TokenBatch, windows: Iterable[int | None] = ()) -> None:
        self.windows = set(windows)  # of the configuration, also those longer than a row
        self.segments, self._device = batch.segments, batch.input_ids.device
        self._added: dict[tuple[int, int, int | None], Tensor] = {}

    def mark(self, window: int | None) -> Tensor:
        """A [1, 1, 1, 1] in place of a mask; ``attention_forward`` takes tree and window from it.

        Transformers passes a mask of four dimensions on to the attention function as it is, also
        where a model drops keyword arguments that it does not know.
        """
        marked = torch.zeros(1, 1, 1, 1, device=self._device)
        marked.tree = self, window  # type: ignore[attr-defined]
        return marked

    def added(self, segment: Segment, window: int | None) -> Tensor:
        """[n, m] for a segment; positions count from the prompt's start, so they decide it."""
        prompt = segment.prompt.stop - segment.prompt.start
        seen = prompt + segment.own.stop - segment.own.start
        window = None if window is None or window >= seen else window
        if (prompt, seen, window) not in self._added:
            token = torch.arange(seen, device=self._device)
            ahead = token - token[prompt:, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            added = torch.zeros(hidden.shape, device=self._device)
            self._added[prompt, seen, window] = added.masked_fill_(hidden, _LOWEST)
        return self._added[prompt, seen, window]


def bias(batch: TokenBatch, window: int | None, dtype: torch.dtype) -> Tensor:
    """``batch.mask`` as what eager attention adds to the scores, [R, 1, T, T]."""
    mask = batch.mask(window)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def block_mask(batch: TokenBatch, window: int | None) -> Any:
    """``batch.mask`` for FlexAttention, which leaves out its empty blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    document, branch, position = batch.document_ids, batch.branch_ids, batch.position_ids

    def attends(row: Tensor, head: Tensor, token: Tensor, to: Tensor) -> Tensor:
        same = (token >= to) & (document[row, token] == document[row, to])
        same = same & ((branch[row, to] == 0) | (branch[row, token] == branch[row, to]))
        return (
            same if window is None else same & (position[row, token] - position[row, to] < window)
        )

    rows, length = document.shape
    return create_block_mask(attends, rows, None, length, length, device=str(document.device))


class _Attention(torch.autograd.Function):
    """softmax(q k^T scaling + added) v, [R, H, T, d].

    Kept are q, k, v and the result. Heads that share a key are one GEMM.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tree: Tree,
        window: int | None,
        scaling: float,
    ) -> Tensor:
        rows, count, tokens, _ = query.shape
        # In memory [R, T, H, d], as the next Linear reads it.
        out = query.new_zeros(rows, tokens, count, value.shape[-1]).transpose(1, 2)
        for segment in tree.segments:
            for heads, keys in _heads(query, key, segment):
                q = _own(query, segment, heads, len(range(*keys.indices(key.shape[1]))))
                weights = _weights(
                    q, _seen(key, segment, keys), tree.added(segment, window), scaling
                )
                made = torch.bmm(weights.to(value.dtype), _seen(value, segment, keys))
                out[segment.row, heads, segment.own] = made.view(
                    -1, segment.own.stop - segment.own.start, made.shape[-1]
                )
        ctx.save_for_backward(query, key, value, out)
        ctx.rest = tree, window, scaling
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out = ctx.saved_tensors
        tree, window, scaling = ctx.rest
        of_query, of_key, of_value = (
            x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)
        )
        for segment in tree.segments:
            n = segment.own.stop - segment.own.start
            for heads, keys in _heads(query, key, segment):
                groups = len(range(*keys.indices(key.shape[1])))
                q, g, o = (_own(x, segment, heads, groups) for x in (query, upstream, out))
                k, v = _seen(key, segment, keys), _seen(value, segment, keys)
                weights = _weights(q, k, tree.added(segment, window), scaling)
                _add(of_value, segment, keys, torch.bmm(weights.to(g.dtype).transpose(1, 2), g))
                correction = (g.float() * o.float()).sum(-1, keepdim=True)
                of_scores = (
                    torch.bmm(g, v.transpose(1, 2))
                    .float()
                    .sub_(correction)
                    .mul_(weights)
                    .mul_(scaling)
                    .to(g.dtype)
                )
                of_query[segment.row, heads, segment.own] = torch.bmm(of_scores, k).view(
                    -1, n, q.shape[-1]
                )
                _add(of_key, segment, keys, torch.bmm(of_scores.transpose(1, 2), q))
        return of_query, of_key, of_value, None, None, None


def _heads(query: Tensor, key: Tensor, segment: Segment) -> list[tuple[slice, slice]]:
    """(heads, their key-value heads), so that few scores exist at once."""
    keys, shared = key.shape[1], query.shape[1] // key.shape[1]
    own = segment.own.stop - segment.own.start
    size = max(1, _SCORES // (shared * own * (own + segment.prompt.stop - segment.prompt.start)))
    return [
        (slice(at * shared, (at + size) * shared), slice(at, at + size))
        for at in range(0, keys, size)
    ]


def _own(x: Tensor, segment: Segment, heads: slice, groups: int) -> Tensor:
    """[R, H, T, d] -> [K, H/K n, d]: a segment's tokens, with heads of one key in one matrix."""
    return x[segment.row, heads, segment.own].reshape(groups, -1, x.shape[-1])


def _seen(x: Tensor, segment: Segment, keys: slice) -> Tensor:
    """[R, K, T, d] -> [K, m, d]: the prompt's tokens and the segment's own."""
    prompt, own = segment.prompt, segment.own
    if prompt.stop in (prompt.start, own.start):
        return x[
            segment.row, keys, prompt.start if prompt.stop > prompt.start else own.start : own.stop
        ]
    return torch.cat([x[segment.row, keys, prompt], x[segment.row, keys, own]], dim=1)


def _add(x: Tensor, segment: Segment, keys: slice, values: Tensor) -> None:
    """The reverse of ``_seen``, for gradients."""
    length = segment.prompt.stop - segment.prompt.start
    x[segment.row, keys, segment.prompt] += values[:, :length]
    x[segment.row, keys, segment.own] += values[:, length:]


def _weights(query: Tensor, key: Tensor, added: Tensor, scaling: float) -> Tensor:
    """softmax of [K, H/K n, m] in float32."""
    scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scaling)
    scores.view(len(scores), -1, *added.shape).add_(added)
    return torch.softmax(scores, dim=-1)
