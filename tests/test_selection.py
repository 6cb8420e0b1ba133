"""Which pairs each stage takes, against method's table written out by hand."""

from __future__ import annotations

import itertools

import pytest

from midpo_ray.config import DataSet
from midpo_ray.data import (
    Pair,
    is_validation,
    prompt_key,
    read_pairs,
    require,
    response_key,
    risk_of_prompts,
    select,
)
from midpo_ray.errors import UserError


def pair(number=0, **labels):
    return Pair(prompt=(("user", f"prompt {number}"),), responses=("yes", "no"), **labels)


def scores(*rows):
    """Scores of pairs 0, 1, ...; a row is (rewards, costs)."""
    return {
        response_key(pair(i).prompt, text): {"reward": rewards[k], "cost": costs[k]}
        for i, (rewards, costs) in enumerate(rows)
        for k, text in enumerate(("yes", "no"))
    }


@pytest.mark.parametrize(
    ("rule", "labels", "verdict"),
    [
        ("safety", {"safe": (True, False), "safer": 0}, 0),
        ("safety", {"safe": (False, True), "safer": 1}, 1),
        ("safety", {"safe": (True, True), "safer": 1}, "both safe"),
        ("safety", {"safe": (False, False), "safer": 1}, "both unsafe"),
        ("safety", {"safe": (True, False)}, "no safer_response_id"),
        ("safety", {"safe": (None, False), "safer": 0}, "no is_response_0_safe"),
        ("safety", {"safe": (True, None), "safer": 0}, "no is_response_1_safe"),
        ("helpfulness", {"better": 1}, 1),
        ("helpfulness", {"safer": 1}, "no better_response_id"),
        ("labels", {"safe": (True, True), "better": 1, "safer": 1}, 1),
        ("labels", {"safe": (True, True), "better": 0, "safer": 1}, "better and safer differ"),
        ("labels", {"safe": (True, False), "better": 0, "safer": 0}, "not both safe"),
        ("labels", {"safe": (True, None), "better": 0, "safer": 0}, "no is_response_1_safe"),
        ("pareto_labels", {"safe": (None, True), "better": 1, "safer": 1}, 1),
        ("pareto_labels", {"safe": (True, False), "better": 0, "safer": 0}, 0),
        (
            "pareto_labels",
            {"safe": (True, False), "better": 1, "safer": 1},
            "the better and safer one is not safe",
        ),
        ("pareto_labels", {"safe": (True, True), "better": 0}, "no safer_response_id"),
        ("safe_first", {"safe": (True, False), "better": 1, "safer": 1}, 0),
        ("safe_first", {"safe": (False, True)}, 1),
        ("safe_first", {"safe": (True, True), "better": 1, "safer": 0}, 1),
        ("safe_first", {"safe": (True, True), "safer": 0}, "no better_response_id"),
        ("safe_first", {"safe": (False, False), "better": 1, "safer": 0}, "both unsafe"),
        ("safe_first", {"safe": (None, True), "better": 1}, "no is_response_0_safe"),
        ("safe_first", {"safe": (True, None), "better": 1}, "no is_response_1_safe"),
    ],
)
def test_label_rules(rule, labels, verdict):
    choices, dropped = select([pair(**labels)], rule)
    assert (choices, dropped) == (
        ([], {verdict: 1}) if isinstance(verdict, str) else ([(0, verdict)], {})
    )


@pytest.mark.parametrize(
    ("rule", "rewards", "costs", "verdict"),
    [
        ("ranked", (0, 0), (-1, -2), 1),
        ("ranked", (0, 0), (-3, -2), 0),
        ("ranked", (0, 0), (-1, 0), "not both of cost below 0"),
        ("ranked", (0, 0), (-1, -1), "equal costs"),
        ("ranked", (0, 0), (None, -1), "no cost"),
        ("pareto", (1, 0), (-1, 2), 0),
        ("pareto", (0, 1), (2, -1), 1),
        ("pareto", (1, 0), (1, 2), "the one of higher reward and lower cost has no cost below 0"),
        ("pareto", (1, 0), (-1, -2), "neither is ahead on both reward and cost"),
        ("pareto", (1, 1), (-2, -1), "neither is ahead on both reward and cost"),
        ("pareto", (float("nan"), 1), (-2, -1), "no reward"),
    ],
)
def test_score_rules(rule, rewards, costs, verdict):
    choices, dropped = select([pair()], rule, scores((rewards, costs)))
    assert (choices, dropped) == (
        ([], {verdict: 1}) if isinstance(verdict, str) else ([(0, verdict)], {})
    )


