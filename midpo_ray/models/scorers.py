"""Sources of a reward (higher is better) or a cost (lower is safer, below 0 is safe).

``load_scorer`` gives one callable for all formats, (prompts, responses) -> floats:

* PKU's score model (Safe RLHF, arXiv 2310.12773; beaver-7b-unified-reward and -cost): a decoder and
  ``score_head``, a Linear(D, 1). The score is read at the final EOS of
  ``BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}``. With ``do_normalize`` a reward
  is (x - mean) / std, and a cost is x / std.
* ``AutoModelForSequenceClassification`` with one label: the conversation in the tokenizer's chat
  template, or prompt and response as a pair of texts where the tokenizer has none.
* ``module:function`` of (prompts, responses), two lists of texts.

Input that is too long loses its end, except for PKU's final EOS (ours). R rows, T tokens, D hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor, nn

from ..config import Scorer
from ..data.tokens import (
    PAPER_BEGIN,
    PAPER_TURN,
    render_plain,
    select_chat_template,
    with_fixed_date,
)
from ..errors import UserError
from ..user_code import load_function
from .pku import ScoreModel, load_weights, source_of
from .selfcheck import tolerance

log = logging.getLogger(__name__)

Prompts = Sequence[Sequence[tuple[str, str]]]
Score = Callable[[Prompts, Sequence[str]], list[float]]
_Row = dict[str, list[int]]  # a model's inputs

# Tokens of one forward pass, padding included. More would leave a core's caches (ours).
_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
_PART = 1024  # texts per call of a tokenizer, which keeps far more than the ids in memory


def load_scorer(
    scorer: Scorer,
    kind: Literal["reward", "cost"],
    device: str | torch.device | None = None,
    *,
    batch_tokens: int | None = None,
) -> Score:
    """The callable of a scorer: (role, content) messages and responses -> one finite float each.

    Args:
        kind: what the scores are used as; a score model of the other type is refused.
        device: of a model; default: the CPU.
        batch_tokens: of one forward pass, padding included; default: what suits the device.

    Raises:
        UserError: there is no such model or function, it is not a scorer, or it is of the other
            kind. When called: it gives another number of values than of responses, or a value that
            is not a finite number.
    """
    if scorer.function is not None:
        name = scorer.function
        function = load_function(name, f"scorer {name}")

        def raw(prompts: Prompts, responses: Sequence[str]) -> Any:
            return function([plain_text(prompt) for prompt in prompts], list(responses))

    elif scorer.model is not None:
        name = scorer.model
        raw = _ModelScorer(scorer, kind, torch.device(device or "cpu"), batch_tokens)
    else:
        raise UserError(f"scorer column {scorer.column!r}: a column is read with the data")

    def score(prompts: Prompts, responses: Sequence[str]) -> list[float]:
        return _checked(raw(prompts, responses), responses, f"scorer {name}")

    return score


def _checked(values: Any, responses: Sequence[str], where: str) -> list[float]:
    try:
        scores = [float(value) for value in values]
    except (TypeError, ValueError):
        kind = type(values).__name__
        raise UserError(f"{where}: a list of numbers is expected, not {kind}") from None
    if len(scores) != len(responses):
        raise UserError(
            f"{where}: {len(scores)} values for {len(responses)} responses, one each is expected"
        )
    for row, value in enumerate(scores):
        if not math.isfinite(value):
            raise UserError(
                f"{where}: {value} for row {row}, response {responses[row][:60]!r}: a finite "
                "number is expected"
            )
    return scores


def plain_text(prompt: Sequence[tuple[str, str]]) -> str:
    """The only message of a prompt, or several as "role: content" lines (ours)."""
    if len(prompt) == 1:
        return prompt[0][1]
    return "\n".join(f"{role}: {content}" for role, content in prompt)


def render_chats(tokenizer: Any, prompts: Prompts, responses: Sequence[str]) -> list[str]:
    """Each conversation with its response as text, by the tokenizer's chat template."""
    texts = []
    for prompt, response in zip(prompts, responses, strict=True):
        turns = (*prompt, ("assistant", response))
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        except jinja2.TemplateError as error:
            raise UserError(
                f"prompt {plain_text(prompt)[:60]!r}: the tokenizer's chat template does not take "
                f"this conversation ({error})"
            ) from None
    return texts


def encode(
    tokenizer: Any, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None
) -> tuple[list[_Row], int]:
    """Inputs of each text, or of texts and ``pairs``, and how many were truncated.

    Texts without pairs are rendered conversations, which hold their special tokens.
    """
    rows: list[_Row] = []
    truncated = 0
    for start in range(0, len(texts), _PART):
        chosen = slice(start, start + _PART)
        encoded = tokenizer(
            list(texts[chosen]),
            None if pairs is None else list(pairs[chosen]),
            add_special_tokens=pairs is not None,
            truncation=True,
            max_length=max_length,
        )
        for values in zip(*encoded.values(), strict=True):
            rows.append(dict(zip(encoded.keys(), values, strict=True)))
        truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
    return rows, truncated


