"""Prompt sets are told by their columns; each prompt knows whether it is harmful."""

import csv
import json
from collections import Counter

import pytest

from midpo_ray.errors import UserError
from midpo_ray.evaluation.prompts import load_prompts, prompts_digest


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return str(path)


def table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def told(prompts):
    return [(p.text, p.harmful, p.category) for p in prompts]


def test_xstest_with_and_without_labels(tmp_path):
    rows = [
        {
            "id": 7,
            "prompt": "kill a process?",
            "type": "homonyms",
            "label": "safe",
            "focus": "kill",
            "note": "",
        },
        {
            "id": 9,
            "prompt": "kill a man?",
            "type": "contrast_homonyms",
            "label": "unsafe",
            "focus": "kill",
            "note": "",
        },
    ]
    new = load_prompts(table(tmp_path / "xs.csv", rows))
    assert told(new) == [
        ("kill a process?", False, "homonyms"),
        ("kill a man?", True, "contrast_homonyms"),
    ]
    assert [p.id for p in new] == ["7", "9"]
    old = load_prompts(
        table(tmp_path / "old.csv", [{k: v for k, v in r.items() if k != "label"} for r in rows])
    )
    assert told(old) == told(new)


def test_sets_of_harmful_prompts(tmp_path):
    reject = load_prompts(
        table(
            tmp_path / "s.csv", [{"category": "Fraud", "source": "x", "forbidden_prompt": "steal"}]
        )
    )
    assert told(reject) == [("steal", True, "Fraud")]
    bench = [
        {
            "Behavior": "write it",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "illegal",
            "Tags": "",
            "ContextString": c,
            "BehaviorID": f"b{i}",
        }
        for i, c in enumerate(["", "a page"])
    ]
    assert told(load_prompts(table(tmp_path / "h.csv", bench))) == [
        ("write it", True, "illegal"),
        ("a page\n\n---\n\nwrite it", True, "illegal"),
    ]
    hub = {
        "id": 0,
        "risk_area": "Malicious Uses",
        "types_of_harm": "a",
        "specific_harms": "b",
        "question": "how?",
    }
    assert told(load_prompts(lines(tmp_path / "d.jsonl", [hub]))) == [
        ("how?", True, "Malicious Uses")
    ]
    folder = tmp_path / "dna"
    folder.mkdir()
    lines(folder / "malicious_uses.jsonl", [{"prompt": "poach?", "intents": ["S003"]}])
    assert told(load_prompts(str(folder))) == [("poach?", True, "malicious uses")]
    copy = load_prompts(
        lines(tmp_path / "StrongREJECT.jsonl", [{"prompt": "a", "category": "c"}])
    )  # the hub's other form
    assert told(copy) == [("a", True, "c")]


def test_wildguard_has_null_labels_and_responses(tmp_path):
    rows = [
        {
            "prompt": f"p{i}",
            "adversarial": False,
            "response": None,
            "response_harm_label": None,
            "prompt_harm_label": label,
            "subcategory": "fraud",
        }
        for i, label in enumerate(["harmful", "unharmful", None])
    ]
    assert [p.harmful for p in load_prompts(lines(tmp_path / "w.jsonl", rows))] == [
        True,
        False,
        None,
    ]


def test_pku_prompt_is_harmful_where_an_answer_is_unsafe(tmp_path):
    def row(prompt, first, second, **more):
        return {
            "prompt": prompt,
            "response_0": "a",
            "response_1": "b",
            "is_response_0_safe": first,
            "is_response_1_safe": second,
            **more,
        }

    rows = [
        row("x", True, True),
        row("y", True, True),
        row("x", True, False, response_1_harm_category={"Drugs": False, "Theft": True}),
        row("z", None, None),
    ]
    assert told(load_prompts(lines(tmp_path / "p.jsonl", rows))) == [
        ("x", True, "Theft"),
        ("y", False, ""),
        ("z", None, ""),
    ]


def test_any_file_with_prompts(tmp_path):
    rows = [
        {"prompt": "a", "harmful": True, "category": "k"},
        {"prompt": "a", "harmful": True},
        {"prompt": "b", "label": "benign"},
        {
            "prompt": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "r"},
                {"role": "user", "content": "s"},
            ]
        },
        {"prompt": "held out", "split": "validation"},
    ]
    found = load_prompts(lines(tmp_path / "any.jsonl", rows))
    assert told(found) == [("a", True, "k"), ("b", False, ""), ("s", None, "")]
    assert found[2].turns == (("user", "q"), ("assistant", "r"), ("user", "s"))
    assert len({p.id for p in found}) == 3
    assert {p.set for p in found} == {"any"}


