"""Sources of a reward (higher is better) or a cost (lower is safer, below 0 is safe): score models, classifiers, functions.

``load_scorer`` gives one callable for all: (prompts, responses) -> floats, batched, length-sorted, without gradients. Formats:

* PKU's score model (Safe RLHF, arXiv 2310.12773; beaver-7b-unified-reward and -cost): a decoder, ``score_head`` Linear(D, 1), the
  score read at the final EOS of ``BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}``; where ``do_normalize`` is
  set a reward is (x - mean) / std and a cost is x / std.
* ``AutoModelForSequenceClassification`` with one label: the conversation in the tokenizer's chat template, or, where it has
  none, prompt and response as the tokenizer's pair of texts.
* ``module:function`` of (prompts, responses), two lists of texts.

Over-long input loses its end; PKU's EOS stays (ours). R rows, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import Scorer
from ..data.tokens import PAPER_BEGIN, PAPER_TURN, render_plain
from ..errors import UserError
from ..user_code import load_function

Prompts = Sequence[Sequence[tuple[str, str]]]
Score = Callable[[Prompts, Sequence[str]], list[float]]
BATCH_TOKENS = {
    "cpu": 1024,
    "cuda": 32768,
}  # of one forward pass, padding included; more would leave a core's caches (ours)


def load_scorer(
    scorer: Scorer,
    kind: Literal["reward", "cost"],
    device: str | torch.device | None = None,
    *,
    batch_tokens: int | None = None,
) -> Score:
    """The callable of a scorer: prompts as (role, content) messages and their responses -> one finite float each.

    Args:
        kind: what it is used as; a score model of the other type is refused.
        device: of a model; default: the CPU.
        batch_tokens: of one forward pass, padding included; default: what suits the device.

    Raises:
        UserError: at once: no such model, not a scorer, the other kind, no such function. When called: another number of values
            than of rows, or a score that is not a finite number (names the row).
    """
    if scorer.function is not None:
        name, raw = scorer.function, _function(scorer.function)
    elif scorer.model is not None:
        name, raw = (
            scorer.model,
            _ModelScorer(scorer, kind, torch.device(device or "cpu"), batch_tokens),
        )
    else:
        raise UserError(
            f"scorer column {scorer.column!r}: a column is read with the data, there is no model to load"
        )

    def score(prompts: Prompts, responses: Sequence[str]) -> list[float]:
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        values = _floats(raw(prompts, responses), name)
        if len(values) != len(responses):
            raise UserError(
                f"scorer {name}: {len(values)} values for {len(responses)} responses, one for each is expected"
            )
        for row, value in enumerate(values):
            if not math.isfinite(value):
                text = responses[row][:60]
                raise UserError(
                    f"scorer {name}: {value} for row {row}, response {text!r}: a finite number is expected"
                )
        return values

    return score


def _floats(values: Any, name: str) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(
            f"scorer {name}: a list of numbers is expected, this is {type(values).__name__}"
        ) from None


def _function(name: str) -> Callable[[Prompts, Sequence[str]], Any]:
    function = load_function(name, f"scorer {name}")
    return lambda prompts, responses: function(
        [plain_text(prompt) for prompt in prompts], list(responses)
    )


def plain_text(prompt: Sequence[tuple[str, str]]) -> str:
    """A prompt for a function of texts: the one user message, or several as "role: content" lines (ours)."""
    if len(prompt) == 1:
        return prompt[0][1]
    return "\n".join(f"{role}: {content}" for role, content in prompt)


def conversation(prompt: Sequence[tuple[str, str]], eos: str) -> str:
    """Safe RLHF's format up to the response; a system message goes before the first question (ours)."""
    return render_plain(prompt, PAPER_BEGIN, PAPER_TURN, eos)


