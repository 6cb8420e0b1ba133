"""The generation loop: padding, end tokens, and sampling."""

from __future__ import annotations

import pytest
import torch

from midpo_ray.config import Data
from midpo_ray.data.tokens import Tokenization
from midpo_ray.models.generation import Draw, end_tokens, generate_ids

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4]]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama().eval()


def alone(model, prompt, steps):
    """Greedy ids by plain forward passes without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_the_plain_forward_pass(model):
    """Rows of different lengths in one batch continue as each does alone."""
    wanted = [alone(model, p, 8) for p in PROMPTS]
    unused = set(range(model.config.vocab_size)) - {i for ids in wanted for i in ids}
    assert generate_ids(model, PROMPTS, [min(unused)], max_new_tokens=8) == wanted


def test_any_end_token_ends_a_row(model):
    whole = [alone(model, p, 8) for p in PROMPTS]
    ends = [whole[0][2], whole[1][4]]

    def cut(ids):
        return ids[: next((i for i, t in enumerate(ids) if t in ends), len(ids)) + 1]

    assert generate_ids(model, PROMPTS, ends, max_new_tokens=8) == [cut(ids) for ids in whole]


def test_end_tokens_are_all_that_the_model_names(model, byte_tokenizer, monkeypatch):
    """EOS of the tokenizer, those of the generation settings, and what ends a templated turn."""
    tokens = Tokenization(byte_tokenizer, Data.model_validate({"sets": [{"path": "x"}]}))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 9])
    assert end_tokens(model, tokens) == sorted({7, 9, byte_tokenizer.eos_token_id})
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert end_tokens(model, tokens) == [byte_tokenizer.eos_token_id]
    template = "{% for m in messages %}{{ m['content'] + bos_token }}{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    tokens = Tokenization(byte_tokenizer, Data.model_validate({"sets": [{"path": "x"}]}))
    ends = {byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id}
    assert end_tokens(model, tokens) == sorted(ends)


def test_draw_follows_the_distribution():
    """Drawn tokens have the softmax's frequencies; top_p keeps the fewest tokens that reach it."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(4000, 4)
    keys = [f"{i * 2654435761 % 2**64:016x}" for i in range(4000)]
    drawn = Draw(keys, 3, 1.0, 1.0)(None, logits).argmax(-1)
    assert torch.bincount(drawn, minlength=4).div(4000).tolist() == pytest.approx(
        logits[0].softmax(-1).tolist(), abs=0.03
    )
    cut = Draw(keys, 3, 1.0, 0.8)(None, logits).argmax(-1)
    assert set(cut.tolist()) == {1, 2}
