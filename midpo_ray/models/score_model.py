"""Reward and cost models to train: a decoder with a score head, read at each response's last token; and how they are saved.

What is saved is a plain ``...ForSequenceClassification`` of one label, which AutoModelForSequenceClassification and
``load_scorer`` read. A conversation is the text of the saved tokenizer's chat template, tokenised as one piece here as there, so
that both see the same ids (ours). R rows, T tokens, S responses, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..data.batching import Document, TokenBatch
from ..data.schema import Prompt
from ..data.tokens import PAPER_BEGIN, PAPER_TURN
from ..errors import UserError
from .base import add_lora, load_classifier, load_tokenizer
from .decoder import TreeDecoder
from .scorers import encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoreHead(nn.Linear):
    """Linear(D, 1) without bias, zero at first, so that the loss before the first step is known (ours); float32 out."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(size, 1, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ResponseScores(TreeDecoder):
    """TokenBatch -> [S] float32: the score of each response, read at its last token."""

    def forward(self, batch: TokenBatch) -> Tensor:
        length = batch.input_ids.shape[1]
        ends = [
            s.row * length + s.own.stop - 1
            for s in batch.segments
            if s.prompt.stop > s.prompt.start
        ]
        last = torch.tensor(ends, device=batch.input_ids.device)
        return self._model.score(self.hidden(batch).index_select(0, last)).squeeze(-1)


def build_score_model(config: Config, device: torch.device | str | None = None) -> nn.Module:
    """The recipe's model with a fresh score head, and a fresh LoRA or all parameters trainable.

    Raises:
        UserError: no classifier of this architecture is known, its head is not named score, or a LoRA's target is not there.
    """
    section, seed = config.reward_model, config.seed_of_training
    model: Any = load_classifier(config.model, device)
    if type(dict(model.named_children()).get("score")) is not nn.Linear:
        raise UserError(
            f"model {config.model.path}: {type(model).__name__} has no Linear named score to read a score from"
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
    """Write the trained model whole: a LoRA merged in float32, rounded once to the recipe's dtype (ours), and the tokenizer.

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
    """The model's tokenizer, whose chat template is the conversation's format, whose ``model_max_length`` is the recipe's."""
    tokenizer, template = load_tokenizer(config.model), config.data.template
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"data.template is chat, and the tokenizer of {config.model.path} has no chat template: use paper"
        )
    if template == "paper" or (template == "auto" and not tokenizer.chat_template):
        tokenizer.chat_template = _template(tokenizer, PAPER_BEGIN, PAPER_TURN)
    elif template not in ("auto", "chat"):
        if "{prompt}" not in template:
            raise UserError(
                f"data.template is {template!r}, allowed are auto, chat, paper, or a text that holds {{prompt}}"
            )
        tokenizer.chat_template = _template(tokenizer, "", template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.data.max_length
    return tokenizer


def _template(tokenizer: PreTrainedTokenizerBase, begin: str, turn: str) -> str:
    """Jinja of a text with {prompt}: an answer ends with EOS, a system message goes before the first question, as in training."""
    before, after = (json.dumps(part) for part in turn.split("{prompt}", 1))
    return (
        "{% set ns = namespace(system='') %}"
        + ("" if tokenizer.bos_token is None else f"{{{{ {json.dumps(tokenizer.bos_token)} }}}}")
        + f"{{{{ {json.dumps(begin)} }}}}"
        + "{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
        + "{% elif m['role'] == 'user' %}"
        + f"{{{{ {before} + ns.system + m['content'] + {after} }}}}{{% set ns.system = '' %}}"
        + "{% else %}"
        + f"{{{{ m['content'] + {json.dumps(tokenizer.eos_token)} }}}}"
        + "{% endif %}{% endfor %}"
    )


def score_documents(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
) -> list[Document | None]:
    """A prompt's two conversations as one document: what their ids share is its prefix. None where no difference is left.

    A classifier reads the last token that is no padding, so padding ids at the end (EOS is one for some tokenizers) are left off.
    """
    made: list[list[list[int]]] = []
    for number in (0, 1):
        many = encode_chats(
            tokenizer, prompts, [r[number] for r in responses], tokenizer.model_max_length
        )
        for ids in many:
            while len(ids) > 1 and ids[-1] == tokenizer.pad_token_id:
                ids.pop()
        made.append(many)
    return [_branched(first, second) for first, second in zip(*made, strict=True)]


def _branched(first: list[int], second: list[int]) -> Document | None:
    most = min(len(first), len(second)) - 1
    shared = next((i for i in range(most) if first[i] != second[i]), most)
    return (
        Document(first[:shared], [first[shared:], second[shared:]])
        if shared and first != second
        else None
    )
