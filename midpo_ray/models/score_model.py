"""Reward and cost models that are trained here: a decoder with a score head, and their files.

They are saved as a plain ``...ForSequenceClassification`` of one label, for ``load_scorer`` and
AutoModelForSequenceClassification. A conversation is rendered by the saved tokenizer's chat
template and tokenised as one text, in training as later, so that the ids agree (ours). T tokens of
a row, S responses, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..data.batching import Document, TokenBatch
from ..data.schema import Prompt
from ..data.tokens import Tokenization, plain_template
from ..errors import UserError
from .base import add_lora, load_classifier, load_tokenizer
from .decoder import TreeDecoder
from .scorers import encode, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoreHead(nn.Linear):
    """Linear(D, 1) without bias, float32 out; it starts at zero, so that the first loss is known
    (ours)."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(size, 1, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ResponseScores(TreeDecoder):
    """TokenBatch -> [S] float32: the score of each response, read at its last token."""

    def forward(self, batch: TokenBatch) -> Tensor:
        batch = self.arrange(batch)
        length = batch.input_ids.shape[1]
        scored = [s for s in batch.segments if s.prompt.stop > s.prompt.start]
        ends = [s.row * length + s.own.stop - 1 for s in scored]
        last = torch.tensor(ends, device=batch.input_ids.device)
        return self._model.score(self.hidden(batch).index_select(0, last)).squeeze(-1)


def build_score_model(config: Config, device: torch.device | str | None = None) -> nn.Module:
    """The recipe's model with a new score head, and a new LoRA or all parameters trainable.

    Raises:
        UserError: there is no classifier of this architecture, its head is not named score, or it
            lacks a target module.
    """
    section, seed = config.reward_model, config.seed_of_training
    model: Any = load_classifier(config.model, device)
    if type(dict(model.named_children()).get("score")) is not nn.Linear:
        raise UserError(
            f"model {config.model.path}: {type(model).__name__} has no Linear named score, from "
            "which a score could be read"
        )
    text = model.config.get_text_config()
    model.score = head = ScoreHead(text.hidden_size, model.dtype, model.device)
    if section.train == "full":
        return model.requires_grad_(True)
    count = text.num_hidden_layers
    layers = None if section.layers is None else list(range(count - section.layers, count))
    adapted = add_lora(model, section.lora, seed, task=None, layers=layers)
    head.requires_grad_(True)
    return adapted


def save_score_model(config: Config, state: dict[str, Tensor], folder: Path) -> None:
    """Write the whole trained model and its tokenizer.

    A LoRA is merged in float32 and rounded once to the recipe's dtype (ours).

    Args:
        state: ``trained_state`` of a model of ``build_score_model``, float32.
    """
    exact = config.model.model_copy(update={"dtype": "float32", "attention": "auto"})
    model: Any = build_score_model(config.model_copy(update={"model": exact}), "cpu")
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected
    merged = model if config.reward_model.train == "full" else model.merge_and_unload()
    tokenizer = scoring_tokenizer(config)
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    merged.to(getattr(torch, config.model.dtype)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def scoring_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's format as chat template, and its ``max_length``.

    Raises:
        UserError: ``data.template`` is none of the formats, or the tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(config.model)
    texts = Tokenization(tokenizer, config.data)
    if not texts.chat:
        begin, turn, eos = texts.plain_format
        tokenizer.chat_template = plain_template((tokenizer.bos_token or "") + begin, turn, eos)
    elif texts.fixed_template is not None:
        tokenizer.chat_template = texts.fixed_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.data.max_length
    return tokenizer


def score_documents(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
) -> list[Document | None]:
    """The two conversations of each prompt as one document, whose prefix is what their ids share.

    None stands for two conversations of the same ids. Padding ids at the end (EOS for some
    tokenizers) are dropped, because a classifier reads the last token that is not padding.
    """
    sides = []
    for number in (0, 1):
        texts = render_chats(tokenizer, prompts, [r[number] for r in responses])
        rows, _ = encode(tokenizer, texts, tokenizer.model_max_length)
        side = [row["input_ids"] for row in rows]
        for ids in side:
            while len(ids) > 1 and ids[-1] == tokenizer.pad_token_id:
                ids.pop()
        sides.append(side)
    return [_branched(first, second) for first, second in zip(*sides, strict=True)]


def _branched(first: list[int], second: list[int]) -> Document | None:
    if first == second:
        return None
    most = min(len(first), len(second)) - 1
    shared = next((i for i in range(most) if first[i] != second[i]), most)
    return Document(first[:shared], [first[shared:], second[shared:]]) if shared else None
