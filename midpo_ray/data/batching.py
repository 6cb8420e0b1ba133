"""Documents become rows, and pairs become batches: responses branch off one copy of their prompt.

R rows, T tokens of a row, N response tokens of a batch, S responses of a batch, G prompts.

    prompt p0 p1 p2, responses a0 a1 and b0 b1, as one row of layout ``tree``:
    input_ids     p0 p1 p2 a0 a1 b0 b1
    position_ids   0  1  2  3  4  3  4   every response continues the prompt
    branch_ids     0  0  0  1  1  2  2   a token attends to branch 0 of its document and to its own
    predict_index  2  3  2  5            flat position of the hidden state that predicts ...
    labels        a0 a1 b0 b1            ... this token
    owner          0  0  1  1            the response of this token
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schema import Document

__all__ = [
    "Document",
    "Layout",
    "Segment",
    "TokenBatch",
    "collate",
    "cost",
    "plan_batches",
    "split_batch",
]

Layout = Literal["tree", "packed", "padded"]
POOL = 32  # global batches that are sorted by length together (ours)
PASS_COST = 128  # a forward and backward pass costs about as much as this many tokens (ours)


class Segment(NamedTuple):
    """Consecutive tokens of a row, and where their prompt is (empty for a prompt itself)."""

    row: int
    prompt: slice
    own: slice


@dataclass
class TokenBatch:
    """The input of a model and the tokens to predict; made by ``collate``. Flat is r * T + t."""

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    document_ids: Tensor  # [R, T], -1 at padding
    branch_ids: Tensor  # [R, T], 0 in the prompt, 1.. in a response
    predict_index: Tensor  # [N] flat position whose hidden state predicts the label
    labels: Tensor  # [N]
    owner: Tensor  # [N] in [0, S)
    anchor_index: Tensor  # [G] flat position of each prompt's last token
    anchor_of: Tensor  # [R, T] in [0, G): the prompt of a token; 0 at padding
    segments: list[Segment]  # the same tree for the host, row by row
    responses: int  # S, document by document: of pair b 2b is chosen, 2b + 1 is rejected
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> TokenBatch:
        moved: dict[str, Any] = {"responses": self.responses, "segments": self.segments}
        for f in fields(self):
            if f.name not in moved and f.name != "_masks":
                moved[f.name] = getattr(self, f.name).to(device, non_blocking=True)
        return TokenBatch(**moved)

    def mask(self, window: int | None = None) -> Tensor:
        """Which token attends to which, bool [R, 1, T, T], cached.

        A token attends to itself and to earlier tokens of its prompt and its own branch; with
        ``window`` only to positions less than that far back. Padding attends to padding, so that
        no row of a softmax is empty.
        """
        if window not in self._masks:
            document, branch, position = self.document_ids, self.branch_ids, self.position_ids
            order = torch.arange(document.shape[1], device=document.device)
            mask = order[:, None] >= order
            mask = mask & (document[:, :, None] == document[:, None, :])
            mask &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
            if window is not None:
                mask &= position[:, :, None] - position[:, None, :] < window
            self._masks[window] = mask[:, None]
        return self._masks[window]


def collate(documents: Sequence[Document], layout: Layout = "tree", pad_id: int = 0) -> TokenBatch:
    """A batch of documents: ``tree`` has one row per document, ``packed`` one row for all of them,
    ``padded`` one plain causal row per response. Responses have the same order in every layout.

    >>> batch = collate([Document([5, 6, 7], [[8, 2], [9, 2]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8, 2, 9, 2]], [[0, 1, 2, 3, 4, 3, 4]])
    >>> batch.predict_index.tolist(), batch.labels.tolist(), batch.owner.tolist()
    ([2, 3, 2, 5], [8, 2, 9, 2], [0, 0, 1, 1])
    """
    if not documents or any(not d.prefix or not all(d.suffixes) for d in documents):
        raise ValueError("collate: one document or more is expected, with no empty token list")
    rows = _rows(documents, layout)
    width = max(sum(len(d.prefix) + sum(map(len, d.suffixes)) for _, d in row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id)
    document_ids = np.full((len(rows), width), -1)
    position_ids, branch_ids, anchor_of = np.zeros((3, len(rows), width), dtype=np.int64)
    segments: list[Segment] = []
    anchors: list[int] = []
    for row, parts in enumerate(rows):
        end = 0
        for number, document in parts:
            prompt = slice(end, end + len(document.prefix))
            for branch, ids in enumerate([document.prefix, *document.suffixes]):
                own = slice(end, end + len(ids))
                first = len(document.prefix) if branch else 0
                input_ids[row, own] = ids
                position_ids[row, own] = np.arange(first, first + len(ids))
                document_ids[row, own] = number
                branch_ids[row, own] = branch
                anchor_of[row, own] = len(anchors)
                segments.append(Segment(row, prompt if branch else slice(end, end), own))
                end = own.stop
            anchors.append(row * width + prompt.stop - 1)
    responses = [s for s in segments if s.prompt.stop > s.prompt.start]
    predict: list[int] = []
    for row, prompt, own in responses:  # the prompt's end predicts the first token of a response
        predict.append(row * width + prompt.stop - 1)
        predict += range(row * width + own.start, row * width + own.stop - 1)
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        branch_ids=torch.from_numpy(branch_ids),
        predict_index=torch.tensor(predict),
        labels=torch.from_numpy(np.concatenate([input_ids[s.row, s.own] for s in responses])),
        owner=torch.arange(len(responses)).repeat_interleave(
            torch.tensor([s.own.stop - s.own.start for s in responses])
        ),
        anchor_index=torch.tensor(anchors),
        anchor_of=torch.from_numpy(anchor_of),
        segments=segments,
        responses=len(responses),
    )


def _rows(documents: Sequence[Document], layout: Layout) -> list[list[tuple[int, Document]]]:
    """The (number, document) of each row; in the padded layout each response is its own row."""
    numbered = list(enumerate(documents))
    if layout == "packed":
        return [numbered]
    if layout == "tree":
        return [[part] for part in numbered]
    if layout == "padded":
        return [[(n, Document(d.prefix, [suffix]))] for n, d in numbered for suffix in d.suffixes]
    raise ValueError(f"collate: layout is {layout!r}, allowed are 'tree', 'packed', 'padded'")


def plan_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices of pairs: similar lengths together, random order.

    Pairs are shuffled, sorted by length inside pools of ``POOL`` batches, cut into batches, and the
    batches are shuffled. Pairs that do not fill a batch are a random remainder and come last. The
    plan depends on (seed, epoch) alone, not on the number of ranks.
    """
    rng = random.Random(f"batches/{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    whole = len(order) - len(order) % batch_size
    batches = []
    for start in range(0, whole, POOL * batch_size):
        pool = sorted(
            order[start : min(start + POOL * batch_size, whole)], key=lambda i: lengths[i]
        )
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches + ([order[whole:]] if whole < len(order) else [])


def split_batch(
    batch: Sequence[int],
    lengths: Sequence[int],
    world: int,
    batch_tokens: int,
    layout: Layout = "tree",
) -> list[list[list[int]]]:
    """A global batch cut into micro-batches of ``batch_tokens``: ``[rank][micro-batch][pair]``.

    Padding counts as tokens and is kept small: pairs of similar length share a micro-batch. All
    ranks have the same number of micro-batches, of similar cost; where pairs run out a list is
    empty. A pair that is longer than ``batch_tokens`` is a micro-batch of its own.
    """
    parts = _cut(sorted(batch, key=lambda i: (-lengths[i], i)), lengths, batch_tokens, layout)
    while len(parts) % world:
        largest = max(
            (p for p in parts if len(p) > 1), key=lambda p: cost(p, lengths, layout), default=None
        )
        if largest is None:
            parts += [[] for _ in range(world - len(parts) % world)]
        else:
            parts.remove(largest)
            at = min(
                range(1, len(largest)),
                key=lambda k: max(cost(p, lengths, layout) for p in (largest[:k], largest[k:])),
            )
            parts += [largest[:at], largest[at:]]
    parts.sort(key=lambda p: (-cost(p, lengths, layout), p))
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    load = [0] * world
    for start in range(0, len(parts), world):
        idlest = sorted(range(world), key=lambda r: (load[r], r))  # gets the costliest next part
        for rank, part in zip(idlest, parts[start : start + world], strict=True):
            ranks[rank].append(part)
            load[rank] += cost(part, lengths, layout)
    return ranks


def _cut(
    ordered: list[int], lengths: Sequence[int], batch_tokens: int, layout: Layout
) -> list[list[int]]:
    """Consecutive parts in the budget, with the least padding plus ``PASS_COST`` for each part."""
    best: list[tuple[float, int]] = [(0, 0)]  # of the first n: total, start of the last part
    for end in range(1, len(ordered) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            tokens = cost(ordered[start:end], lengths, layout)
            if tokens > batch_tokens and end - start > 1:
                break
            options.append((best[start][0] + tokens + PASS_COST, start))
        best.append(min(options))
    parts, end = [], len(ordered)
    while end:
        parts.append(ordered[best[end][1] : end])
        end = best[end][1]
    return parts[::-1]


def cost(part: Sequence[int], lengths: Sequence[int], layout: Layout) -> int:
    """Tokens of pairs in a batch, with padding (``padded``: as if responses had equal length)."""
    if layout == "packed":
        return sum(lengths[i] for i in part)
    return len(part) * max((lengths[i] for i in part), default=0)
