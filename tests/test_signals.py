"""From the scored table to what each stage trains on: every objective's constants, by hand."""

import math
from pathlib import Path

import pyarrow as pa
import pytest

from midpo_ray import UserError
from midpo_ray.config import Config, Optim
from midpo_ray.data.schema import Document, Pair, response_key
from midpo_ray.pipeline.plan import fingerprints
from midpo_ray.pipeline.run import router_warnings
from midpo_ray.pipeline.score import make_units, response_rows
from midpo_ray.pipeline.signals import Scored, stage_table
from midpo_ray.storage import Storage
from midpo_ray.training.table import StageTable

ASK = (("user", "how"),)
# response: (tokens, reference log-probability, unconditional log-probability, reward, cost)
SIGNALS = {
    "good": (4, -8.0, -12.0, 2.0, -1.0),
    "bad": (2, -3.0, -3.5, 0.5, 0.75),
    "mild": (3, -6.0, -9.0, 1.0, -2.0),
}


def scored() -> Scored:
    pairs = [
        Pair(ASK, ("good", "bad"), (True, False), better=0, safer=0, margin=0.3, source="f:1"),
        Pair(ASK, ("bad", "mild"), (False, True), better=0, safer=1, margin=0.1, source="f:2"),
        Pair(ASK, ("good", "mild"), (True, True), better=0, safer=1, margin=0.2, source="f:3"),
    ]
    rows = [
        {
            "key": response_key(ASK, text), "prompt_ids": [1, 7], "response_ids": [5] * n,
            "reference_logp": ref, "unconditional_logp": null, "reward": r, "cost": c,
        }
        for text, (n, ref, null, r, c) in SIGNALS.items()
    ]  # fmt: skip
    return Scored(pairs, pa.Table.from_pylist(rows))


def config(stage: str = "safety", rule: str = "labels", **objective: object) -> Config:
    return Config.model_validate(
        {
            "name": "t", "model": {"path": "x"},
            "data": {"sets": [{"path": "a"}], "validation": 0.0},
            "scores": {"reward": {"column": "r{i}"}, "cost": {"column": "c{i}"}},
            "experts": {stage: {"objective": objective}}, "router": {"rule": rule},
        }
    )  # fmt: skip


def columns(stage: str, **objective: object) -> dict[str, list]:
    table, _ = stage_table(config(stage, **objective), stage, scored())
    return table.to_pydict()


def test_safety_expert_takes_the_safer_of_pairs_with_one_safe_response() -> None:
    got = columns("safety", name="dpo")
    assert got["id"] == ["f:1", "f:2"]
    assert [len(x) for x in got["chosen"]] == [4, 3]
    assert got["reference_chosen"] == [-8.0, -6.0]
    assert got["reference_rejected"] == [-3.0, -3.0]
    assert got["margin"] == [0, 0]
    assert got["weight_chosen"] == got["weight_rejected"] == got["scale"] == [1, 1]


def test_spe_dpo_margins_are_the_own_scorers_scaled_by_lambda() -> None:
    assert columns("safety", name="spe_dpo", margin_scale=0.5)["margin"] == [0.5 * 1.75, 0.5 * 2.75]
    # helpfulness: f:2's label says bad (0.5) beats mild (1.0), the reward model disagrees: margin 0
    assert columns("helpfulness", name="spe_dpo", margin_scale=2.0)["margin"] == [3.0, 0.0, 2.0]
    assert columns("safety", name="spe_dpo", margin_scale=0)["margin"] == [0, 0]


def test_margin_in_units_of_the_scorers_deviation() -> None:
    costs = [c for *_, c in SIGNALS.values()]
    mean = sum(costs) / 3
    deviation = math.sqrt(sum((c - mean) ** 2 for c in costs) / 2)
    assert columns("safety", name="spe_dpo", margin_unit="std")["margin"] == pytest.approx(
        [1.75 / deviation, 2.75 / deviation]
    )


def test_margin_from_the_datas_column() -> None:
    assert columns("safety", name="spe_dpo", margin_from="column", margin_scale=2.0)["margin"] == [
        0.6,
        0.2,
    ]


@pytest.mark.parametrize("information", ["token", "total"])
def test_b_dpo_weights_by_hand(information: str) -> None:
    got = columns(
        "safety", name="b_dpo", temperature=0.7, information=information, scaling="gradient_norm"
    )
    for row, (chosen, rejected) in enumerate([("good", "bad"), ("mild", "bad")]):
        known = []
        for text in (chosen, rejected):
            n, ref, null, *_ = SIGNALS[text]
            known.append((ref - null) / (n if information == "token" else 1))
        w, l = (2 * math.exp(-i / 0.7) / sum(math.exp(-k / 0.7) for k in known) for i in known)
        assert got["weight_chosen"][row] == pytest.approx(w)
        assert got["weight_rejected"][row] == pytest.approx(l)
        assert got["scale"][row] == pytest.approx(math.sqrt(2 / (w * w + l * l)))


def test_scaling_alone_is_an_ablation() -> None:
    weighted = columns("safety", name="b_dpo", scaling="imbalance")
    alone = columns("safety", name="b_dpo", scaling="imbalance", balance=False)
    assert alone["weight_chosen"] == [1, 1]
    assert alone["scale"] == weighted["scale"]
    assert columns("safety", name="b_dpo", scaling="gradient_norm", balance=False)["scale"] == [
        1,
        1,
    ]


def test_infinite_temperature_is_dpo() -> None:
    got = columns("safety", name="b_dpo", temperature=float("inf"))
    assert got == columns("safety", name="dpo")


