"""Every causal-LM family that transformers can build tiny is right or refused in one line."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch
from conftest import REPOSITORY
from families import FAMILIES, build, plain_log_probs

from midpo_ray.data.batching import Document, collate
from midpo_ray.errors import UserError
from midpo_ray.models.logprobs import ResponseLogProbs

TOLERANCE = 1e-4  # of the largest log-probability
TREE, ROWS = "tree", "rows"


def sweep_documents() -> list[Document]:
    """Three prompts with two responses each, longer than the tiny models' sliding windows."""
    rng = random.Random(5)
    ids = [[rng.randrange(3, 97) for _ in range(n)] for n in (8, 10, 4, 3, 5, 9, 1, 2, 12)]
    return [Document(ids[i], ids[i + 1 : i + 3]) for i in (0, 3, 6)]


@pytest.mark.slow
def test_every_family_is_right_or_refused() -> None:
    documents = sweep_documents()
    started = time.monotonic()
    ways: dict[str, str] = {}
    wrong: dict[str, float] = {}
    messages: dict[str, str] = {}
    not_built: list[str] = []
    for family in FAMILIES:
        try:
            model = build(family)
            expected = plain_log_probs(model, documents)
        except Exception:  # not a model of text alone, or none of this size
            not_built.append(family)
            continue
        model.name_or_path = family
        try:
            policy = ResponseLogProbs(model)
        except UserError as error:
            messages[family] = str(error)
            ways[family] = "refused"
            continue
        ways[family] = policy.way
        with torch.no_grad():
            for layout in ("tree", "padded"):
                values = policy(collate(documents, layout)).double()
                error = float((values - expected).abs().max() / expected.abs().max())
                if not error <= TOLERANCE:
                    wrong[family] = error
    refused = sorted(f for f, way in ways.items() if way == "refused")
    rows = sorted(f for f, way in ways.items() if way == ROWS)
    print(
        f"\n{len(ways) - len(refused)} of {len(ways)} families are right, "
        f"{len(rows)} of them as padded rows; "
        f"refused: {', '.join(refused)}; not built: {', '.join(not_built)}; "
        f"{time.monotonic() - started:.0f} s"
    )
    assert wrong == {}
    assert all(f"model {f} (" in text and "\n" not in text for f, text in messages.items())
    assert len(ways) >= 95
    known = documented()
    assert set(refused) == known["refused"]
    assert set(rows) == known["rows"]


def documented() -> dict[str, set[str]]:
    """The families that docs/models.md lists, by heading."""
    text = (REPOSITORY / "docs" / "models.md").read_text("utf-8")
    found: dict[str, set[str]] = {}
    for heading, key in (("## Read as padded rows", "rows"), ("## Refused", "refused")):
        section = text.split(heading, 1)[1].split("\n## ", 1)[0]
        found[key] = set(re.findall(r"`([\w.-]+)`", section)) & set(FAMILIES)
    return found


COMMON = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "stablelm", "nemotron", "cohere",
    "cohere2", "granite", "olmo2", "smollm3", "starcoder2", "deepseek_v3",
)  # fmt: skip


@pytest.mark.parametrize("family", COMMON)
def test_common_families_are_read_as_trees(family: str) -> None:
    model, documents = build(family), sweep_documents()
    expected = plain_log_probs(model, documents)
    policy = ResponseLogProbs(model)
    assert policy.way == TREE
    with torch.no_grad():
        for layout in ("tree", "packed", "padded"):
            values = policy(collate(documents, layout)).double()
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings"), [("bloom", {}), ("falcon", {"alibi": True}), ("mpt", {}), ("mamba", {})]
)
def test_families_without_positions_are_read_as_padded_rows(family: str, settings: dict) -> None:
    model, documents = build(family, **settings), sweep_documents()
    expected = plain_log_probs(model, documents)
    policy = ResponseLogProbs(model)
    assert policy.way == ROWS
    with torch.no_grad():
        for layout in ("tree", "padded"):
            values = policy(collate(documents, layout)).double()
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-3)
