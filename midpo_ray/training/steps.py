"""One micro-batch of each stage: ``step(batch) -> (loss, metrics)``, in plain torch.

B pairs, S = 2B responses, L layers. ``loss`` is the sum over the pairs; the loop divides it by the
pairs of the global batch, so that neither accumulation nor the number of ranks changes a step.
``metrics`` are sums on the device: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..data.batching import TokenBatch
from ..objectives import bradley_terry_loss, cost_loss, gate_prior, preference_loss, risk_prior

if TYPE_CHECKING:
    from ..models.routed import RoutedCausalLM

# [S] nats, summed over each response; an engine or a ResponseLogProbs
Policy = Callable[[TokenBatch], Tensor]
MetricSums = dict[str, Tensor]
PER_TOKEN = ("safety_gate", "helpfulness_gate", "prior")  # sums over tokens; the others over pairs


@dataclass
class StepBatch:
    """A micro-batch.

    Args:
        tokens: the chosen response of pair b is response 2b, the rejected one 2b + 1.
        signals: the table's, each [B]; an expert's: reference_chosen, reference_rejected, ...
        pairs_per_token: pairs of the global batch, divided by its tokens.
        pairs_per_known, pairs_per_known_token: the same pairs, divided by those whose prompt's
            risk is known, and by the tokens of these.
        weight: the factor of the loss; 0 where a rank has no pair of its own and computes one only
            because the collectives need every rank.
        rows: the table's rows of this rank; empty with weight 0.
    """

    tokens: TokenBatch
    signals: Mapping[str, Tensor]
    pairs_per_token: float = 0.0
    pairs_per_known: float = 0.0
    pairs_per_known_token: float = 0.0
    weight: float = 1.0
    rows: list[int] = field(default_factory=list)

    def counted(self, values: MetricSums) -> MetricSums:
        """The sums that this batch adds to the global batch's."""
        if self.weight:
            return values
        return {name: value * 0 for name, value in values.items()}


class TrainStep(Protocol):
    def __call__(self, batch: StepBatch) -> tuple[Tensor, MetricSums]: ...

    def deviation(self, batch: StepBatch) -> Tensor:
        """Compare the loss before the first step with its analytic value.

        Returns:
            [3], sums over the pairs: |loss - analytic value|, the analytic value, and how much the
            loss may change per nat of the policy's outputs.
        """


class ExpertStep:
    """DPO and everything else that ``preference_loss`` covers; the table's signals decide which.

    Args:
        policy: the model's log-probabilities.
        beta: DPO's inverse temperature.
        label_smoothing: probability that a label is wrong.
    """

    def __init__(self, policy: Policy, *, beta: float, label_smoothing: float = 0.0) -> None:
        self.policy, self.beta, self.label_smoothing = policy, beta, label_smoothing

    def __call__(self, batch: StepBatch) -> tuple[Tensor, MetricSums]:
        losses, metrics = preference(
            self.policy(batch.tokens), batch, self.beta, self.label_smoothing
        )
        return losses.sum(), metrics

    def untrained(self) -> AbstractContextManager[None]:
        """Within it the policy is the reference, as long as nothing is trained."""
        return nullcontext()

    def deviation(self, batch: StepBatch) -> Tensor:
        """The analytic value is ln 2 for DPO, softplus(m) for SPE-DPO, s ln 2 for B-DPO."""
        with self.untrained(), torch.no_grad():
            losses, _ = preference(
                self.policy(batch.tokens), batch, self.beta, self.label_smoothing
            )
        zero, signals = torch.zeros_like(losses), batch.signals
        expected = preference_loss(
            zero, zero, zero, zero, beta=self.beta, margin=signals["margin"],
            scale=signals["scale"], label_smoothing=self.label_smoothing,
        )  # fmt: skip
        weights = (signals["weight_chosen"] + signals["weight_rejected"]) / 2
        sensitivity = self.beta * signals["scale"] * weights
        return torch.stack([(losses - expected).abs().sum(), expected.sum(), sensitivity.sum()])


