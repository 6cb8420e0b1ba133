"""The routed model: a frozen base, two frozen LoRA experts, and the gates that mix them token by token or prompt by prompt.

Any decoder whose MLP ends in one Linear will do: modules are wrapped, no model code is replaced (``assembly.route`` does it).
R rows, T tokens of a row, L layers, G decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import EXPERTS, Data, Model, Router
from ..errors import UserError
from .generation import end_tokens, generate_ids
from .router import Anchors, RoutedLinear, Routing, row_anchors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.batching import TokenBatch
    from ..data.tokens import Tokenization

ROWS = 16  # prompts of one forward pass where gates are read

Prompt = str | Sequence[Mapping[str, str]] | Sequence[tuple[str, str]]  # a text, or messages


class RoutedCausalLM(nn.Module):
    """A causal LM whose ``target`` Linears are routed. ``model`` is the Hugging Face model itself, with those modules wrapped."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: Routing,
        layers: dict[str, RoutedLinear],
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
        self.layers = dict(
            layers
        )  # by module path, lowest first; they are registered in the model's own tree
        self._context = context
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(context.begin, with_kwargs=True)
        decoder.register_forward_hook(context.end, with_kwargs=True, always_call=True)

    # --- as a causal LM -------------------------------------------------------------------------------------------------

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
            prompt_lengths: [R], real tokens of each row's prompt, for prompt and response in one pass with scope ``last``.
                Without it several tokens are a prompt (a new decision at the last real one), and one token behind a cache is
                a decoding step (the cache's decision).
        """
        if prompt_lengths is None:
            return self.model(input_ids=input_ids, **inputs)
        tokens = inputs["inputs_embeds"] if input_ids is None else input_ids
        shape, mask = (tokens.shape[0], tokens.shape[1]), inputs.get("attention_mask")
        lengths = torch.as_tensor(prompt_lengths)
        mask = None if mask is None else mask[:, -shape[1] :]
        with self._given(row_anchors(shape, mask, tokens.device, lengths=lengths), record=False):
            return self.model(input_ids=input_ids, **inputs)

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """``model.generate``; with scope ``last`` the decision is made at each prompt's last token and kept."""
        tokens = next(
            (
                x
                for x in (inputs, options.get("input_ids"), options.get("inputs_embeds"))
                if x is not None
            ),
            None,
        )
        settings = options.get("generation_config") or self.generation_config
        if self.router.scope == "last" and (
            options.get("prefill_chunk_size") or settings.prefill_chunk_size
        ):
            raise UserError(
                "prefill_chunk_size: scope last reads the gate where the prompt is seen whole, leave it out"
            )
        context = self._context
        context.prompt_width, context.decided = 1 if tokens is None else tokens.shape[1], False
        try:
            return self.model.generate(inputs, **options)  # type: ignore[operator]
        finally:
            context.prompt_width = None

    def answer(self, prompt: Prompt, **options: Any) -> str:
        """The text that follows a prompt, templated as in training; ``options`` are ``generate``'s.

        Greedy by default. It ends at any of the model's end tokens.
        """
        texts = self.tokenization
        prompts = [texts.prompt_ids(messages(prompt))]
        [ids] = generate_ids(self, prompts, end_tokens(self, texts), **options)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Non-reentrant checkpointing whose recomputation sees the gates' anchors and records nothing. Enable it here only."""
        options = {
            **(gradient_checkpointing_kwargs or {}),
            "use_reentrant": False,
            "context_fn": self._context.checkpoint_contexts,
        }
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    # --- gates ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def force_gates(self, safety: float, helpfulness: float) -> Iterator[None]:
        """Within it every gate has these values: (1, 0) is base + safety expert, (0, 1) base + helpfulness, (0, 0) the base."""
        before, self._context.forced = self._context.forced, (float(safety), float(helpfulness))
        try:
            yield
        finally:
            self._context.forced = before

    @contextmanager
    def anchored(self, batch: TokenBatch) -> Iterator[None]:
        """Within it forward passes are of this batch: its anchors place the decisions, and the gates are recorded."""
        real = batch.document_ids >= 0
        weight = torch.zeros(len(batch.anchor_index), device=real.device)
        weight = weight.index_add(0, batch.anchor_of.flatten(), real.flatten().to(weight.dtype))
        with self._given(Anchors(batch.anchor_index, batch.anchor_of, real, weight), record=True):
            yield

    def recorded_gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(safety, helpfulness, mask) of the newest pass within ``anchored``, with their graph: arguments of ``gate_prior``.

        Scope ``token``: gates [L, R, T], mask [R, T]. Scope ``last``: gates [L, G], one a decision, and the mask [G] counts the
        real tokens that follow each, so that the mean is over real tokens. Read once: the pass is then forgotten.
        """
        state, self._context.last = self._context.last, None
        if state is None or state.anchors is None:
            raise RuntimeError("no recorded pass: run the model within anchored(batch) first")
        gates = torch.stack([state.gates[layer] for layer in sorted(state.gates)])
        mask = state.anchors.real if self.router.scope == "token" else state.anchors.weight
        return gates[..., 0], gates[..., 1], mask

    def routing(self, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        """The decision for each prompt: the gate at its last token, mean over layers, for each expert."""
        return [
            {name: float(row[name][:, -1].mean()) for name in EXPERTS}
            for row in self.gates(prompts)
        ]

    @torch.no_grad()
    def gates(
        self, prompts: Sequence[Prompt], responses: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Every layer's gates at every token, for reports.

        Returns:
            For each prompt ``tokens`` (ids, prompt then response), ``prompt_tokens`` (how many are the prompt's), ``safety`` and
            ``helpfulness`` [L, tokens] float32 on the CPU. With scope ``last`` a row's columns are alike.
        """
        texts = self.tokenization
        heads = [texts.prompt_ids(messages(prompt)) for prompt in prompts]
        tails = [
            texts.response_ids(text, texts.max_length)[0] for text in responses or [""] * len(heads)
        ]
        tails = tails if responses else [[] for _ in heads]
        rows: list[dict[str, Any]] = [{} for _ in heads]
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]) + len(tails[i]))
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            documents = [[*heads[i], *tails[i]] for i in chosen]
            length = max(map(len, documents))
            ids = torch.tensor(
                [d + [0] * (length - len(d)) for d in documents], device=self.device
            )  # causal: padding is not seen
            mask = torch.tensor(
                [[1] * len(d) + [0] * (length - len(d)) for d in documents], device=self.device
            )
            lengths = torch.tensor([len(heads[i]) for i in chosen])
            with self._given(
                row_anchors((len(chosen), length), mask, self.device, lengths=lengths), record=True
            ):
                self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
            safety, helpfulness, _ = (x.float().cpu() for x in self.recorded_gates())
            for row, i in enumerate(chosen):
                shape = (len(safety), len(documents[row]))
                values = (
                    x[:, row, : shape[1]] if x.dim() == 3 else x[:, row, None].expand(shape)
                    for x in (safety, helpfulness)
                )
                rows[i] = {
                    "tokens": documents[row],
                    "prompt_tokens": len(heads[i]),
                    **dict(zip(EXPERTS, values, strict=True)),
                }
        return rows

    @cached_property
    def tokenization(self) -> Tokenization:
        """How prompts become tokens: as in training, but whole, up to the model's context."""
        from ..data.tokens import Tokenization

        if self.tokenizer is None:
            raise UserError("this routed model has no tokenizer: give one to route()")
        length = self.config.max_position_embeddings
        whole = {"max_length": 2 * length, "max_prompt_length": length, "long_prompts": "truncate"}
        return Tokenization(self.tokenizer, self.data.model_copy(update=whole))

    @contextmanager
    def _given(self, anchors: Anchors, *, record: bool) -> Iterator[None]:
        context = self._context
        before = context.anchors, context.record
        context.anchors, context.record = anchors, record
        try:
            yield
        finally:
            context.anchors, context.record = before

    # --- what trains ----------------------------------------------------------------------------------------------------

    def gate_state(self) -> dict[str, Tensor]:
        """The gates' parameters by the names that this module has for them, detached: all that trains."""
        return {
            f"model.{path}.gate.{name}": parameter.detach()
            for path, layer in self.layers.items()
            for name, parameter in layer.gate.named_parameters()
        }

    @torch.no_grad()
    def load_gate_state(self, state: Mapping[str, Tensor], where: str = "gate state") -> None:
        own = self.gate_state()
        wrong = sorted(own.keys() ^ state.keys()) or [
            k for k in own if own[k].shape != state[k].shape
        ]
        if wrong:
            raise UserError(
                f"{where}: tensor {wrong[0]} does not fit a {self.router.gate} gate of this model, {len(own)} tensors"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def fold(self) -> RoutedCausalLM:
        """Serve by folded gates, in place (``mlp`` gates stay); they no longer train."""
        for layer in self.layers.values():
            layer.fold()
        return self


def template_data(settings: Mapping[str, Any]) -> Data:
    """The template part of a recipe's data section, without its sets."""
    return Data.model_validate({"sets": [{"path": "none"}], **settings})


def messages(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """A text, chat messages or (role, content) pairs as (role, content) pairs."""
    if isinstance(prompt, str):
        return (("user", prompt),)
    return tuple(
        (m["role"], m["content"]) if isinstance(m, Mapping) else (m[0], m[1]) for m in prompt
    )
