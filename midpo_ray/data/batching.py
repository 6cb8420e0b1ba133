"""Documents into rows, and pairs into batches: a prompt stands once, its responses branch off it, and little padding is paid for.

R rows, T tokens of a row, N response tokens of a batch, S responses of a batch, G prompts as they stand in the rows.

    prompt p0 p1 p2, responses a0 a1 and b0 b1, as one row of layout ``tree``:
    input_ids     p0 p1 p2 a0 a1 b0 b1
    position_ids   0  1  2  3  4  3  4       every response goes on from the prompt
    branch_ids     0  0  0  1  1  2  2       a token attends to its document's branch 0 and to its own branch, never ahead
    predict_index  2  3  2  5                where the hidden state is that predicts ...
    labels        a0 a1 b0 b1                ... this token
    owner          0  0  1  1                and whose token it is
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["tree", "packed", "padded"]
POOL = 32  # global batches that are sorted by length together (ours)
PASS_COST = 128  # tokens that one more forward and backward pass is worth: padding above that is split off (ours)


@dataclass
class Document:
    """A prompt's ids and those of each of its responses; none of them empty."""

    prefix: list[int]
    suffixes: list[list[int]]


class Segment(NamedTuple):
    """Consecutive tokens of a row, the prompt's or one response's, and where their prompt is (before a prompt: nothing)."""

    row: int
    prompt: slice
    own: slice


