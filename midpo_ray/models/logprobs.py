"""Log-probabilities of responses, at the cost of their tokens alone.

R rows, T tokens of a row, N response tokens of a batch, S responses, V vocabulary, D hidden.

The decoder runs once over the rows. The projection to the vocabulary runs at the N positions that
predict a response's token, in chunks, and is fused with the softmax: no [R, T, V], and no [N, V],
ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batching import TokenBatch
from ..errors import UserError
from .decoder import TreeDecoder, hugging_face_model

CHUNK = 1 << 23  # logits that exist at once
# Numbers by which families scale their logits: some multiply, some divide by the same name.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "softcap")


class ResponseLogProbs(TreeDecoder):
    """TokenBatch -> [S] float32: the log-probability of each response, in nats.

    Args:
        model: a Hugging Face causal LM, or a PEFT or routed model of one. Its head is replaced by a
            ``LogProbHead`` of the same parameters; the model's own forward and ``generate`` stay as
            they are.

    Raises:
        UserError: the head is not a plain Linear, or the model fails the self-check.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = hugging_face_model(model)
        head = inner.get_output_embeddings()
        if not isinstance(head, LogProbHead):
            if type(head) is not nn.Linear:
                raise UserError(
                    f"model {inner.name_or_path} ({type(inner).__name__}): its head is of type "
                    f"{type(head).__name__}, a plain Linear is expected; leave it out of "
                    "lora.target_modules"
                )
            config = inner.config.get_text_config()
            head = LogProbHead(head, _scale(config), _soft_cap(config))
            inner.set_output_embeddings(head)
        super().__init__(model)

    def forward(self, batch: TokenBatch) -> Tensor:
        batch = self.arrange(batch)
        values = self._token_values(batch)
        return values.new_zeros(batch.responses).index_add(0, batch.owner, values)

    def values(self, batch: TokenBatch) -> Tensor:
        """[N]: the log-probability of each response token, in nats."""
        return self._token_values(self.arrange(batch))

    def _token_values(self, batch: TokenBatch) -> Tensor:
        hidden = self.hidden(batch).index_select(0, batch.predict_index)  # [N, D]
        return self._model.get_output_embeddings()(hidden, batch.labels)

    def reference(self, document: list[int]) -> Tensor:
        """[T, V]: the model's own logits of one row."""
        ids = torch.tensor([document], device=self._model.device)
        return self._model(input_ids=ids, use_cache=False).logits[0]

    def compared(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def prove(model: Any) -> None:
    """Choose how a Hugging Face causal LM is read, before its modules are wrapped.

    Raises:
        UserError: as ``ResponseLogProbs``.
    """
    head, own = model.get_output_embeddings(), model.config.get_text_config()._attn_implementation
    ResponseLogProbs(model)
    model.set_output_embeddings(head)
    if model.config.get_text_config()._attn_implementation != own:
        model.set_attn_implementation(own)


class LogProbHead(nn.Linear):
    """A causal LM's head; ``forward(hidden, labels)`` gives log-probabilities, [N] float32.

    The weight is read in this module's own forward only, so that ZeRO-3 gathers it there and need
    not for the backward pass. Scale and soft cap apply with labels only; the model does them itself
    else.

    Args:
        head: the Linear whose parameters this one shares.
        scale: factor of the logits.
        soft_cap: bound of the logits, soft_cap * tanh(logits / soft_cap).
    """

    def __init__(self, head: nn.Linear, scale: float = 1.0, soft_cap: float | None = None) -> None:
        bias = head.bias is not None
        super().__init__(head.in_features, head.out_features, bias=bias, device="meta")
        self.weight, self.bias, self.scale, self.soft_cap = head.weight, head.bias, scale, soft_cap
        self.train(head.training)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        size = max(1, CHUNK // self.out_features)
        chunks = list(zip(hidden.split(size), labels.split(size), strict=True))
        trains = hidden.requires_grad or self.weight.requires_grad
        if not (torch.is_grad_enabled() and trains):
            return torch.cat([self._log_probabilities(*chunk) for chunk in chunks])
        plain = self.scale == 1.0 and self.soft_cap is None and not self.weight.requires_grad
        if plain:
            return _FrozenHead.apply(hidden, labels, self.weight, self.bias, size)
        parts = [checkpoint(self._log_probabilities, *c, use_reentrant=False) for c in chunks]
        return torch.cat(parts)

    def _log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = super().forward(hidden).float() * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1)


def _scale(config: Any) -> float:
    """The factor that a configuration applies to the logits."""
    scale = 1.0
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            divides = name == "logits_scaling" and config.model_type != "hyperclovax"
            scale *= 1.0 / value if divides else value
    return scale


def _soft_cap(config: Any) -> float | None:
    return next((getattr(config, n) for n in _SOFT_CAPS if getattr(config, n, None)), None)


class _FrozenHead(torch.autograd.Function):
    """log softmax(W h + b)[label], [N], and its gradient by h, made in the same pass, [N, D].

    The gradient is W[label] - softmax @ W. The backward pass only multiplies it by the upstream
    [N], so that no chunk of logits is kept or made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, size: int
    ) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            label = labels[part, None]
            logits = F.linear(hidden[part], weight, bias).float()
            picked = logits.gather(1, label)
            top = logits.amax(1, keepdim=True)
            exponential = logits.sub_(top).exp_()
            total = exponential.sum(1, keepdim=True)
            result[part] = (picked - top - total.log()).squeeze(1)
            expected = (exponential.to(weight.dtype) @ weight).float() / total
            gradient[part] = weight[label.squeeze(1)].float() - expected
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None, None, None
