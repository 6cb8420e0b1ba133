"""Log-probabilities of responses, at the cost of their tokens alone.

R rows, T tokens of a row, N response tokens of a batch, S responses, V vocabulary, D hidden.

The decoder runs once over the rows; the projection to the vocabulary runs at the N positions that predict a response's token, in
chunks, and is fused with the softmax: no [R, T, V], and no [N, V], ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batching import TokenBatch
from ..errors import UserError
from .decoder import TreeDecoder

CHUNK = 1 << 23  # logits that exist at once
# What a model may do to its logits that LogProbHead does not know, by the name of its setting
UNKNOWN = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class ResponseLogProbs(TreeDecoder):
    """TokenBatch -> [S] float32: the log-probability of each response in nats, summed over its tokens.

    Args:
        model: a Hugging Face causal LM, or a PEFT or routed model of one. Its head is replaced by a ``LogProbHead`` of the same
            parameters, and SDPA on a CPU by ``attention``; the model's own forward and ``generate`` go on as before.

    Raises:
        UserError: the model scales its logits in a way, or has attention layers of a kind, that is not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        causal = self._model
        config = causal.config.get_text_config()
        for key in UNKNOWN:
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise UserError(
                    f"model {causal.name_or_path}: it scales its logits by {key}, which is not supported"
                )
        head = causal.get_output_embeddings()
        if not isinstance(head, LogProbHead):
            if type(head) is not nn.Linear:
                raise UserError(
                    f"model {causal.name_or_path}: its head is a {type(head).__name__}, a plain Linear is expected; leave it "
                    "out of lora.target_modules"
                )
            head = LogProbHead(head, getattr(config, "final_logit_softcapping", None))
            causal.set_output_embeddings(head)

    def forward(self, batch: TokenBatch) -> Tensor:
        hidden = self.hidden(batch).index_select(0, batch.predict_index)  # [N, D]
        log_probabilities = self._model.get_output_embeddings()(hidden, batch.labels)
        return log_probabilities.new_zeros(batch.responses).index_add(
            0, batch.owner, log_probabilities
        )


class LogProbHead(nn.Linear):
    """A causal LM's head that also gives log-probabilities: ``forward(hidden, labels)`` is [N] float32.

    The weight is read in this module's own forward only, so ZeRO-3 gathers it there and need not for the backward pass.

    Args:
        head: the Linear whose parameters this one shares.
        softcap: bound of the logits, softcap * tanh(logits / softcap), applied with labels only (the model does it itself).
    """

    def __init__(self, head: nn.Linear, softcap: float | None = None) -> None:
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight, self.bias, self.softcap = head.weight, head.bias, softcap
        self.train(head.training)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        size = max(1, CHUNK // self.out_features)
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        if not (torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)):
            return torch.cat([self._log_probabilities(*chunk) for chunk in chunks])
        if self.weight.requires_grad:
            return torch.cat(
                [
                    checkpoint(self._log_probabilities, *chunk, use_reentrant=False)
                    for chunk in chunks
                ]
            )
        return _FrozenHead.apply(hidden, labels, self.weight, self.bias, self.softcap, size)

    def _log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _capped(super().forward(hidden).float(), self.softcap)
        return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _FrozenHead(torch.autograd.Function):
    """log softmax(W h + b)[label], [N], and its gradient by h, made in the same pass: W[label] - softmax @ W, [N, D].

    The backward pass only multiplies that by the upstream [N], so no chunk of logits is kept or made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        size: int,
    ) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for at in range(0, len(hidden), size):
            h, label = hidden[at : at + size], labels[at : at + size, None]
            logits = _capped(F.linear(h, weight, bias).float(), softcap)
            picked = logits.gather(1, label)
            top = logits.amax(1, keepdim=True)
            slope = None if softcap is None else 1.0 - (logits / softcap) ** 2  # of the soft cap
            exponential = (logits - top if softcap is not None else logits.sub_(top)).exp_()
            total = exponential.sum(1, keepdim=True)
            result[at : at + size] = (picked - top - total.log()).squeeze(1)
            expected = exponential if slope is None else exponential * slope
            by_label = weight[label.squeeze(1)].float()
            if slope is not None:
                by_label *= slope.gather(1, label)
            gradient[at : at + size] = (
                by_label - (expected.to(weight.dtype) @ weight).float() / total
            )
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None, None, None, None
