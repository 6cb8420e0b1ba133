"""The maths of alignment for two goals, as pure functions of tensors.

Everything is one loss (B pairs, log-probabilities in nats, summed over a response's tokens):

    delta = log pi_theta(y|x) - log pi_ref(y|x)
    h     = beta (w_w delta_w - w_l delta_l) - m
    L     = s * -log sigmoid(h)                                      [B], the caller averages

| objective | w_w, w_l            | m                          | s                |
|-----------|---------------------|----------------------------|------------------|
| DPO       | 1, 1                | 0                          | 1                |
| SPE-DPO   | 1, 1                | lambda * homogeneous_margin| 1                |
| B-DPO     | balance_weights     | 0                          | gradient_scale   |
| MODPO     | modpo_margin's factor, twice | modpo_margin's margin | 1           |

Score models have losses of their own: bradley_terry_loss and cost_loss.

Sources: DPO, arXiv 2305.18290, eq. 7; MidPO (SPE-DPO), arXiv 2506.02460; B-DPO, arXiv 2603.22829;
MODPO, arXiv 2310.03708; Safe RLHF (score models), arXiv 2310.12773; cDPO's label smoothing, as in
DPO's follow-up note. "(ours)" marks a choice that the papers leave open.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    margin: Tensor | None = None,
    weights: tuple[Tensor | float, Tensor | float] | None = None,
    scale: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair, [B]. DPO (arXiv 2305.18290, eq. 7) where nothing optional is given.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: [B], nats, summed
            over the response.
        beta: DPO's inverse temperature.
        margin: [B], what h must exceed; already multiplied by lambda (MidPO's SPE-DPO, MODPO).
        weights: (w_chosen, w_rejected), each [B] or a number, on the two log-ratios (B-DPO, MODPO).
        scale: [B], factor on each pair's loss (B-DPO).
        label_smoothing: probability that a label is wrong, in [0, 0.5) (cDPO).
    """
    chosen_ratio = policy_chosen - reference_chosen
    rejected_ratio = policy_rejected - reference_rejected
    if weights is not None:
        chosen_ratio, rejected_ratio = weights[0] * chosen_ratio, weights[1] * rejected_ratio
    h = beta * (chosen_ratio - rejected_ratio)
    if margin is not None:
        h = h - margin
    loss = -F.logsigmoid(h)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-h)
    return loss if scale is None else scale * loss


def homogeneous_margin(
    chosen_score: Tensor, rejected_score: Tensor, *, lower_is_better: bool = False
) -> Tensor:
    """SPE-DPO's margin, [B], >= 0: how far its own reward model prefers the chosen response.

    The scores come from the model of the same preference that the pair is labelled for: the
    helpfulness reward, or the safety cost with ``lower_is_better``. Where that model disagrees with
    the label the margin is 0, which is plain DPO (MidPO, arXiv 2506.02460, appendix B.2).
    """
    difference = rejected_score - chosen_score if lower_is_better else chosen_score - rejected_score
    return difference.clamp_min(0.0)


def modpo_margin(
    chosen_score: Tensor, rejected_score: Tensor, *, weight: float
) -> tuple[float, Tensor]:
    """MODPO's (factor on both log-ratios, margin [B]); arXiv 2310.03708, eq. 12.

    ``weight`` k in (0, 1] is the share of the preference that the pairs are labelled for; the
    scores are the *other* objective's reward, higher is better. The margin is signed, and
    subtracted like every margin. k = 1 is DPO.
    """
    if not 0.0 < weight <= 1.0:
        raise ValueError(f"modpo_margin: weight is {weight}, allowed is 0 < weight <= 1")
    return 1.0 / weight, (1.0 - weight) / weight * (chosen_score - rejected_score)


def pointwise_mutual_information(
    conditional_logp: Tensor, unconditional_logp: Tensor, length: Tensor | None = None
) -> Tensor:
    """Pointwise mutual information between prompt and response under the reference, [B].

    B-DPO, arXiv 2603.22829. Nats per token where ``length`` ([B], the response's tokens) is given,
    total nats where it is not (the choice is ours).
    ``unconditional_logp`` scores the same tokens behind an empty prompt.
    """
    information = conditional_logp - unconditional_logp
    return information if length is None else information / length


