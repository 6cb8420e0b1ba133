"""The routed model: a frozen base, two frozen LoRA experts, and the gates that mix them.

It takes any decoder whose experts adapt one kind of Linear: those modules are wrapped (see
``assembly.route``), and no model code is replaced. R rows, T tokens of a row, L layers, G
decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import EXPERTS, Data, Model, Router
from ..data.tokens import Tokenization
from ..errors import UserError
from .router import RoutedLinear
from .routing import (
    Anchors,
    Generation,
    RecordedGates,
    Routing,
    checkpoint_contexts,
    gates_of,
    row_anchors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.batching import TokenBatch

Prompt = str | Sequence[Mapping[str, str]] | Sequence[tuple[str, str]]  # a text, or messages

ROWS = 16  # prompts of one forward pass where gates are read
_generations = count()


class RoutedCausalLM(nn.Module):
    """A causal language model whose ``target`` Linears are routed.

    One model may serve several threads. ``force_gates`` and ``anchored`` hold in the thread or
    asyncio task that entered them; a new thread starts without them.

    Args:
        model: the Hugging Face model, with those modules wrapped.
        layers: the wrapped modules by path, the lowest layer first.
        hashes: sha256 of the experts' files, by expert and file name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, RoutedLinear],
        *,
        router: Router,
        base: Model,
        hashes: dict[str, dict[str, str]],
        target: str,
        tokenizer: Any = None,
        data: Data | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.router, self.base, self.hashes, self.target = router, base, hashes, target
        self.data = data or template_data({})
        self.layers = dict(layers)  # a plain dict: the model's own tree registers them
        pool = self._pooled_gates if router.scope == "prompt" else None
        self._routing = Routing(router.scope, pool)
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(self._routing.begin, with_kwargs=True)
        decoder.register_forward_hook(self._routing.end, with_kwargs=True, always_call=True)

    # As a causal language model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's own forward.

        Args:
            input_ids: [R, T].
            prompt_lengths: [R], real tokens of each row's prompt, where prompt and response are
                in one pass and the scope is not ``token``. Without it several tokens are a prompt,
                and one token behind a cache is a decoding step.
        """
        if prompt_lengths is None:
            return self.model(input_ids=input_ids, **inputs)
        tokens = inputs["inputs_embeds"] if input_ids is None else input_ids
        shape, mask = (tokens.shape[0], tokens.shape[1]), inputs.get("attention_mask")
        mask = None if mask is None else mask[:, -shape[1] :]
        lengths = torch.as_tensor(prompt_lengths)
        anchors = row_anchors(shape, mask, tokens.device, lengths=lengths)
        with self._routing.request(anchors=anchors, recorded=None):
            return self.model(input_ids=input_ids, **inputs)

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """``model.generate``; each prompt's decision, if there is one, is kept for its answer."""
        settings = options.get("generation_config") or self.generation_config
        chunk = options.get("prefill_chunk_size") or settings.prefill_chunk_size
        if chunk and self.router.scope != "token":
            scope = self.router.scope
            raise UserError(f"prefill_chunk_size: scope {scope} reads the gate of a whole prompt")
        prompts = [inputs, options.get("input_ids"), options.get("inputs_embeds")]
        columns = next((tokens.shape[1] for tokens in prompts if tokens is not None), 1)
        with self._routing.request(generation=Generation(next(_generations), columns)):
            return self.model.generate(inputs, **options)  # type: ignore[operator]

    def answer(self, prompt: Prompt, **options: Any) -> str:
        """The text that follows a prompt, which is templated as in training.

        Args:
            options: of the model's ``generate``; decoding is greedy by default.
        """
        from .generation import end_tokens, generate_ids  # imports transformers

        tokens = self.tokenization
        ends = end_tokens(self, tokens)
        (ids,) = generate_ids(self, [tokens.prompt_ids(messages(prompt))], ends, **options)
        text = self.tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True)
        return str(text)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Non-reentrant checkpointing, whose recomputation has the forward pass's gates.

        Checkpointing that is enabled elsewhere fails in the backward pass.
        """
        options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        options = {**(gradient_checkpointing_kwargs or {}), **options}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    # Gates

    def force_gates(self, safety: float, helpfulness: float) -> AbstractContextManager[None]:
        """Within it every gate has these values, in the thread or asyncio task that enters it.

        (1, 0) is base and safety expert, (0, 1) base and helpfulness expert, (0, 0) the base.
        """
        return self._routing.request(forced=(float(safety), float(helpfulness)))

    @contextmanager
    def anchored(self, batch: TokenBatch) -> Iterator[RecordedGates]:
        """Within it forward passes are of this batch, and their gates are recorded."""
        real = batch.document_ids >= 0
        tokens = torch.zeros(len(batch.anchor_index), device=real.device)
        tokens.index_add_(0, batch.anchor_of.flatten(), real.flatten().to(tokens.dtype))
        anchors = Anchors(batch.anchor_index, batch.anchor_of, real, tokens)
        recorded = RecordedGates(self.router.scope, anchors)
        with self._routing.request(anchors=anchors, recorded=recorded):
            yield recorded

    def _pooled_gates(self, features: Mapping[int, Tensor]) -> Tensor:
        """Scope prompt: layer -> features [G, F] to gates [G, 2], of the mean logits of all layers.

        Gates are soft while they train; later ``router.decision`` may let the larger one alone be
        open. Weights per layer would add nothing to gates that are linear maps.
        """
        logits = [layer.gate(features[layer.layer]).float() for layer in self.layers.values()]
        gates = gates_of(self.router.temperature * torch.stack(logits).mean(0))
        if self.router.decision == "hard" and not self.training:
            gates = nn.functional.one_hot(gates.argmax(-1), 2).to(gates.dtype)
        return gates

    def routing(self, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        """For each prompt and expert the gate at the prompt's last token, a mean over layers."""
        rows = self.gates(prompts)
        return [{name: float(row[name][:, -1].mean()) for name in EXPERTS} for row in rows]

    @torch.no_grad()
    def gates(
        self, prompts: Sequence[Prompt], responses: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Every layer's gates at every token, for reports.

        Returns:
            For each prompt ``tokens`` (ids of prompt and response), ``prompt_tokens`` (how many are
            the prompt's), ``safety`` and ``helpfulness`` [L, tokens], float32 on the CPU. Unless
            the scope is ``token``, the columns of a row are equal.
        """
        texts = self.tokenization
        documents, lengths = [], []
        for i, prompt in enumerate(prompts):
            ids = texts.prompt_ids(messages(prompt))
            lengths.append(len(ids))
            if responses is not None:
                ids = ids + texts.response_ids(responses[i], texts.max_length)[0]
            documents.append(ids)
        rows: list[dict[str, Any]] = [{} for _ in documents]
        by_length = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        for start in range(0, len(by_length), ROWS):
            part = by_length[start : start + ROWS]
            gates = self._gates_of([documents[i] for i in part], [lengths[i] for i in part])
            for i, (safety, helpfulness) in zip(part, gates, strict=True):
                rows[i] = {"tokens": documents[i], "prompt_tokens": lengths[i]}
                rows[i] |= {"safety": safety, "helpfulness": helpfulness}
        return rows

    def _gates_of(
        self, documents: list[list[int]], prompt_lengths: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """(safety, helpfulness) of each document, each [L, its tokens]."""
        inputs = pad(documents, self.device)
        mask, lengths = inputs["attention_mask"], torch.tensor(prompt_lengths)
        shape = (mask.shape[0], mask.shape[1])
        anchors = row_anchors(shape, mask, self.device, lengths=lengths)
        recorded = RecordedGates(self.router.scope, anchors)
        with self._routing.request(anchors=anchors, recorded=recorded):
            self.model.get_decoder()(**inputs, use_cache=False)
        pair = [gates.float().cpu() for gates in recorded.gates()[:2]]
        if self.router.scope != "token":
            pair = [gates.unsqueeze(-1).expand(-1, *shape) for gates in pair]  # [L, R, T]
        safety, helpfulness = pair
        sizes = enumerate(map(len, documents))
        return [(safety[:, row, :size], helpfulness[:, row, :size]) for row, size in sizes]

    @cached_property
    def tokenization(self) -> Tokenization:
        """How prompts become tokens: as in training, but whole, up to the model's context."""
        if self.tokenizer is None:
            raise UserError("this routed model has no tokenizer: give one to route()")
        length = self.config.max_position_embeddings
        whole = {"max_length": 2 * length, "max_prompt_length": length, "long_prompts": "truncate"}
        return Tokenization(self.tokenizer, self.data.model_copy(update=whole))

    # What trains

    def gate_state(self) -> dict[str, Tensor]:
        """All that trains: the gates' parameters, detached, by their names in this module."""
        return {
            f"model.{path}.gate.{name}": parameter.detach()
            for path, layer in self.layers.items()
            for name, parameter in layer.gate.named_parameters()
        }

    @torch.no_grad()
    def load_gate_state(self, state: Mapping[str, Tensor], where: str = "gate state") -> None:
        """Raises UserError, which begins with ``where``, if a tensor does not fit."""
        own = self.gate_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong = wrong or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise UserError(
                f"{where}: tensor {wrong[0]} does not fit the {len(own)} tensors of this model's "
                f"{self.router.gate} gates"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def fold(self) -> RoutedCausalLM:
        """Serve by folded gates, in place (``mlp`` gates stay); they no longer train."""
        for layer in self.layers.values():
            layer.fold(self.router.scope)
        return self


def pad(rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask [R, T] of rows of ids, padded on the right."""
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones_like(row) for row in ids]
    inputs = {"input_ids": ids, "attention_mask": real}
    stack = nn.utils.rnn.pad_sequence
    return {name: stack(part, batch_first=True).to(device) for name, part in inputs.items()}


def template_data(settings: Mapping[str, Any]) -> Data:
    """The template part of a recipe's data section, without its sets."""
    return Data.model_validate({"sets": [{"path": "none"}], **settings})


def messages(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """A text, chat messages or (role, content) pairs as (role, content) pairs."""
    if isinstance(prompt, str):
        return (("user", prompt),)
    pairs = []
    for message in prompt:
        if isinstance(message, Mapping):
            message = (message["role"], message["content"])
        pairs.append((message[0], message[1]))
    return tuple(pairs)
