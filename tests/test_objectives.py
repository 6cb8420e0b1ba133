"""Every function of the objectives against a float64 oracle in plain Python, and identities that hold exactly."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from midpo_ray.objectives import (
    balance_weights,
    bradley_terry_loss,
    cost_loss,
    gate_prior,
    gradient_scale,
    homogeneous_margin,
    modpo_margin,
    pointwise_mutual_information,
    preference_loss,
    risk_prior,
)

B = 64


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def numbers(seed: int, low: float, high: float, count: int = B) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(low, high) for _ in range(count)]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOGPS = [
    numbers(seed, -200.0, -1.0) for seed in range(4)
]  # policy chosen, rejected, reference chosen, rejected
MARGIN, SCALE = numbers(5, -1.0, 4.0), numbers(6, 0.1, 1.4)
WEIGHTS = (numbers(7, 0.0, 2.0), numbers(8, 0.0, 2.0))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize(
    "weights", [None, WEIGHTS, (2.5, 2.5)], ids=["unweighted", "weights", "factor"]
)
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_preference_loss(beta, scale, weights, margin, smoothing):
    expected = []
    for b, (pc, pr, rc, rr) in enumerate(zip(*LOGPS, strict=True)):
        wc, wr = (
            (1.0, 1.0)
            if weights is None
            else (w if isinstance(w, float) else w[b] for w in weights)
        )
        h = beta * (wc * (pc - rc) - wr * (pr - rr)) - (margin[b] if margin else 0.0)
        loss = (1 - smoothing) * softplus(-h) + smoothing * softplus(h)
        expected.append(loss * (scale[b] if scale else 1.0))
    got = preference_loss(
        *map(tensor, LOGPS),
        beta=beta,
        margin=tensor(margin) if margin else None,
        weights=None
        if weights is None
        else tuple(w if isinstance(w, float) else tensor(w) for w in weights),
        scale=tensor(scale) if scale else None,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(got, tensor(expected), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_margin_unit_weights_and_unit_scale_are_dpo_to_the_last_bit(dtype):
    logps = [tensor(x).to(dtype) for x in LOGPS]
    dpo = preference_loss(*logps, beta=0.1)
    one = torch.ones(B, dtype=dtype)
    margin = 0.0 * homogeneous_margin(tensor(numbers(1, -5, 5)), tensor(numbers(2, -5, 5))).to(
        dtype
    )  # lambda = 0
    assert torch.equal(dpo, preference_loss(*logps, beta=0.1, margin=margin))
    assert torch.equal(
        dpo, preference_loss(*logps, beta=0.1, margin=margin, weights=(one, one), scale=one)
    )


def test_extreme_log_ratios_stay_finite():
    far, zero = torch.tensor([-1e6, 1e6], requires_grad=True), torch.zeros(2)
    loss = preference_loss(far, zero, zero, zero, beta=1.0)
    assert loss.tolist() == [1e6, 0.0]
    loss.sum().backward()
    assert far.grad.tolist() == [-1.0, 0.0]


def test_gradient_of_preference_loss_by_finite_differences():
    inputs = [tensor(x[:6]).div(50.0).requires_grad_() for x in LOGPS[:2]]
    fixed = [tensor(x[:6]).div(50.0) for x in LOGPS[2:]]
    keys = {
        "margin": tensor(MARGIN[:6]),
        "weights": tuple(tensor(w[:6]) for w in WEIGHTS),
        "scale": tensor(SCALE[:6]),
    }

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(chosen, rejected, *fixed, beta=0.7, label_smoothing=0.1, **keys)

    assert torch.autograd.gradcheck(loss, inputs)


def test_homogeneous_margin():
    chosen, rejected = numbers(1, -5.0, 5.0), numbers(2, -5.0, 5.0)
    reward = tensor([max(0.0, c - r) for c, r in zip(chosen, rejected, strict=True)])
    cost = tensor([max(0.0, r - c) for c, r in zip(chosen, rejected, strict=True)])
    torch.testing.assert_close(
        homogeneous_margin(tensor(chosen), tensor(rejected)), reward, **EXACT
    )
    torch.testing.assert_close(
        homogeneous_margin(tensor(chosen), tensor(rejected), lower_is_better=True), cost, **EXACT
    )
    assert (reward > 0).any()
    assert (reward == 0).any()  # pairs on which the scorer disagrees with the label


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_modpo_margin(weight):
    chosen, rejected = numbers(1, -5.0, 5.0), numbers(2, -5.0, 5.0)
    factor, margin = modpo_margin(tensor(chosen), tensor(rejected), weight=weight)
    assert factor == pytest.approx(1 / weight)
    expected = [(1 - weight) / weight * (c - r) for c, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(margin, tensor(expected), **EXACT)
    if weight < 1:
        assert (margin < 0).any()  # signed: not clamped


def test_modpo_with_the_whole_weight_is_dpo_to_the_last_bit():
    logps = [tensor(x).float() for x in LOGPS]
    factor, margin = modpo_margin(tensor(MARGIN).float(), tensor(SCALE).float(), weight=1.0)
    assert torch.equal(
        preference_loss(*logps, beta=0.1),
        preference_loss(*logps, beta=0.1, margin=margin, weights=(factor, factor)),
    )


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5])
def test_modpo_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="weight"):
        modpo_margin(torch.zeros(1), torch.zeros(1), weight=weight)


def test_pointwise_mutual_information():
    conditional, unconditional, length = (
        numbers(1, -90.0, -1.0),
        numbers(2, -90.0, -1.0),
        [float(1 + i % 7) for i in range(B)],
    )
    total = [c - u for c, u in zip(conditional, unconditional, strict=True)]
    got = pointwise_mutual_information(tensor(conditional), tensor(unconditional))
    torch.testing.assert_close(got, tensor(total), **EXACT)
    got = pointwise_mutual_information(tensor(conditional), tensor(unconditional), tensor(length))
    torch.testing.assert_close(
        got, tensor([t / n for t, n in zip(total, length, strict=True)]), **EXACT
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_balance_weights(temperature):
    chosen, rejected = numbers(1, -3.0, 3.0), numbers(2, -3.0, 3.0)
    expected = [2 * sigmoid((r - c) / temperature) for c, r in zip(chosen, rejected, strict=True)]
    w_chosen, w_rejected = balance_weights(
        tensor(chosen), tensor(rejected), temperature=temperature
    )
    torch.testing.assert_close(w_chosen, tensor(expected), **EXACT)
    torch.testing.assert_close(
        w_chosen + w_rejected, torch.full((B,), 2.0, dtype=torch.float64), **EXACT
    )
    understood = tensor(chosen) > tensor(rejected)
    assert torch.equal(w_chosen < 1, understood)  # the better-understood response is optimised less


def test_weights_tend_to_dpo_with_the_temperature():
    chosen, rejected = tensor(numbers(1, -3.0, 3.0)), tensor(numbers(2, -3.0, 3.0))
    reference = [tensor(x) for x in LOGPS[2:]]
    logps = [
        *(r + tensor(numbers(3 + i, -10.0, 10.0)) for i, r in enumerate(reference)),
        *reference,
    ]
    dpo = preference_loss(*logps, beta=0.1)
    warm = balance_weights(chosen, rejected, temperature=1e6)
    loss = preference_loss(
        *logps, beta=0.1, weights=warm, scale=gradient_scale(*warm, rule="gradient_norm")
    )
    torch.testing.assert_close(loss, dpo, rtol=1e-5, atol=1e-5)
    hot = balance_weights(chosen.float(), rejected.float(), temperature=math.inf)
    assert torch.equal(hot[0], torch.ones(B))
    assert torch.equal(hot[1], torch.ones(B))
    for rule in ("none", "gradient_norm", "imbalance"):
        assert torch.equal(gradient_scale(*hot, rule=rule), torch.ones(B))


def test_weights_and_scale_carry_no_gradient():
    information = torch.ones(3, requires_grad=True)
    weights = balance_weights(information, -information, temperature=1.0)
    assert not weights[0].requires_grad
    assert not gradient_scale(
        torch.ones(3, requires_grad=True), torch.ones(3), rule="imbalance"
    ).requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature"):
        balance_weights(torch.zeros(1), torch.zeros(1), temperature=temperature)


def test_gradient_scale():
    w_chosen, w_rejected = balance_weights(
        tensor(numbers(1, -3.0, 3.0)), tensor(numbers(2, -3.0, 3.0)), temperature=0.5
    )
    pairs = list(zip(w_chosen.tolist(), w_rejected.tolist(), strict=True))
    assert torch.equal(
        gradient_scale(w_chosen, w_rejected, rule="none"), torch.ones(B, dtype=torch.float64)
    )
    norm = gradient_scale(w_chosen, w_rejected, rule="gradient_norm")
    torch.testing.assert_close(
        norm, tensor([math.sqrt(2 / (c * c + r * r)) for c, r in pairs]), **EXACT
    )
    torch.testing.assert_close(
        (norm * w_chosen) ** 2 + (norm * w_rejected) ** 2, torch.full_like(norm, 2.0), **EXACT
    )
    imbalance = gradient_scale(w_chosen, w_rejected, rule="imbalance")
    torch.testing.assert_close(imbalance, tensor([min(p) / max(p) for p in pairs]), **EXACT)
    with pytest.raises(ValueError, match="gradient_norm"):
        gradient_scale(w_chosen, w_rejected, rule="norm")


def test_gradient_norm_keeps_the_norm_of_dpo_s_gradient():
    """At policy = reference the gradient on the two log-probabilities has the norm that it has in DPO."""
    weights = balance_weights(
        tensor(numbers(1, -3.0, 3.0)), tensor(numbers(2, -3.0, 3.0)), temperature=0.5
    )

    def norm(**keys) -> Tensor:
        logps = [tensor(x).requires_grad_() for x in LOGPS[:2]]
        preference_loss(*logps, *(x.detach() for x in logps), beta=0.1, **keys).sum().backward()
        return torch.stack([x.grad for x in logps]).norm(dim=0)

    torch.testing.assert_close(
        norm(weights=weights, scale=gradient_scale(*weights, rule="gradient_norm")), norm(), **EXACT
    )


def test_gate_prior():
    L, R, T = 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    safety, helpfulness = (
        torch.rand(L, R, T, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask = torch.rand(R, T, generator=generator) < 0.6
    terms = [
        abs(float(safety[layer, r, t])) + abs(1 - float(helpfulness[layer, r, t]))
        for layer in range(L)
        for r in range(R)
        for t in range(T)
        if mask[r, t]
    ]
    torch.testing.assert_close(
        gate_prior(safety, helpfulness, mask), tensor([sum(terms) / len(terms)])[0], **EXACT
    )
    padded = torch.where(mask, safety, torch.tensor(9.0, dtype=torch.float64))
    assert torch.equal(
        gate_prior(padded, helpfulness, mask), gate_prior(safety, helpfulness, mask)
    )  # padding does not count
    assert gate_prior(safety, helpfulness, torch.zeros(R, T)) == 0.0


@pytest.mark.parametrize("shape", [(4, 5), (6,)])
def test_risk_prior(shape):
    """Against a scalar loop in float64; positions that are padding or of unknown risk do not count."""
    generator = torch.Generator().manual_seed(1)
    safety, helpfulness = (
        torch.rand(3, *shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask = torch.randint(0, 4, shape, generator=generator)  # weights, as of decisions
    risk = torch.tensor([0.0, 1.0, math.nan])[torch.randint(0, 3, shape, generator=generator)]
    total = count = 0.0
    for layer in range(3):
        gates_s, gates_h = safety[layer].flatten(), helpfulness[layer].flatten()
        positions = zip(gates_s, gates_h, risk.flatten(), mask.flatten(), strict=True)
        for g_s, g_h, r, weight in [[float(v) for v in row] for row in positions]:
            if math.isnan(r):
                continue
            wanted = [g_s, 1 - g_h] if r == 1 else [1 - g_s, g_h]
            total -= weight * sum(math.log(p) for p in wanted)
            count += weight
    assert float(risk_prior(safety, helpfulness, risk, mask)) == pytest.approx(
        total / count, rel=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda s, h: risk_prior(s, h, risk, mask),
        (safety.requires_grad_(), helpfulness.requires_grad_()),
    )
    nothing = torch.full(shape, math.nan)
    assert float(risk_prior(safety.detach(), helpfulness.detach(), nothing, mask)) == 0.0
    half = torch.full_like(safety, 0.5, requires_grad=False)
    known = torch.ones(shape)
    assert float(risk_prior(half, half, known, known)) == pytest.approx(2 * math.log(2))


SIGNS = tuple(
    [random.Random(seed + b).choice((-1.0, 0.0, 1.0)) for b in range(B)] for seed in (1000, 2000)
)
COSTS = numbers(13, -6.0, 6.0), numbers(14, -6.0, 6.0)


def test_bradley_terry_loss():
    got = bradley_terry_loss(*map(tensor, COSTS))
    torch.testing.assert_close(
        got, tensor([softplus(r - c) for c, r in zip(*COSTS, strict=True)]), **EXACT
    )


def test_cost_loss():
    expected = []
    for safer, other, safer_sign, other_sign in zip(*COSTS, *SIGNS, strict=True):
        terms = [softplus(-s * c) for s, c in ((safer_sign, safer), (other_sign, other)) if s]
        expected.append(softplus(safer - other) + sum(terms))
    got = cost_loss(*map(tensor, COSTS), *map(tensor, SIGNS))
    torch.testing.assert_close(got, tensor(expected), **EXACT)
    nobody = tensor([0.0] * B)
    unsigned = cost_loss(*map(tensor, COSTS), nobody, nobody)
    assert torch.equal(unsigned, bradley_terry_loss(tensor(COSTS[1]), tensor(COSTS[0])))


def test_cost_loss_moves_costs_to_their_side_of_zero():
    costs = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    cost_loss(*costs, tensor([-1.0, 1.0, 0.0]), tensor([1.0, 1.0, 0.0])).sum().backward()
    assert costs.grad is not None
    assert costs.grad.tolist() == [
        [1.0, 0.0, 0.5],
        [-1.0, -1.0, -0.5],
    ]  # a gradient above 0 lowers the cost
