"""Rows, masks and batches: what attends to what, what predicts what, and fair splits."""

from __future__ import annotations

import doctest
import random

import pytest

from midpo_ray.data import batching
from midpo_ray.data.batching import Document, collate, cost, plan_batches, split_batch

LAYOUTS = ("tree", "packed", "padded")


def documents(count: int, seed: int = 0, prefix: int = 6, suffix: int = 9) -> list[Document]:
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3, 250) for _ in range(n)]  # noqa: E731
    return [
        Document(ids(rng.randint(1, prefix)), [ids(rng.randint(1, suffix)) for _ in range(2)])
        for _ in range(count)
    ]


def wasted_share(parts, lengths, layout="tree") -> float:
    """The share of padding among the tokens of micro-batches."""
    total = sum(cost(part, lengths, layout) for part in parts)
    return 1.0 - sum(lengths[i] for part in parts for i in part) / total if total else 0.0


def test_doctest() -> None:
    assert doctest.testmod(batching).failed == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_response_is_read_back(layout) -> None:
    """The mask of each predicting position gives prompt and response, in order of positions."""
    made = documents(5)
    batch = collate(made, layout)
    mask, width = batch.mask(), batch.input_ids.shape[1]
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    expected = [(d.prefix, suffix) for d in made for suffix in d.suffixes]
    assert batch.responses == len(expected) == 10
    for s, (prefix, suffix) in enumerate(expected):
        places = batch.predict_index[batch.owner == s].tolist()
        assert batch.labels[batch.owner == s].tolist() == suffix
        for n, place in enumerate(places):
            row, column = divmod(place, width)
            seen = (row * width + mask[row, 0, column].nonzero().flatten()).tolist()
            assert ids[seen].tolist() == (prefix + suffix)[: len(prefix) + n]
            assert positions[seen].tolist() == list(range(len(prefix) + n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_anchors_are_the_last_prompt_tokens(layout) -> None:
    made = documents(4, seed=1)
    batch = collate(made, layout)
    ids, of = batch.input_ids.flatten(), batch.anchor_of
    assert len(batch.anchor_index) == (8 if layout == "padded" else 4)
    real = batch.document_ids >= 0
    assert (of[~real] == 0).all()
    for row, column in real.nonzero().tolist():
        document = made[batch.document_ids[row, column]]
        anchor = int(batch.anchor_index[of[row, column]])
        assert divmod(anchor, of.shape[1])[0] == row
        assert ids[anchor] == document.prefix[-1]
        assert batch.position_ids.flatten()[anchor] == len(document.prefix) - 1
    padded = collate(made, "padded")
    assert (padded.document_ids >= 0).sum() == sum(
        2 * len(d.prefix) + sum(map(len, d.suffixes)) for d in made
    )


def test_mask_by_hand() -> None:
    batch = collate([Document([5, 6], [[7], [8, 9]]), Document([5], [[7], [8]])])
    one = ["10000", "11000", "11100", "11010", "11011"]
    two = ["10000", "11000", "10100", "00010", "00011"]  # then padding, which attends to itself
    for row, expected in zip(batch.mask()[:, 0], (one, two), strict=True):
        assert ["".join(str(int(x)) for x in line) for line in row] == expected
    narrow = batch.mask(2)[0, 0]
    assert ["".join(str(int(x)) for x in line) for line in narrow] == [
        "10000",
        "11000",
        "01100",
        "01010",
        "00011",
    ]
    assert batch.mask(2) is batch.mask(2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_row_of_a_mask_is_empty(layout) -> None:
    batch = collate(documents(6, seed=2), layout)
    assert batch.mask().diagonal(dim1=-2, dim2=-1).all()
    assert batch.mask(3).diagonal(dim1=-2, dim2=-1).all()


def test_what_cannot_be_collated() -> None:
    for bad in ([], [Document([], [[1]])], [Document([1], [[2], []])]):
        with pytest.raises(ValueError, match="collate"):
            collate(bad)
    with pytest.raises(ValueError, match="layout"):
        collate(documents(1), "flat")  # type: ignore[arg-type]


@pytest.mark.parametrize(("pairs", "size"), [(1, 4), (64, 16), (100, 16), (2000, 16), (7, 16)])
def test_a_plan_holds_every_pair_once(pairs, size) -> None:
    rng = random.Random(pairs)
    lengths = [rng.randint(10, 500) for _ in range(pairs)]
    plan = plan_batches(lengths, size, seed=3, epoch=1)
    assert sorted(i for batch in plan for i in batch) == list(range(pairs))
    assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1)
    assert plan == plan_batches(lengths, size, seed=3, epoch=1)
    if pairs > 2:
        assert plan != plan_batches(lengths, size, seed=3, epoch=2)
        assert plan != plan_batches(lengths, size, seed=4, epoch=1)


def test_a_plan_wastes_little() -> None:
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(5, 0.6)) + 5 for _ in range(1800)]
    plan = plan_batches(lengths, 16, seed=0, epoch=0)
    unsorted = [list(range(i, i + 16)) for i in range(0, 1792, 16)]
    assert wasted_share(plan, lengths) < 0.08 < 0.4 < wasted_share(unsorted, lengths)
    assert wasted_share(plan, lengths, "packed") == 0.0
    for batches, bound in ((plan, 0.04), (unsorted, 0.15)):
        parts = [
            part
            for batch in batches
            for rank in split_batch(batch, lengths, 1, 4096)
            for part in rank
        ]
        assert wasted_share(parts, lengths) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_split_is_fair(layout, world) -> None:
    rng = random.Random(world)
    for pairs in (1, 3, 16, 40):
        lengths = [rng.randint(20, 700) for _ in range(100)]
        batch = rng.sample(range(100), pairs)
        ranks = split_batch(batch, lengths, world, 1500, layout)
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(i for rank in ranks for part in rank for i in part) == sorted(batch)
        for rank in ranks:
            for part in rank:
                assert len(part) <= 1 or cost(part, lengths, layout) <= 1500
        if pairs >= 8 * world:
            loads = [sum(cost(part, lengths, layout) for part in rank) for rank in ranks]
            assert max(loads) < 1.3 * min(loads)
        assert ranks == split_batch(batch[::-1], lengths, world, 1500, layout)


def test_a_rank_without_pairs_gets_empty_parts() -> None:
    assert split_batch([4], [10] * 5, 3, 100) == [[[4]], [[]], [[]]]
    assert split_batch([0, 1], [500, 20], 2, 100) == [[[0]], [[1]]]