def balance_weights(
    information_chosen: Tensor, information_rejected: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """B-DPO's (w_chosen, w_rejected), each [B], with the sum 2.

    The response that is understood better is optimised less: 2 softmax(-I/temperature) over the two
    responses (arXiv 2603.22829). An infinite temperature gives (1, 1), that is DPO.
    Constants of the reference model: no gradient flows through them.
    """
    if not temperature > 0.0:
        raise ValueError(f"balance_weights: temperature is {temperature}, allowed is > 0")
    difference = (information_rejected - information_chosen).detach() / temperature
    return 2.0 * torch.sigmoid(difference), 2.0 * torch.sigmoid(-difference)


def gradient_scale(w_chosen: Tensor, w_rejected: Tensor, *, rule: str) -> Tensor:
    """B-DPO's scaling factor s, [B]; the three rules are ours, the paper names the factor only.

    none: 1. gradient_norm: sqrt(2 / (w_c^2 + w_r^2)), so that the coefficients on the two gradients
    keep DPO's l2 norm.
    imbalance: min(w) / max(w), so that the least balanced pairs weigh least.
    """
    w_chosen, w_rejected = w_chosen.detach(), w_rejected.detach()
    if rule == "none":
        return torch.ones_like(w_chosen)
    if rule == "gradient_norm":
        return torch.sqrt(2.0 / (w_chosen**2 + w_rejected**2))
    if rule == "imbalance":
        return torch.minimum(w_chosen, w_rejected) / torch.maximum(w_chosen, w_rejected)
    raise ValueError(
        f"gradient_scale: rule is {rule!r}, allowed are 'none', 'gradient_norm', 'imbalance'"
    )


def bradley_terry_loss(chosen_score: Tensor, rejected_score: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) of each pair, [B]: a reward model's loss.

    Scores [B], higher is better (Safe RLHF, arXiv 2310.12773, eq. 5 to 7).
    """
    return -F.logsigmoid(chosen_score - rejected_score)


def cost_loss(
    safer_cost: Tensor, other_cost: Tensor, safer_sign: Tensor, other_sign: Tensor
) -> Tensor:
    """A cost model's loss of each pair, [B]: Bradley-Terry, and the sign of each cost.

    Safe RLHF, arXiv 2310.12773, eq. 5 to 7.

    Args:
        safer_cost, other_cost: [B], lower is safer.
        safer_sign, other_sign: [B], +1 where the response is unsafe (c > 0 is wanted), -1 where it
            is safe (c < 0), and 0 where it has no label: no term (ours).
    """
    order = bradley_terry_loss(other_cost, safer_cost)
    of_safer, of_other = (
        -F.logsigmoid(safer_sign * safer_cost),
        -F.logsigmoid(other_sign * other_cost),
    )
    return order + safer_sign.abs() * of_safer + other_sign.abs() * of_other


def gate_prior(safety_gate: Tensor, helpfulness_gate: Tensor, mask: Tensor) -> Tensor:
    """Mean over real positions of g_s + 1 - g_h, a scalar (MidPO's |g_s| + |1 - g_h|).

    It means "helpful unless needed otherwise".

    Args:
        safety_gate, helpfulness_gate: gates in (0, 1), of any shape whose trailing dimensions are
            those of the mask, for example [L, R, T].
        mask: 1 where a position is real, 0 where it is padding; broadcast over the leading
            dimensions.
    """
    mask = mask.to(safety_gate.dtype).expand_as(safety_gate)
    return ((safety_gate + 1.0 - helpfulness_gate) * mask).sum() / mask.sum().clamp_min(1.0)


def risk_prior(safety_gate: Tensor, helpfulness_gate: Tensor, risk: Tensor, mask: Tensor) -> Tensor:
    """Mean over real positions of known risk of BCE(g_s, r) + BCE(g_h, 1 - r), a scalar (ours).

    It names the wanted expert prompt by prompt, where ``gate_prior`` is the same for every prompt.
    BCE(g, y) is -y log g - (1 - y) log(1 - g).

    Args:
        safety_gate, helpfulness_gate: gates in (0, 1), of any shape whose trailing dimensions are
            those of risk and mask, for example [L, R, T] or [L, G].
        risk: of each position's prompt: 1 where a response to it is unsafe, 0 where all that are
            known are safe, NaN where nothing is known; such positions have no term.
        mask: the weight of each position: 0 at padding, 1 or a number of tokens elsewhere.
    """
    weight = (mask * ~risk.isnan()).to(safety_gate.dtype).expand_as(safety_gate)
    target = risk.nan_to_num().to(safety_gate.dtype).expand_as(safety_gate)
    terms = F.binary_cross_entropy(safety_gate, target, reduction="none")
    terms = terms + F.binary_cross_entropy(helpfulness_gate, 1.0 - target, reduction="none")
    return (terms * weight).sum() / weight.sum().clamp_min(1.0)