class RouterStep(ExpertStep):
    """The router's: the same on the dual data, plus rho times the gates' prior.

    The prior is the mean over layers and real tokens of the *global* batch (ours): a micro-batch
    adds its own tokens' sum times (pairs / tokens of the global batch), and the loop's division by
    the pairs leaves sum / tokens, however the batch was split. The risk prior is a mean over
    decisions (with scope ``token``: over tokens) of prompts of known risk, in the same way.

    Args:
        prior: rho, the weight.
        kind: "paper" (``gate_prior``), "risk" (``risk_prior``) or "none".
    """

    def __init__(
        self,
        policy: Policy,
        model: RoutedCausalLM,
        *,
        beta: float,
        prior: float,
        kind: str = "paper",
    ) -> None:
        arrange = getattr(getattr(policy, "module", policy), "arrange", None)

        def anchored(tokens: TokenBatch) -> Tensor:
            self.tokens = arrange(tokens) if arrange else tokens
            with model.anchored(self.tokens) as self.recorded:
                return policy(self.tokens)

        super().__init__(anchored, beta=beta)
        self.model, self.prior, self.kind = model, prior, kind

    def __call__(self, batch: StepBatch) -> tuple[Tensor, MetricSums]:
        loss, metrics = super().__call__(batch)
        safety, helpfulness, mask = self.recorded.gates()
        tokens = metrics["tokens"]
        with torch.no_grad():
            weight = mask.to(safety.dtype).expand_as(safety)
            share = tokens / weight.sum()
            metrics["safety_gate"], metrics["helpfulness_gate"] = (
                (safety * weight).sum() * share,
                (helpfulness * weight).sum() * share,
            )
        if self.kind == "risk":
            term = self._risk_term(batch, safety, helpfulness)
            metrics["risk_prior"] = term.detach()
            return loss + self.prior * term, metrics
        prior = gate_prior(safety, helpfulness, mask) * tokens
        metrics["prior"] = prior.detach()
        weight_of_prior = self.prior if self.kind == "paper" else 0.0
        return loss + weight_of_prior * batch.pairs_per_token * prior, metrics

    def _risk_term(self, batch: StepBatch, safety: Tensor, helpfulness: Tensor) -> Tensor:
        """The micro-batch's part of the risk prior, times the pairs of the global batch."""
        documents = self.tokens.document_ids
        risk = batch.signals["risk"]
        risk = risk.masked_fill(risk < 0, torch.nan)  # [B]
        if self.recorded.scope == "token":
            mask = (documents >= 0).to(risk.dtype)  # [R, T]
            places, scale = documents.clamp_min(0), batch.pairs_per_known_token
        else:
            places = documents.flatten()[self.tokens.anchor_index]  # [G] the pair of each decision
            mask = 1.0 / torch.bincount(places, minlength=len(risk))[places]
            scale = batch.pairs_per_known
        risk = risk[places]
        known = (mask * ~risk.isnan()).sum()
        return risk_prior(safety, helpfulness, risk, mask) * known * scale

    def untrained(self) -> AbstractContextManager[None]:
        return self.model.force_gates(0.0, 0.0)


class ScoreStep:
    """A reward or a cost model's step: the chosen response is the better one, or the safer one.

    Args:
        policy: [S] scores, zero as long as nothing is trained.
        kind: "reward" (higher is better) or "cost" (lower is safer, with a sign term).
    """

    def __init__(self, policy: Policy, kind: str) -> None:
        self.policy, self.kind = policy, kind

    def __call__(self, batch: StepBatch) -> tuple[Tensor, MetricSums]:
        scores = self.policy(batch.tokens)
        chosen, rejected = scores[0::2], scores[1::2]
        losses = self._losses(chosen, rejected, batch)
        with torch.no_grad():
            margin = chosen - rejected if self.kind == "reward" else rejected - chosen
            metrics = {
                "loss": losses.sum(),
                "accuracy": (margin > 0).sum(),
                "reward_margin": margin.sum(),
                "score_chosen": chosen.sum(),
                "score_rejected": rejected.sum(),
                **_counts(batch, len(losses)),
            }
        return losses.sum(), metrics

    def deviation(self, batch: StepBatch) -> Tensor:
        """Known are ln 2 for the order, and ln 2 for each sign."""
        with torch.no_grad():
            scores = self.policy(batch.tokens)
            losses = self._losses(scores[0::2], scores[1::2], batch)
        zero = torch.zeros_like(losses)
        expected = self._losses(zero, zero, batch)
        pairs = torch.full_like(losses.sum(), len(losses))
        return torch.stack([(losses - expected).abs().sum(), expected.sum(), pairs])

    def _losses(self, chosen: Tensor, rejected: Tensor, batch: StepBatch) -> Tensor:
        if self.kind == "reward":
            return bradley_terry_loss(chosen, rejected)
        return cost_loss(
            chosen, rejected, batch.signals["sign_chosen"], batch.signals["sign_rejected"]
        )


def preference(
    log_probabilities: Tensor, batch: StepBatch, beta: float, label_smoothing: float
) -> tuple[Tensor, MetricSums]:
    """(loss of each pair [B], sums over the pairs) from the policy's [S] log-probabilities."""
    signals = batch.signals
    chosen, rejected = log_probabilities[0::2], log_probabilities[1::2]
    weights = (signals["weight_chosen"], signals["weight_rejected"])
    losses = preference_loss(
        chosen, rejected, signals["reference_chosen"], signals["reference_rejected"],
        beta=beta, margin=signals["margin"], weights=weights, scale=signals["scale"],
        label_smoothing=label_smoothing,
    )  # fmt: skip
    with torch.no_grad():
        delta_chosen, delta_rejected = (
            chosen - signals["reference_chosen"],
            rejected - signals["reference_rejected"],
        )
        metrics = {
            "loss": losses.sum(),
            "accuracy": (beta * delta_chosen > beta * delta_rejected).sum(),
            "reward_margin": (beta * (delta_chosen - delta_rejected)).sum(),
            "delta_chosen": delta_chosen.sum(),
            "delta_rejected": delta_rejected.sum(),
            "weight_chosen": weights[0].sum(),
            "weight_rejected": weights[1].sum(),
            "margin": signals["margin"].sum(),
            "scale": signals["scale"].sum(),
            **_counts(batch, len(losses)),
        }
    return losses, metrics


def _counts(batch: StepBatch, pairs: int) -> MetricSums:
    real = (batch.tokens.document_ids >= 0).sum()
    return {
        "pairs": torch.full_like(real, pairs),
        "tokens": real,
        "padding": batch.tokens.document_ids.numel() - real,
    }