def test_modpo_reads_the_other_objectives_reward() -> None:
    got = columns("safety", name="modpo", modpo_weight=0.25)
    assert got["weight_chosen"] == got["weight_rejected"] == [4.0, 4.0]
    assert got["margin"] == [3 * (2.0 - 0.5), 3 * (1.0 - 0.5)]
    got = columns("helpfulness", name="modpo", modpo_weight=0.5)  # q = -cost
    assert got["margin"] == [1.0 + 0.75, -0.75 - 2.0, 1.0 - 2.0]


def test_an_experts_pairs_may_be_mixed_or_the_routers() -> None:
    raw = config("helpfulness", rule="pareto", name="dpo").model_dump()

    def ids(pairs: str) -> list[str]:
        raw["experts"]["helpfulness"]["pairs"] = pairs
        return stage_table(Config.model_validate(raw), "helpfulness", scored())[0]["id"].to_pylist()

    assert ids("own") == ["f:1", "f:2", "f:3"]
    assert ids("mixed") == ["f:1", "f:2", "f:2", "f:3"]  # f:2's labels disagree
    assert ids("dual") == RULES["pareto"]


def test_a_margin_is_of_one_preference_so_it_takes_no_mixed_pairs() -> None:
    raw = config("helpfulness", name="spe_dpo").model_dump()
    raw["experts"]["helpfulness"]["pairs"] = "mixed"
    with pytest.raises(
        ValueError,
        match=r"experts.helpfulness.pairs is mixed, .* spe_dpo",
    ):
        Config.model_validate(raw)


def test_pairs_are_a_part_of_what_an_expert_hangs_on() -> None:
    raw = config("helpfulness", rule="pareto", name="dpo").model_dump()
    seen = {}
    for pairs, rule in (
        ("own", "pareto"),
        ("own", "labels"),
        ("mixed", "labels"),
        ("dual", "labels"),
        ("dual", "pareto"),
    ):
        raw["experts"]["helpfulness"]["pairs"], raw["router"]["rule"] = pairs, rule
        seen[pairs, rule] = fingerprints(Config.model_validate(raw))["helpfulness"]
    assert seen["own", "pareto"] == seen["own", "labels"]
    assert len({str(parts) for parts in seen.values()}) == 4


RULES = {"labels": [], "pareto": ["f:1", "f:2"], "ranked": ["f:3"], "pareto_labels": ["f:1"]}


@pytest.mark.parametrize(("rule", "ids"), RULES.items())
def test_dual_rules(rule: str, ids: list[str]) -> None:
    if not ids:
        with pytest.raises(
            UserError, match=r"no row is left for the stage router: .*not both safe"
        ):
            stage_table(config(rule=rule), "router", scored())
        return
    table, summary = stage_table(config(rule=rule), "router", scored())
    assert table["id"].to_pylist() == ids
    assert summary["pairs"] == len(ids)


def test_saved_and_loaded_tables_are_the_same(tmp_path: Path) -> None:
    folder = Storage(tmp_path)
    scored().save(folder)
    again = Scored.load(folder)
    assert again.pairs == scored().pairs
    assert again.responses.equals(scored().responses)
    table, _ = stage_table(config(name="spe_dpo"), "safety", again)
    rows = StageTable(table)
    assert len(rows) == 2
    assert rows.documents([1])[0].prefix == [1, 7]


def test_each_distinct_response_is_one_row() -> None:
    pairs = scored().pairs
    documents = [
        Document([1, 7], [[5] * SIGNALS[r][0] for r in p.responses], p.keys) for p in pairs
    ]
    rows = response_rows(pairs, documents)
    assert [row["response"] for row in rows] == ["good", "bad", "mild"]
    assert [len(row["response_ids"]) for row in rows] == [4, 2, 3]
    assert [row["source"] for row in rows] == ["f:1", "f:1", "f:2"]
    assert [row["key"] for row in rows] == [response_key(ASK, text) for text in SIGNALS]


def test_units_hold_to_the_budget_and_keep_a_prompts_rows_together() -> None:
    pairs = [Pair((("user", f"p{i}"),), (f"a{i}", f"b{i}")) for i in range(10)]
    documents = [Document([1] * 3, [[2] * (i + 1), [3]], pairs[i].keys) for i in range(10)]
    units = make_units(response_rows(pairs, documents), budget=20)
    prompts = [[row["prompt"][0][1] for row in unit] for unit in units]
    tokens = [sum(len(row["response_ids"]) for row in unit) + 3 * len(unit) // 2 for unit in units]
    assert max(tokens) <= 20
    assert sorted(p for unit in prompts for p in unit) == sorted(2 * [f"p{i}" for i in range(10)])
    assert all(unit[::2] == unit[1::2] for unit in prompts)
    assert make_units([], 20) == []


@pytest.mark.parametrize(
    ("pairs", "held_out", "optim", "count"),
    [
        (300, 30, {"steps": 100}, 0),
        (229, 30, {"steps": 100}, 1),
        (300, 30, {"steps": 49}, 1),
        (300, 30, {"epochs": 3, "batch_size": 16}, 0),  # 51 steps
        (300, 30, {"epochs": 2, "batch_size": 16}, 1),
        (300, 0, {"steps": 100}, 1),
        (12, 0, {"steps": 2}, 3),
    ],
)
def test_a_router_on_little_data_is_reported(pairs, held_out, optim, count) -> None:
    summary = {"pairs": pairs, "validation pairs": held_out}
    lines = router_warnings(summary, Optim(**optim))
    assert len(lines) == count
    assert all("\n" not in line for line in lines)