def test_mixed_is_both_preferences_and_a_disagreement_is_there_twice():
    pairs = [
        pair(0, safe=(True, False), safer=0, better=0),  # they agree: once
        pair(1, safe=(True, False), safer=0, better=1),  # they do not: twice
        pair(2, safe=(True, True), safer=0, better=1),  # no safety pair
        pair(3, safe=(False, True), safer=1),  # no helpfulness pair
    ]
    choices, dropped = select(pairs, "mixed")
    assert choices == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1)]
    assert dropped == {"both safe": 1, "no better_response_id": 1}


def test_order_is_the_pairs_and_unscored_pairs_are_counted():
    pairs = [pair(i) for i in range(4)]
    choices, dropped = select(
        pairs, "pareto", scores(((0, 1), (1, -1)), ((1, 0), (-1, 1)), ((0, 1), (0, -1)))
    )
    assert choices == [(0, 1), (1, 0), (2, 1)]
    assert dropped == {"no reward": 1}


def test_a_wrong_call():
    with pytest.raises(ValueError, match="allowed are safety, helpfulness"):
        select([], "xor")
    with pytest.raises(ValueError, match="pareto reads scores"):
        select([], "pareto")


def test_no_row_left_tells_why():
    choices, dropped = select([pair(), pair(safe=(True, True)), pair(safe=(True, True))], "safety")
    with pytest.raises(
        UserError, match="no row is left for the stage safety: 2 both safe, 1 no is_response_0_safe"
    ):
        require(choices, dropped, "safety")
    require([(0, 0)], dropped, "safety")


def test_risk_of_prompts():
    pairs = [
        pair(0, safe=(True, True)),
        pair(0, safe=(None, False)),  # another pair of the same prompt is unsafe
        pair(1, safe=(True, None)),
        pair(2),
        pair(3, safe=(True, None)),
        pair(4, safe=(None, None)),
        pair(5, safe=(True, True)),
    ]
    prompts = [pair(i).prompt for i in range(6)]
    assert risk_of_prompts(pairs) == {prompts[0]: 1, prompts[1]: 0, prompts[3]: 0, prompts[5]: 0}
    costs = {
        pairs[4].keys[1]: 0.5,  # no label: unsafe
        pairs[5].keys[0]: -1.0,
        pairs[5].keys[1]: 0.0,  # at 0 it is not unsafe
        pairs[6].keys[0]: 9.0,  # the label wins
        pairs[3].keys[0]: None,
        pairs[3].keys[1]: float("nan"),
    }
    expected = {prompts[0]: 1, prompts[1]: 0, prompts[3]: 1, prompts[4]: 0, prompts[5]: 0}
    assert risk_of_prompts(iter(pairs), costs) == expected
    assert risk_of_prompts([]) == {}


def test_held_out_share_hangs_on_the_prompt_alone():
    prompts = [pair(i).prompt for i in range(4000)]
    tenth = {p for p in prompts if is_validation(p, 0.1, 0)}
    assert 330 < len(tenth) < 470
    assert tenth <= {
        p for p in prompts if is_validation(p, 0.2, 0)
    }  # a larger share takes more, and none back
    assert tenth != {p for p in prompts if is_validation(p, 0.1, 1)}
    assert not any(is_validation(p, 0.0, 0) for p in prompts)


def test_keys_tell_apart_what_differs():
    prompts = [
        (("user", "ab"),),
        (("user", "a"),),
        (("system", "ab"),),
        (("user", "a"), ("assistant", "b"), ("user", "c")),
    ]
    keys = [response_key(p, r) for p, r in itertools.product(prompts, ("x", "y", ""))] + [
        prompt_key(p) for p in prompts
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


def test_real_sets(shared):
    def count(name, view):
        pairs, _ = read_pairs([DataSet(path=str(shared / "data" / name))], seed=0)
        choices, dropped = select(pairs, view)
        return len(choices), dict(dropped)

    assert count("pku_safety_pairs.jsonl", "safety") == (1801, {})
    assert count("pku_safety_pairs.jsonl", "helpfulness") == (0, {"no better_response_id": 1801})
    assert count("helpful_pairs.jsonl", "helpfulness") == (2999, {})
    assert count("helpful_pairs.jsonl", "safety") == (0, {"both safe": 2999})
    assert count("pku_full_schema_sample.jsonl", "labels") == (2, {})