@dataclass
class TokenBatch:
    """What a model reads and what it is asked; made by ``collate``. Flat positions are r * T + t."""

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    document_ids: Tensor  # [R, T], -1 at padding
    branch_ids: Tensor  # [R, T], 0 in the prompt, 1.. in a response
    predict_index: Tensor  # [N] flat position whose hidden state predicts the label
    labels: Tensor  # [N]
    owner: Tensor  # [N] in [0, S)
    anchor_index: Tensor  # [G] flat position of each prompt's last token
    anchor_of: (
        Tensor  # [R, T] in [0, G): the prompt that a token belongs to or follows; 0 at padding
    )
    segments: list[Segment]  # the same tree for the host, row by row
    responses: int  # S, document by document and response by response: of pair b 2b is chosen, 2b + 1 rejected
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> TokenBatch:
        moved: dict[str, Any] = {"responses": self.responses, "segments": self.segments}
        for f in fields(self):
            if f.name not in moved and f.name != "_masks":
                moved[f.name] = getattr(self, f.name).to(device, non_blocking=True)
        return TokenBatch(**moved)

    def mask(self, window: int | None = None) -> Tensor:
        """Who attends to whom, bool [R, 1, T, T] (True: row's token attends to column's). Made once and kept.

        A token attends to itself and to what is before it in its prompt and in its own branch; with ``window`` only to
        positions less than that far back. Padding attends to padding, so that no row of a softmax is empty.
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
    """A batch of documents: ``tree`` one row each, ``packed`` all in one row, ``padded`` one row a response (plain causal rows).

    The order of the responses is the same in every layout.

    >>> batch = collate([Document([5, 6, 7], [[8, 2], [9, 2]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8, 2, 9, 2]], [[0, 1, 2, 3, 4, 3, 4]])
    >>> batch.predict_index.tolist(), batch.labels.tolist(), batch.owner.tolist()
    ([2, 3, 2, 5], [8, 2, 9, 2], [0, 0, 1, 1])
    """
    if not documents or any(not d.prefix or not all(d.suffixes) for d in documents):
        raise ValueError(
            "collate: at least one document is expected, and neither prompts nor responses without tokens"
        )
    numbered = list(enumerate(documents))
    rows: list[list[tuple[int, list[int], list[list[int]]]]]
    if layout == "packed":
        rows = [[(d, document.prefix, document.suffixes) for d, document in numbered]]
    elif layout == "tree":
        rows = [[(d, document.prefix, document.suffixes)] for d, document in numbered]
    elif layout == "padded":
        rows = [
            [(d, document.prefix, [suffix])]
            for d, document in numbered
            for suffix in document.suffixes
        ]
    else:
        raise ValueError(f"collate: layout is {layout!r}, allowed are 'tree', 'packed', 'padded'")
    width = max(
        sum(len(prefix) + sum(map(len, suffixes)) for _, prefix, suffixes in row) for row in rows
    )
    shape = (len(rows), width)
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    branches: list[int] = []
    anchors: list[int] = []
    predict: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    anchor_index: list[int] = []
    segments: list[Segment] = []
    response = 0
    for start in range(0, len(rows) * width, width):
        row = rows[start // width]
        flat = start
        for document, prefix, suffixes in row:
            length = len(prefix)
            anchor = flat + length - 1
            branches += [0] * length
            positions += range(length)
            ids += prefix
            prompt = slice(flat - start, flat - start + length)
            segments.append(Segment(start // width, slice(prompt.start, prompt.start), prompt))
            flat += length
            for branch, suffix in enumerate(suffixes, 1):
                n = len(suffix)
                segments.append(
                    Segment(start // width, prompt, slice(flat - start, flat - start + n))
                )
                ids += suffix
                positions += range(length, length + n)
                branches += [branch] * n
                predict += [anchor, *range(flat, flat + n - 1)]
                labels += suffix
                owner += [response] * n
                flat += n
                response += 1
            owners += [document] * (flat - anchor + length - 1)
            anchors += [len(anchor_index)] * (flat - anchor + length - 1)
            anchor_index.append(anchor)
        padding = start + width - flat
        ids += [pad_id] * padding
        for column, value in ((positions, 0), (branches, 0), (owners, -1), (anchors, 0)):
            column += [value] * padding

    def tensor(column: list[int]) -> Tensor:
        return torch.tensor(column, dtype=torch.long)

    return TokenBatch(
        input_ids=tensor(ids).view(shape),
        position_ids=tensor(positions).view(shape),
        document_ids=tensor(owners).view(shape),
        branch_ids=tensor(branches).view(shape),
        predict_index=tensor(predict),
        labels=tensor(labels),
        owner=tensor(owner),
        anchor_index=tensor(anchor_index),
        anchor_of=tensor(anchors).view(shape),
        segments=segments,
        responses=response,
    )


def plan_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices of pairs: pairs of like length together, batches in random order.

    Pairs are shuffled, sorted by length inside pools of ``POOL`` batches, cut into batches, and the batches are shuffled. What
    does not fill a batch is a random remainder and comes last. Decided by (seed, epoch) alone, whatever the number of ranks.
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
    """``[rank][micro-batch][pair]``: a global batch cut for ``world`` ranks, each micro-batch within ``batch_tokens`` of rows.

    Padding counts towards the tokens, and is kept small: pairs of like length share a micro-batch. Every rank gets as many
    micro-batches, those of the same number are of like cost; where pairs run out a list is empty. A pair that is longer than
    ``batch_tokens`` is a micro-batch of its own.
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
        idlest = sorted(
            range(world), key=lambda r: (load[r], r)
        )  # the costliest of the next parts goes where least was given
        for rank, part in zip(idlest, parts[start : start + world], strict=True):
            ranks[rank].append(part)
            load[rank] += cost(part, lengths, layout)
    return ranks


def _cut(
    ordered: list[int], lengths: Sequence[int], batch_tokens: int, layout: Layout
) -> list[list[int]]:
    """Consecutive parts within the budget, with the least padding plus ``PASS_COST`` for each part."""
    best: list[tuple[float, int]] = [
        (0, 0)
    ]  # of the first n: total, and where the last part begins
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
    """Tokens of the rows that some pairs make, padding included (``padded``: as if both responses were equally long)."""
    if not part:
        return 0
    return (
        sum(lengths[i] for i in part)
        if layout == "packed"
        else len(part) * max(lengths[i] for i in part)
    )


def wasted_share(
    parts: Sequence[Sequence[int]], lengths: Sequence[int], layout: Layout = "tree"
) -> float:
    """The share of padding among the tokens of some micro-batches."""
    total = sum(cost(part, lengths, layout) for part in parts)
    return 1.0 - sum(lengths[i] for part in parts for i in part) / total if total else 0.0
