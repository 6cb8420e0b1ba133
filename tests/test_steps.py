"""A step's loss and metrics: against plain arithmetic, and the same however the batch is laid out, ordered or split."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from training_world import expert, rows, table

from midpo_ray.data.batching import collate
from midpo_ray.training.schedule import allowed_deviation
from midpo_ray.training.steps import ExpertStep, RouterStep, StepBatch
from midpo_ray.training.table import SIGNALS, RouterTable, StageTable

SIGNALLED = {
    "margin": [0.1 * i for i in range(30)],
    "weight_chosen": [0.5 + 0.05 * i for i in range(30)],
    "weight_rejected": [1.5 - 0.05 * i for i in range(30)],
    "scale": [0.5 + 0.01 * i for i in range(30)],
}


def batch_of(
    data: StageTable, indices: list[int], layout: str = "tree", pairs_per_token: float = 0.0
) -> StepBatch:
    return StepBatch(
        collate(data.documents(indices), layout), data.signals(indices), pairs_per_token
    )


def trained() -> tuple[torch.nn.Module, list[Tensor]]:
    """An expert away from its reference, and its trained parameters."""
    policy = expert()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    torch.manual_seed(2)
    for parameter in parameters:
        torch.nn.init.normal_(parameter.data, std=0.3)
    return policy, parameters


def test_loss_and_metrics_are_the_sums_over_the_pairs():
    data, indices, beta = table(**SIGNALLED), [3, 0, 7], 0.5
    policy, _ = trained()
    loss, metrics = ExpertStep(policy, beta=beta, label_smoothing=0.1)(batch_of(data, indices))
    expected = dict.fromkeys(metrics, 0.0)
    for i in indices:
        chosen, rejected = policy(collate(data.documents([i]), "padded")).tolist()
        row = {name: float(value[0]) for name, value in data.signals([i]).items()}
        delta_chosen, delta_rejected = (
            chosen - row["reference_chosen"],
            rejected - row["reference_rejected"],
        )
        h = (
            beta * (row["weight_chosen"] * delta_chosen - row["weight_rejected"] * delta_rejected)
            - row["margin"]
        )
        values = {
            "loss": row["scale"] * (0.9 * math.log1p(math.exp(-h)) + 0.1 * math.log1p(math.exp(h))),
            "accuracy": float(delta_chosen > delta_rejected),
            "reward_margin": beta * (delta_chosen - delta_rejected),
            "delta_chosen": delta_chosen,
            "delta_rejected": delta_rejected,
            **{name: row[name] for name in ("weight_chosen", "weight_rejected", "margin", "scale")},
            "pairs": 1,
            "tokens": data.lengths("tree")[i],
        }
        for name, value in values.items():
            expected[name] += value
    longest = max(data.lengths("tree")[i] for i in indices)
    expected["padding"] = 3 * longest - expected["tokens"]
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert loss.item() == metrics["loss"].item()
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_lengths_are_the_real_tokens_of_a_batch(layout):
    data = table()
    indices = [1, 5, 2]
    batch = collate(data.documents(indices), layout)
    assert int((batch.document_ids >= 0).sum()) == sum(data.lengths(layout)[i] for i in indices)


def gradients(split: list[list[int]], layout: str = "tree") -> list[Tensor]:
    data = table(**SIGNALLED)
    policy, parameters = trained()
    for indices in split:
        ExpertStep(policy, beta=0.5)(batch_of(data, indices, layout))[0].backward()
    return [p.grad for p in parameters]


@pytest.mark.parametrize(
    ("split", "layout"),
    [
        ([[0, 1, 2, 3]], "padded"),
        ([[0, 1, 2, 3]], "packed"),
        ([[3, 1, 0, 2]], "tree"),
        ([[2], [0, 3], [1]], "tree"),
    ],
    ids=["padding", "packing", "order", "accumulation"],
)
def test_gradient_does_not_depend_on_layout_order_or_split(split, layout):
    torch.testing.assert_close(
        gradients(split, layout), gradients([[0, 1, 2, 3]]), rtol=1e-4, atol=1e-6
    )


def test_the_untrained_policy_has_the_analytic_loss():
    data, indices = table(**SIGNALLED), list(range(8))
    step = ExpertStep(expert(), beta=0.5, label_smoothing=0.1)
    deviation, expected, _ = step.deviation(batch_of(data, indices)).tolist()
    signals = [(SIGNALLED["margin"][i], SIGNALLED["scale"][i]) for i in indices]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert expected == pytest.approx(
        sum(s * (0.9 * softplus(m) + 0.1 * softplus(-m)) for m, s in signals), rel=1e-5
    )
    assert deviation < 1e-3
    wrong = table(**SIGNALLED, reference_chosen=[-3.0] * 30)
    assert float(step.deviation(batch_of(wrong, indices))[0]) > 1.0


@pytest.mark.parametrize("k", [1.0, 0.1])
def test_the_tolerance_before_training_takes_the_pair_weights_into_account(k):
    """MODPO divides its log-ratios by k: bfloat16's noise in them counts 1 / k times."""
    beta, half_a_nat = 0.1, 0.4
    data = table(weight_chosen=[1 / k] * 30, weight_rejected=[1 / k] * 30)
    exact, given = expert(), batch_of(data, range(8))

    def noisy(tokens):
        values = exact(tokens)
        values[0::2] += half_a_nat
        return values

    step = ExpertStep(noisy, beta=beta)
    deviation, _, sensitivity = (step.deviation(given) / 8).tolist()
    assert sensitivity == pytest.approx(beta / k)
    assert deviation == pytest.approx(
        math.log(2) - math.log1p(math.exp(-beta / k * half_a_nat)), rel=1e-4
    )
    assert deviation < allowed_deviation("bfloat16", sensitivity)
    assert (deviation > allowed_deviation("bfloat16", beta)) == (k == 0.1)  # without the weights
    wrong = ExpertStep(lambda tokens: exact(tokens) + torch.tensor([0.0, 3.0] * 8), beta=beta)
    deviation, _, sensitivity = (wrong.deviation(given) / 8).tolist()
    assert deviation > allowed_deviation("bfloat16", sensitivity)