def test_jailbreakbench_s_goal_is_the_prompt_and_a_column_can_be_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="midpo_ray")
    rows = [
        {"Index": 0, "Goal": "Trick a man", "Target": "Sure", "Behavior": "Trick", "Category": "F"},
        {"Index": 1, "Goal": "Slip in", "Target": "Sure", "Behavior": "Trick", "Category": "P"},
    ]
    path = table(tmp_path / "harmful-behaviors.csv", rows)
    assert told(load_prompts(path)) == [("Trick a man", True, "F"), ("Slip in", True, "P")]
    assert "column Goal" in caplog.text
    assert "Behavior" in caplog.text  # the other candidate
    benign = table(tmp_path / "benign-behaviors.csv", rows)
    assert [p.harmful for p in load_prompts(benign)] == [False, False]
    assert told(load_prompts(f"{path}:column=Target")) == [("Sure", True, "F")]
    assert load_prompts(f"{path}:column=Behavior")[0].set == "harmful-behaviors"
    with pytest.raises(UserError, match=r"no column goal.* Behavior, Category, Goal"):
        load_prompts(f"{path}:column=goal")


def test_context_and_system_belong_to_the_prompt(tmp_path):
    rows = [
        {"prompt": "Do it.", "context": "Steal.", "category": "a"},
        {"prompt": "Do it.", "context": "Hide.", "category": "a"},
        {"prompt": "Do it.", "context": None, "category": "b"},
    ]
    found = load_prompts(lines(tmp_path / "contextual.jsonl", rows))
    assert [p.text for p in found] == [
        "Steal.\n\n---\n\nDo it.",
        "Hide.\n\n---\n\nDo it.",
        "Do it.",
    ]
    assert len({p.id for p in found}) == 3
    systems = [{"system": "Be brief.", "question": "Why?"}, {"question": "Why?"}]
    found = load_prompts(lines(tmp_path / "systems.jsonl", systems))
    assert [p.turns for p in found] == [
        (("system", "Be brief."), ("user", "Why?")),
        (("user", "Why?"),),
    ]
    alpaca = [{"instruction": "Shorten.", "input": "A long text."}]
    (one,) = load_prompts(lines(tmp_path / "alpaca.jsonl", alpaca))
    assert one.text == "Shorten.\n\nA long text."


def test_hidden_files_are_no_prompts(tmp_path):
    for place in (".ipynb_checkpoints", "."):
        (tmp_path / "set" / place).mkdir(parents=True, exist_ok=True)
        lines(tmp_path / "set" / place / "a.jsonl", [{"prompt": place}])
    assert [p.text for p in load_prompts(str(tmp_path / "set"))] == ["."]


def test_limit_draws_by_content(tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(50)]
    some = load_prompts(lines(tmp_path / "a.jsonl", rows), 10)
    other = load_prompts(lines(tmp_path / "a2.jsonl", rows[::-1]), 10)
    assert len(some) == 10
    assert {p.text for p in some} == {p.text for p in other}
    assert prompts_digest(some) != prompts_digest(other)  # order and set are part of it


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"words": "x"}], "there are words, known are"),
        ([{"prompt": ""}], "prompt is empty"),
        ([{"prompt": "x", "harmful": "maybe"}], "harmful is 'maybe'"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], "last message"),
    ],
)
def test_faults_name_the_row(tmp_path, rows, says):
    with pytest.raises(UserError, match=says) as error:
        load_prompts(lines(tmp_path / "bad.jsonl", rows))
    assert "bad.jsonl:1" in str(error.value)


def test_unknown_names():
    with pytest.raises(UserError, match=r"known are .*xstest"):
        load_prompts("xtest")
    with pytest.raises(UserError, match="builtin:miniature"):
        load_prompts("builtin:minature")


def test_a_gated_set_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'allenai/wildguardmix' is a gated dataset on the Hub."
        )

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError,
        match=r"is gated: accept its terms at https://huggingface\.co/datasets/allenai/wildguardmix",
    ):
        load_prompts("wildguardmix")


def test_miniature():
    found = load_prompts("builtin:miniature")
    assert len(found) == 400
    assert Counter(p.category for p in found) == {"harmful": 200, "lookalike": 100, "plain": 100}
    assert all(p.harmful == (p.category == "harmful") for p in found)


def test_real_files(shared):
    data = shared / "data"
    xstest = load_prompts(str(data / "xstest_prompts.csv"))
    assert Counter(p.harmful for p in xstest) == {False: 250, True: 200}
    assert len(load_prompts(str(data / "strongreject_dataset.csv"))) == 313
    refuse = load_prompts(str(data / "do_not_answer"))
    assert len({p.category for p in refuse}) == 5
    assert {p.harmful for p in refuse} == {True}
    assert len(refuse) > 900
    full = load_prompts(str(data / "pku_full_schema_sample.jsonl"))
    assert full
    assert any(p.harmful and p.category for p in full) or not any(p.harmful for p in full)
    assert all(p.harmful for p in load_prompts(str(data / "pku_safety_pairs.jsonl")))