def describe_scorer(scorer: Scorer) -> tuple[Any, Any]:
    """A score model's configuration and tokenizer; no weights are loaded.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer  # heavy, and not needed for functions

    try:
        config = AutoConfig.from_pretrained(scorer.model, **source_of(scorer))
        return config, AutoTokenizer.from_pretrained(scorer.model, **source_of(scorer))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"scorer {scorer.model}: no model with a tokenizer is found there ({reason})"
        ) from None


class _ModelScorer:
    """A score model or a classifier as a function of prompts and responses."""

    def __init__(
        self, scorer: Scorer, kind: str, device: torch.device, batch_tokens: int | None
    ) -> None:
        self.where, self.device = f"scorer {scorer.model}", device
        self.batch_tokens = batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"])
        self.config, self.tokenizer = describe_scorer(scorer)
        select_chat_template(self.tokenizer, "auto", self.where)
        if isinstance(self.tokenizer.chat_template, str):  # scores must not depend on the day
            fixed = with_fixed_date(self.tokenizer.chat_template, str(scorer.model))
            self.tokenizer.chat_template = fixed or self.tokenizer.chat_template
        names = list(self.config.architectures or [])
        self.is_pku = any(name.endswith(("ForScore", "ModelForScore")) for name in names)
        if self.is_pku:
            self._check_type(kind)
            self.pad = self.tokenizer.pad_token_id or 0
            self.model: nn.Module = ScoreModel(scorer, self.config)
        elif any(name.endswith("ForSequenceClassification") for name in names):
            self.pad = self.config.pad_token_id
            self.model = _load_classifier(scorer, self.config)
        else:
            raise UserError(
                f"{self.where}: {', '.join(names) or 'no architecture'} is not a scorer, a "
                "...ForScore or a ...ForSequenceClassification with one label is expected"
            )
        self.model.to(device).eval().requires_grad_(False)
        limits = [scorer.max_length, self.tokenizer.model_max_length, _positions(self.model)]
        self.max_length = min(limits)
        self._check_padding()
        self.truncated = 0

    def _check_padding(self) -> None:
        """Score short conversations together and alone; where padding matters, rows stay alone."""
        prompts = [(("user", "Why?"),), (("user", "A"),)]
        responses = ["For a reason.", "B"]
        self.truncated = 1  # nothing that a user asked for: not to be reported
        together = torch.tensor(self(prompts, responses))
        alone = [self([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
        limit = 10 * tolerance(next(self.model.parameters()).dtype)  # a score may be near 0 (ours)
        if float((together - torch.tensor(alone)).abs().max()) > limit * max(1.0, abs(alone[0])):
            log.warning("%s: padding changes its scores, so rows are scored alone", self.where)
            self.batch_tokens = 1

    def _check_type(self, kind: str) -> None:
        own = getattr(self.config, "score_type", "reward")
        if own != kind:
            raise UserError(
                f"{self.where}: its score_type is {own!r}, but it is used as {kind}: name it as "
                f"scores.{own} instead"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.where}: its tokenizer has no EOS token, at which the score is read"
            )

    @torch.no_grad()
    def __call__(self, prompts: Prompts, responses: Sequence[str]) -> list[float]:
        rows, truncated = self._inputs(prompts, responses)
        if truncated and not self.truncated:
            log.warning(
                "%s: %d of %d inputs have more than %d tokens and are truncated; later ones are "
                "not reported",
                *(self.where, truncated, len(rows), self.max_length),
            )
        self.truncated += truncated
        values = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        while order:
            longest = len(rows[order[0]]["input_ids"])
            count = max(1, self.batch_tokens // longest)
            part, order = order[:count], order[count:]
            scores = self._forward([rows[i] for i in part]).float().cpu().tolist()
            for i, value in zip(part, scores, strict=True):
                values[i] = value
        return values

    def _inputs(self, prompts: Prompts, responses: Sequence[str]) -> tuple[list[_Row], int]:
        if self.is_pku:
            return self._pku_inputs(prompts, responses)
        if self.tokenizer.chat_template:
            return encode(
                self.tokenizer, render_chats(self.tokenizer, prompts, responses), self.max_length
            )
        texts = [plain_text(prompt) for prompt in prompts]
        return encode(self.tokenizer, texts, self.max_length, pairs=responses)

    def _pku_inputs(self, prompts: Prompts, responses: Sequence[str]) -> tuple[list[_Row], int]:
        """The tokenizer puts BOS in front; EOS ends every row, whatever is cut before it."""
        eos = self.tokenizer.eos_token_id
        rows: list[_Row] = []
        truncated = 0
        for prompt, response in zip(prompts, responses, strict=True):
            text = render_plain(prompt, PAPER_BEGIN, PAPER_TURN, self.tokenizer.eos_token)
            ids = self.tokenizer(text + response)["input_ids"]
            ids = ids[:-1] if ids[-1] == eos else ids
            truncated += len(ids) >= self.max_length
            ids = [*ids[: self.max_length - 1], eos]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return rows, truncated

    def _forward(self, rows: list[_Row]) -> Tensor:
        """[R] scores; rows are padded on the right."""
        pad = self.pad
        if pad is None:
            # Such a classifier takes padding for the last token, at which it reads the score,
            # unless it is named an id that no row of the batch has.
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self.config.pad_token_id = self.model.config.pad_token_id = pad  # type: ignore[union-attr]
        inputs = {}
        for name in rows[0]:
            value = pad if name == "input_ids" else 0
            columns = [torch.tensor(row[name]) for row in rows]
            padded = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)
            inputs[name] = padded.to(self.device)
        out = self.model(**inputs)
        return out if isinstance(out, Tensor) else out.logits[:, 0]


def _positions(model: nn.Module) -> int:
    """The most tokens that a model has positions for."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return 1 << 30  # relative positions
    for name, module in model.named_modules():
        learned = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if learned and module.padding_idx is not None:
            return limit - int(module.padding_idx) - 1  # RoBERTa counts from behind the padding id
    return limit


def _load_classifier(scorer: Scorer, config: Any) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    if config.num_labels != 1:
        raise UserError(
            f"scorer {scorer.model}: a classifier of {config.num_labels} labels, one label is "
            "expected"
        )
    return load_weights(AutoModelForSequenceClassification, scorer, config)