def test_dpo_before_training_is_ln_2():
    step = ExpertStep(expert(), beta=0.1)
    assert float(step.deviation(batch_of(table(), [0, 1]))[1]) == pytest.approx(
        2 * math.log(2), rel=1e-6
    )


class Routed:
    """Gates that depend on the token alone: two layers, decided at every token or per prompt."""

    def __init__(self, scope: str = "token") -> None:
        self.scope = scope
        self.weight = torch.linspace(-1, 1, 2 * 2 * 40).reshape(2, 2, 40).requires_grad_()
        self.batch = None

    def anchored(self, batch):
        from contextlib import contextmanager

        @contextmanager
        def anchored():
            self.batch = batch
            yield self

        return anchored()

    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        gates = torch.sigmoid(self.weight)[:, :, self.batch.input_ids]
        mask = self.batch.document_ids >= 0
        if self.scope == "token":
            return gates[0], gates[1], mask
        decisions = gates.flatten(-2)[:, :, self.batch.anchor_index]
        return decisions[0], decisions[1], torch.ones(len(self.batch.anchor_index))


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_the_prior_is_the_mean_over_the_global_batch_s_tokens_however_it_is_split(layout):
    data, rows_ = table(), [0, 1, 2, 3, 4]
    lengths = data.lengths("tree")
    ids = [
        t
        for i in rows_
        for part in [data.documents([i])[0]]
        for t in [*part.prefix, *part.suffixes[0], *part.suffixes[1]]
    ]
    gates = torch.sigmoid(Routed().weight.detach())[:, :, ids]
    expected = float((gates[0] + 1 - gates[1]).mean())
    policy = lambda tokens: torch.zeros(tokens.responses)  # noqa: E731
    for split in ([rows_], [[0], [4, 2], [1, 3]]):
        model, total, sums = Routed(), 0.0, {}
        step = RouterStep(policy, model, beta=0.1, prior=0.5)
        for indices in split:
            loss, metrics = step(
                batch_of(data, indices, layout, len(rows_) / sum(lengths[i] for i in rows_))
            )
            total += (loss - metrics["loss"]) / len(rows_)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        assert float(total.detach()) == pytest.approx(0.5 * expected, rel=1e-5)
        assert sums["prior"] / sums["tokens"] == pytest.approx(expected, rel=1e-5)
        assert sums["safety_gate"] / sums["tokens"] == pytest.approx(
            float(gates[0].mean()), rel=1e-5
        )
        assert sums["helpfulness_gate"] / sums["tokens"] == pytest.approx(
            float(gates[1].mean()), rel=1e-5
        )


