"""A model proves itself before it is used: its values here are its own plain forward's.

The reference is the model's own forward over one row without padding, with its own attention and
its own head. Compared are short documents in every layout, by the relative error
|ours - reference| / |reference|, and generation of a batch that is padded on the left, from a
cache. N response tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..data.batching import Document, Layout, TokenBatch, collate
from ..errors import UserError

log = logging.getLogger(__name__)

Way = Literal["tree", "rows"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
BATCHED = "_midpo_batched"  # attribute of a served model: whether it generates in padded batches
_LAYOUTS: tuple[Layout, ...] = ("tree", "packed", "padded")
# Two documents, few tokens: each response costs a forward pass of the reference (ours).
_PROMPTS, _RESPONSES = (7, 3), ((9, 5), (8,))
_NEW_TOKENS = 3  # of each generated row
_chosen: dict[str, tuple[Way | None, str]] = {}  # model content -> the way, or why there is none


class Checked(Protocol):
    """A reader of token batches that can be compared with its model's own forward."""

    def use(self, way: Way) -> None:
        """Read batches this way from now on."""

    def values(self, batch: TokenBatch) -> Tensor:
        """What is compared, one row per response token of the batch: [N] or [N, D]."""

    def reference(self, document: list[int]) -> Tensor:
        """The model's own outputs for one row without padding: [T, V] or [T, D]."""

    def compared(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of the model's own outputs at the positions that predict ``labels``: as ``values``."""


def documents(vocabulary: int) -> list[Document]:
    """The documents of the check, of random tokens that do not depend on anything else."""
    rng = random.Random("self-check")

    def tokens(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    return [
        Document(tokens(prompt), [tokens(length) for length in lengths])
        for prompt, lengths in zip(_PROMPTS, _RESPONSES, strict=True)
    ]


def choose_way(model: Any, checked: Checked) -> Way:
    """The fastest way to read batches with which a model gives its own values; ``checked`` uses it.

    Args:
        model: the Hugging Face model. The answer is kept for its content, in this process.

    Raises:
        UserError: no way gives the model's own values.
    """
    key = content_key(model)
    if key not in _chosen:
        _chosen[key] = _find(model, checked)
        if _chosen[key][0] == "rows":
            log.warning(
                "model %s: read as padded rows with its own attention, which costs more: %s",
                model.name_or_path,
                _chosen[key][1],
            )
    way, reason = _chosen[key]
    if way is None:
        raise UserError(f"model {model.name_or_path} ({type(model).__name__}): {reason}")
    checked.use(way)
    return way


@torch.no_grad()
def _find(model: Any, checked: Checked) -> tuple[Way | None, str]:
    cases = documents(model.config.get_text_config().vocab_size)
    reasons = []
    with as_served(model):
        checked.use("rows")  # the model's own attention
        try:
            reference = torch.cat([_reference(checked, d, model.device) for d in cases])
        except Exception as error:  # whatever a model raises, it is not one that reads text alone
            return None, f"its own forward fails on a row of tokens ({_line(error)})"
        if not bool(reference.isfinite().all()):
            return None, "its own forward gives values that are not finite"
        limit = tolerance(model.dtype)
        for way in ("tree", "rows"):
            try:
                checked.use(way)
                worst = max(
                    relative_error(
                        checked.values(collate(cases, layout).to(model.device)), reference
                    )
                    for layout in _LAYOUTS
                )
            except Exception as error:  # the next way may do
                reasons.append(f"as {way} it fails ({_line(error)})")
                continue
            if worst <= limit:
                return way, "; ".join(reasons)
            reasons.append(f"as {way} it is off by {worst:.1e} of its values")
    return None, "not supported, it does not give its own values here: " + "; ".join(reasons)


def _reference(checked: Checked, document: Document, device: torch.device) -> Tensor:
    parts = []
    for suffix in document.suffixes:
        outputs = checked.reference([*document.prefix, *suffix])
        start = len(document.prefix) - 1
        labels = torch.tensor(suffix, device=device)
        parts.append(checked.compared(outputs[start : start + len(suffix)], labels))
    return torch.cat(parts)


def relative_error(values: Tensor, reference: Tensor) -> float:
    """|values - reference| / |reference|; infinite where a value is not a number."""
    error = float((values.double() - reference.double()).norm() / reference.double().norm())
    return error if error == error else float("inf")


@torch.no_grad()
def check_generation(model: Any, name: str, routed: bool = False) -> bool:
    """Whether prompts of several lengths may be generated from in one batch; else one at a time.

    Args:
        model: has a Hugging Face model's ``generate`` and forward.
        routed: its forward takes ``prompt_lengths``, and its gates depend on them.

    Raises:
        UserError: not even one prompt at a time gives what the model's own forward predicts.
    """
    cases = documents(model.config.get_text_config().vocab_size)
    prompts = [cases[0].prefix, cases[1].prefix]
    errors: list[float] = []
    with as_served(model):
        for batch in (prompts, prompts[:1]):
            try:
                errors.append(_generation_error(model, batch, routed))
            except Exception as error:  # whatever a model raises; one at a time may do
                errors.append(float("inf"))
                log.debug("model %s: %s", name, _line(error))
            if errors[-1] <= tolerance(model.dtype):
                return len(batch) > 1
    raise UserError(
        f"model {name}: not supported, what it generates from its cache is off by "
        f"{min(errors):.1e} of what its own forward predicts"
    )


def _generation_error(model: Any, prompts: list[list[int]], routed: bool) -> float:
    """The relative error of the log-probabilities that generation gives its tokens."""
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    rows = [[0] * pad + p for pad, p in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    out = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, num_beams=1,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    generated = torch.stack(out.logits, dim=1).double().log_softmax(-1)  # [rows, new tokens, V]
    expected = []
    for row, pad, prompt in zip(out.sequences, pads, prompts, strict=True):
        options = {"prompt_lengths": [len(prompt)]} if routed else {}
        logits = model(input_ids=row[None, pad:-1], use_cache=False, **options).logits[0]
        expected.append(logits[-_NEW_TOKENS:].double().log_softmax(-1))
    tokens = out.sequences[:, -_NEW_TOKENS:, None]
    return relative_error(generated.gather(-1, tokens), torch.stack(expected).gather(-1, tokens))


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that is rounding."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


@contextmanager
def as_served(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with what ZeRO-3 has sharded gathered around each module's forward."""
    training = [module for module in model.modules() if module.training]
    handles = []
    for module in model.modules():
        sharded = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
        if sharded:
            handles.append(module.register_forward_pre_hook(_gather(sharded)))
            handles.append(module.register_forward_hook(_release(sharded), always_call=True))
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _gather(parameters: list[Any]) -> Callable[..., None]:
    def gather(*_: Any) -> None:
        for parameter in parameters:
            parameter.all_gather()

    return gather


def _release(parameters: list[Any]) -> Callable[..., None]:
    def release(*_: Any) -> None:
        for parameter in parameters:
            parameter.partition()

    return release


def content_key(model: Any) -> str:
    """sha256 over a model's configuration, device, and a sample of every parameter."""
    config = model.config
    parts = [
        type(model).__name__,
        config.to_json_string(),
        config._attn_implementation,
        model.device.type,
    ]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode())
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:8].double().cpu()
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