def encode_chats(
    tokenizer: Any, prompts: Prompts, responses: Sequence[str], max_length: int
) -> list[list[int]]:
    """Ids of each conversation in the tokenizer's chat template, tokenised as one text; its end is cut where it is long."""
    from jinja2 import TemplateError

    texts, ids = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        messages = [
            {"role": role, "content": content}
            for role, content in (*prompt, ("assistant", response))
        ]
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            start = plain_text(prompt)[:60]
            raise UserError(
                f"prompt {start!r}: the tokenizer's chat template does not take this conversation ({error})"
            ) from None
    for at in range(
        0, len(texts), 1024
    ):  # bounded memory: the tokenizer keeps far more than ids of what it is given
        part = texts[at : at + 1024]
        ids += tokenizer(part, add_special_tokens=False, truncation=True, max_length=max_length)[
            "input_ids"
        ]
    return ids


def describe_scorer(scorer: Scorer) -> tuple[Any, Any]:
    """A score model's configuration and tokenizer; no weights are loaded.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(scorer.model, **_source(scorer))
        return config, AutoTokenizer.from_pretrained(scorer.model, **_source(scorer))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"scorer {scorer.model}: no model with a tokenizer is found there ({reason})"
        ) from None


def _source(scorer: Scorer) -> dict[str, Any]:
    return {"revision": scorer.revision, "trust_remote_code": scorer.trust_remote_code}


class _ModelScorer:
    """A score model or a classifier behind one call."""

    def __init__(
        self, scorer: Scorer, kind: str, device: torch.device, batch_tokens: int | None
    ) -> None:
        assert scorer.model is not None
        self.name, self.device = scorer.model, device
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
        self.config, self.tokenizer = describe_scorer(scorer)
        self.max_length = min(scorer.max_length, self.tokenizer.model_max_length)
        architectures = list(self.config.architectures or [])
        dtype = scorer.dtype if scorer.dtype == "auto" else getattr(torch, scorer.dtype)
        if any(name.endswith(("ForScore", "ModelForScore")) for name in architectures):
            self._check_type(kind)
            self.model: nn.Module = ScoreModel(scorer, self.config, dtype)
            self.encode, self.pad = self._encode_conversation, self.tokenizer.pad_token_id or 0
        elif any(name.endswith("ForSequenceClassification") for name in architectures):
            self.model = self._classifier(scorer, dtype)
            self.encode = self._encode_chat if self.tokenizer.chat_template else self._encode_pair
            self.pad = self.config.pad_token_id
        else:
            raise UserError(
                f"scorer {scorer.model}: {', '.join(architectures) or 'no architecture'} is no scorer, a ...ForScore or a "
                "...ForSequenceClassification with one label is expected"
            )
        self.model.to(device).eval().requires_grad_(False)

    def _check_type(self, kind: str) -> None:
        said = vars(self.config).get("score_type", "reward")
        if said != kind:
            raise UserError(
                f"scorer {self.name}: its score_type is {said!r}, used as {kind}: name it as scores.{said} instead"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"scorer {self.name}: its tokenizer has no EOS token, at which a score model reads the score"
            )

    def _classifier(self, scorer: Scorer, dtype: torch.dtype | str) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        if self.config.num_labels != 1:
            raise UserError(
                f"scorer {self.name}: a classifier of {self.config.num_labels} labels, one label is expected"
            )
        try:
            return AutoModelForSequenceClassification.from_pretrained(
                self.name,
                config=self.config,
                dtype=dtype,
                use_safetensors=True,
                **_source(scorer),
            )
        except OSError as error:
            raise UserError(f"scorer {self.name}: {str(error).strip().splitlines()[0]}") from None

    @torch.no_grad()
    def __call__(self, prompts: Prompts, responses: Sequence[str]) -> list[float]:
        rows = [
            self.encode(prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        values = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        while order:
            longest = len(rows[order[0]]["input_ids"])
            count = max(1, self.batch_tokens // longest)
            chosen, order = order[:count], order[count:]
            scores = self._forward([rows[i] for i in chosen], longest)
            for i, value in zip(chosen, scores.float().cpu().tolist(), strict=True):
                values[i] = value
        return values

    def _forward(self, rows: list[dict[str, list[int]]], length: int) -> Tensor:
        """[R] scores of rows padded on the right."""
        pad = self.pad
        if (
            pad is None
        ):  # a classifier that knows no padding reads its last token: pad by an id that no row of the batch has
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self.model.config.pad_token_id = pad  # type: ignore[union-attr]
        filled = {
            key: torch.tensor(
                [
                    row[key] + [pad if key == "input_ids" else 0] * (length - len(row[key]))
                    for row in rows
                ]
            )
            for key in rows[0]
        }
        out = self.model(**{key: value.to(self.device) for key, value in filled.items()})
        return out if isinstance(out, Tensor) else out.logits[:, 0]

    def _encode_conversation(
        self, prompt: Sequence[tuple[str, str]], response: str
    ) -> dict[str, list[int]]:
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer(conversation(prompt, self.tokenizer.eos_token) + response)["input_ids"]
        ids = [*(ids[:-1] if ids[-1] == eos else ids)[: self.max_length - 1], eos]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _encode_chat(
        self, prompt: Sequence[tuple[str, str]], response: str
    ) -> dict[str, list[int]]:
        (ids,) = encode_chats(self.tokenizer, [prompt], [response], self.max_length)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _encode_pair(
        self, prompt: Sequence[tuple[str, str]], response: str
    ) -> dict[str, list[int]]:
        return dict(
            self.tokenizer(
                plain_text(prompt), response, truncation=True, max_length=self.max_length
            )
        )


class ScoreModel(nn.Module):
    """PKU's score model: {input_ids [R, T], attention_mask [R, T]} -> [R], the score at each row's last real token."""

    mean: Tensor
    var: Tensor

    def __init__(self, scorer: Scorer, config: Any, dtype: torch.dtype | str) -> None:
        from transformers import AutoModel

        super().__init__()
        assert scorer.model is not None
        options = {
            "dtype": dtype,
            "use_safetensors": True,
            **_source(scorer),
        }
        head = _head_tensors(scorer.model, scorer.revision)
        try:
            self.backbone = AutoModel.from_pretrained(scorer.model, config=config, **options)
        except OSError as error:
            raise UserError(
                f"scorer {scorer.model}: {str(error).strip().splitlines()[0]}"
            ) from None
        weight = head.get("score_head.weight")
        if weight is None or tuple(weight.shape) != (1, config.hidden_size):
            shape = "is missing" if weight is None else f"is {tuple(weight.shape)}"
            raise UserError(
                f"scorer {scorer.model}: score_head.weight {shape}, (1, {config.hidden_size}) is expected"
            )
        self.score_head = nn.Linear(config.hidden_size, 1)
        with torch.no_grad():
            self.score_head.weight.copy_(weight)
            self.score_head.bias.copy_(head.get("score_head.bias", torch.zeros(1)))
        said = vars(config)
        self.normalize, self.centre = (
            bool(said.get("do_normalize")),
            said.get("score_type", "reward") == "reward",
        )
        for name, default in (
            ("mean", 0.0),
            ("var", 1.0),
        ):  # the checkpoint's buffers, else the configuration's values
            value = head.get(f"normalizer.{name}")
            value = torch.as_tensor(said.get(name) or [default]) if value is None else value
            self.register_buffer(name, value.float().reshape(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        score = self.score_head(last.float()).squeeze(
            -1
        )  # float32 whatever the backbone's dtype (ours): bfloat16 is coarse
        if self.normalize:
            score = (score - self.mean if self.centre else score) / (self.var.sqrt() + 1e-8)
        return score


def _head_tensors(model: str, revision: str | None) -> dict[str, Tensor]:
    """score_head.* and normalizer.* of a checkpoint, one file or several, local or of the hub's cache. Safetensors only."""
    import json

    from safetensors import safe_open
    from transformers.utils import cached_file

    found: dict[str, Tensor] = {}
    index = cached_file(
        model,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if index:
        names = json.loads(Path(index).read_text("utf-8"))["weight_map"]
        names = {
            file for key, file in names.items() if key.startswith(("score_head.", "normalizer."))
        }
    else:
        names = {"model.safetensors"}
    with ExitStack() as files:
        for name in names:
            path = cached_file(
                model, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
            if path is None:
                raise UserError(
                    f"scorer {model}: {name} is not there; a score model in safetensors is expected, no pickle is read"
                )
            file = files.enter_context(safe_open(path, framework="pt"))
            found |= {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - safe_open is not iterable
                if key.startswith(("score_head.", "normalizer."))
            }
    return found