def cross_entropy(gate: float, wanted: float) -> float:
    return -wanted * math.log(gate) - (1 - wanted) * math.log(1 - gate)


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("scope", ["token", "last"])
def test_the_risk_prior_is_a_mean_over_prompts_of_known_risk_however_it_is_split(scope, layout):
    """The oracle is a loop in float64 over the decisions; a prompt of unknown risk has no term."""
    risks = [1.0, -1.0, 0.0, 1.0, 0.0]
    data = RouterTable(table(5).arrow.append_column("risk", pa.array(risks)))
    rows_ = list(range(5))
    gates = torch.sigmoid(Routed().weight.detach().double())  # [expert, L, V]
    terms = []
    for i in rows_:
        document = data.documents([i])[0]
        decided = [document.prefix[-1]]
        if scope == "token":
            prompts = 2 if layout == "padded" else 1
            decided = [*document.prefix * prompts, *document.suffixes[0], *document.suffixes[1]]
        if risks[i] >= 0:
            terms += [
                cross_entropy(float(gates[0, layer, token]), risks[i])
                + cross_entropy(float(gates[1, layer, token]), 1 - risks[i])
                for token in decided
                for layer in range(2)
            ]
    expected = sum(terms) / len(terms)
    assert data.rows_of_known_risk(rows_) == [0, 2, 3, 4]
    known_tokens = sum(data.lengths(layout)[i] for i in (0, 2, 3, 4))
    policy = lambda tokens: torch.zeros(tokens.responses)  # noqa: E731
    for split in ([rows_], [[0], [4, 2], [1], [3]]):
        model = Routed(scope)
        step = RouterStep(policy, model, beta=0.1, prior=0.5, kind="risk")
        total, logged = torch.zeros(()), 0.0
        for indices in split:
            batch = batch_of(data, indices, layout)
            batch.pairs_per_known, batch.pairs_per_known_token = 5 / 4, 5 / known_tokens
            loss, metrics = step(batch)
            total = total + (loss - metrics["loss"]) / len(rows_)
            logged += float(metrics["risk_prior"]) / len(rows_)
        assert float(total.detach()) == pytest.approx(0.5 * expected, rel=1e-5)
        assert logged == pytest.approx(expected, rel=1e-5)
        total.backward()
        assert bool(model.weight.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["paper", "none"])
def test_without_a_prior_the_loss_is_the_preference_loss_alone(kind):
    data = RouterTable(table(5).arrow.append_column("risk", pa.array([0.0] * 5)))
    policy = lambda tokens: torch.zeros(tokens.responses)  # noqa: E731
    step = RouterStep(policy, Routed(), beta=0.1, prior=0.5, kind=kind)
    loss, metrics = step(batch_of(data, [0, 1], pairs_per_token=0.1))
    assert (float(loss.detach()) == float(metrics["loss"])) == (kind == "none")


def test_table_comes_back_from_its_bytes_and_splits():
    data = table()
    again = StageTable.from_bytes(data.to_bytes())
    assert again.arrow.equals(data.arrow)
    assert again.to_bytes() == data.to_bytes()
    train, held_out = again.split()
    assert (len(train), len(held_out)) == (24, 6)
    assert held_out.ids([0, 1]) == ["data.jsonl:5", "data.jsonl:10"]
    assert held_out.documents([1])[0].prefix == data.documents([9])[0].prefix
    assert held_out.signals([1])["reference_chosen"] == data.signals([9])["reference_chosen"]
    assert list(data.signals([0])) == list(SIGNALS)
    assert len(StageTable(data.arrow.slice(0, 0))) == 0


def test_a_table_with_a_hole_is_refused():
    data = rows(3)
    with pytest.raises(ValueError, match="scale"):
        StageTable(pa.table({k: v for k, v in data.items() if k != "scale"}))
    with pytest.raises(ValueError, match=r"data\.jsonl:2"):
        StageTable(pa.table({**data, "margin": [0.0, math.nan, 0.0]}))
