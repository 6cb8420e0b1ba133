"""The generation loop: batches of prompts, each continued until a token that ends an answer.

R rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..data.tokens import Tokenization
from ..errors import UserError
from .decoder import hugging_face_model
from .selfcheck import BATCHED


def end_tokens(model: Any, tokens: Tokenization) -> list[int]:
    """Ids that end an answer: EOS of tokenizer and generation settings, and the end of a turn."""
    ends = {tokens.eos}
    given = model.generation_config.eos_token_id
    if given is not None:
        ends |= {int(i) for i in (given if isinstance(given, list) else [given])}
    if tokens.chat:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "XYZ"}]
        text = tokens.tokenizer.apply_chat_template(turns, tokenize=False)
        tail = str(text).rpartition("XYZ")[2].lstrip()
        special = [t for t in tokens.tokenizer.all_special_tokens if t and tail.startswith(t)]
        ends |= set(tokens.tokenizer.convert_tokens_to_ids(special))
    return sorted(ends)


def generate_ids(
    model: Any,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    *,
    sampler: Any = None,
    **options: Any,
) -> list[list[int]]:
    """Ids that follow each prompt of one batch, up to and with the first of ``ends``.

    Prompts are padded on the left here, whatever the tokenizer's padding side.

    Args:
        sampler: a logits processor that draws tokens, for example ``Draw``; default: greedy.
        options: of the model's ``generate``, for example max_new_tokens.
    """
    if len(prompts) > 1 and not getattr(hugging_face_model(model), BATCHED, True):
        if sampler is not None:
            raise UserError(
                f"model {hugging_face_model(model).name_or_path}: it samples one prompt at a "
                "time, set --batch 1"
            )
        return [generate_ids(model, [prompt], ends, **options)[0] for prompt in prompts]
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    rows = [[ends[0]] * pad + p for pad, p in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    fixed = {"num_beams": 1, "repetition_penalty": 1.0}
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            logits_processor=LogitsProcessorList([sampler] if sampler else []),
            **{**greedy, **fixed, **options},
        )
    responses = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        responses.append(row[: end + 1])
    return responses


class Draw:
    """A logits processor that samples with random numbers that depend on key and position alone.

    All but the drawn token get -inf, so that greedy generation takes it.

    Args:
        keys: hex digits per row.
    """

    def __init__(
        self, keys: Sequence[str], max_new_tokens: int, temperature: float, top_p: float
    ) -> None:
        draws = [np.random.default_rng(int(key[:16], 16)) for key in keys]
        self._uniform = np.stack([rng.random(max_new_tokens) for rng in draws])
        self._temperature, self._top_p, self._step = temperature, top_p, 0

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] with one finite entry per row, by inverting the nucleus' distribution."""
        probabilities = (scores.double() / self._temperature).softmax(-1)
        ordered, token = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < self._top_p, 0.0)  # the fewest that reach top_p
        total = ordered.cumsum(-1)
        uniform = self._uniform[:, self._step : self._step + 1]
        drawn = torch.as_tensor(uniform, device=scores.device) * total[:, -1:]
        place = torch.searchsorted(total, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token.gather(1, place), 0.0)


class Multinomial:
    """A logits processor that samples at temperature 1 from one random stream for the batch."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
