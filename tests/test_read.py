"""Reading preference sets: every format, every fault by file and row, mixing, repeats."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from midpo_ray.config import DataSet
from midpo_ray.data import read_pairs
from midpo_ray.errors import UserError

ROW = {
    "prompt": "How do I cut an onion?",
    "response_0": "With a knife.",
    "response_1": "Ärger vermeiden: ask a cook.",
    "is_response_0_safe": True,
    "is_response_1_safe": None,
    "better_response_id": 1,
    "safer_response_id": 0,
}
QUESTION = {"role": "user", "content": "Why?"}


def answer(text):
    return {"role": "assistant", "content": text}


def read(*paths, seed=0, **keys):
    return read_pairs([DataSet(path=str(path), **keys) for path in paths], seed=seed)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def numbered(count, prefix="p"):
    return [{**ROW, "prompt": f"{prefix}{i}"} for i in range(count)]


def write(path, rows):
    if path.name.startswith("rows.jsonl"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif path.name.startswith("rows.json"):
        content = json.dumps(rows, indent=1).encode()
    elif path.name.startswith("rows.parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    else:
        plain = path.with_name("plain.csv")
        with open(plain, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
        plain.unlink()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_pairs(tmp_path, ending, gz):
    second = {**ROW, "prompt": "Two\nlines, and a comma", "better_response_id": None}
    pairs, report = read(write(tmp_path / f"rows.{ending}{gz}", [ROW, second]))
    assert [p.prompt for p in pairs] == [(("user", ROW["prompt"]),), (("user", second["prompt"]),)]
    assert pairs[0].responses == (ROW["response_0"], ROW["response_1"])
    assert [p.labels for p in pairs] == [(True, None, 1, 0), (True, None, None, 0)]
    assert report.rows[0][1] == 2
    assert not report.dropped
    assert pairs[1].source.endswith({"jsonl": ":2", "csv": ":3"}.get(ending, " row 2"))


def test_lines_in_a_file_named_json_and_labels_as_floats_with_nan(tmp_path):
    assert len(read(jsonl(tmp_path / "a.json", numbered(3)))[0]) == 3
    rows = [
        {**ROW, "better_response_id": 1.0},
        {**ROW, "prompt": "q", "better_response_id": float("nan")},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ROW}), path)
    assert [p.better for p in read(path)[0]] == [1, None]


def test_a_folder_is_read_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "train-0.jsonl", numbered(2, "a"))
    jsonl(tmp_path / "data" / "train-1.jsonl", numbered(2, "b"))
    jsonl(tmp_path / "data" / "test.jsonl", numbered(1, "c"))
    (tmp_path / "README.md").write_text("not data")
    assert [p.prompt[0][1] for p in read(tmp_path)[0]] == ["a0", "a1", "b0", "b1"]
    assert [p.prompt[0][1] for p in read(tmp_path, split="test")[0]] == ["c0"]
    with pytest.raises(UserError, match="no file of the split 'validation'; there are test, train"):
        read(tmp_path, split="validation")


def test_other_columns_stay_for_scorers(tmp_path):
    row = {
        **ROW,
        "reward_0": 1.5,
        "reward_1": -2,
        "response_0_harm_category": {"Drugs": True},
        "note": None,
    }
    assert read(jsonl(tmp_path / "a.jsonl", [row]))[0][0].extra == {"reward_0": 1.5, "reward_1": -2}


# TRL's preference format and hh-rlhf

CONVERSATION = (("user", "Why?"),)
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
PREFERENCES = [
    ({"prompt": "Why?", "chosen": "A a.", "rejected": "B."}, CONVERSATION, ("A a.", "B.")),
    (
        {"chosen": "Why is it? It is so.", "rejected": "Why is it? It was."},
        (("user", "Why is it? It"),),
        ("is so.", "was."),
    ),
    (
        {"prompt": [QUESTION], "chosen": [answer("A")], "rejected": [answer("B")]},
        CONVERSATION,
        ("A", "B"),
    ),
    (
        {"chosen": [QUESTION, answer("A")], "rejected": [QUESTION, answer("B")]},
        CONVERSATION,
        ("A", "B"),
    ),
    (
        {"prompt": "Why?", "chosen": [QUESTION, answer("A")], "rejected": [QUESTION, answer("B")]},
        CONVERSATION,
        ("A", "B"),
    ),
    (
        {"chosen": f"{DIALOGUE} A", "rejected": f"{DIALOGUE} A\n\n1. B"},
        (("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")),
        ("A", "A\n\n1. B"),
    ),
    (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "A", "rejected": "B"},
        CONVERSATION,
        ("A", "B"),
    ),
]


@pytest.mark.parametrize(("row", "prompt", "responses"), PREFERENCES)
def test_chosen_and_rejected(tmp_path, row, prompt, responses):
    (pair,), _ = read(jsonl(tmp_path / "a.jsonl", [row]))
    assert (pair.prompt, pair.responses) == (prompt, responses)
    assert pair.labels == (None, None, 0, 0)
    assert pair.margin is None


@pytest.mark.parametrize(
    ("labels", "expected"), [("better", (None, None, 0, None)), ("safer", (True, False, None, 0))]
)
def test_what_chosen_means_and_the_margin(tmp_path, labels, expected):
    row = {"prompt": "Why?", "chosen": "A", "rejected": "B", "margin": 0.5}
    (pair,), _ = read(jsonl(tmp_path / "a.jsonl", [row]), labels=labels)
    assert pair.labels == expected
    assert pair.margin == 0.5


def test_dialogues_without_an_answer_to_compare_are_counted(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [
        {"chosen": f"{start} A", "rejected": f"{start} B"},
        {"chosen": f"{start} A", "rejected": f"{start}"},
        {"chosen": f"{start} A\n\nHuman: x\n\nAssistant: C", "rejected": f"{start} B"},
    ]
    pairs, report = read(jsonl(tmp_path / "a.jsonl", rows))
    assert len(pairs) == 1
    assert report.dropped == {
        "dialogue without a last answer": 1,
        "dialogues part before the last answer": 1,
    }


def test_the_report_says_how_each_set_was_read(tmp_path):
    answers = {"chosen": "The answer is 0.", "rejected": "The answer is 1."}
    rows = [
        {"system": "Be exact.", "question": "What is 0+0?", **answers},
        {"system": "Be exact.", "question": "What is 1-1?", **answers},
        {"system": None, "question": "What is 2-2?", **answers},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    guessed = jsonl(tmp_path / "b.jsonl", [answers])
    pairs, report = read(path, guessed)
    assert pairs[0].prompt == (("system", "Be exact."), ("user", "What is 0+0?"))
    ways = [(w.path, w.origin.prompt, w.origin.system, w.pairs) for w in report.read_as]
    assert ways[:2] == [
        (str(path), "column question", "column system", 2),
        (str(path), "column question", "", 1),
    ]
    assert "guess" in ways[2][1]
    assert report.read_as[0].example == pairs[0]
    text = "\n".join(report.lines())
    assert all(part in text for part in ("Be exact.", "What is 0+0?", "The answer is 1."))
    json.dumps(report.as_dict())


def test_the_files_of_a_folder_are_listed(tmp_path):
    folder = tmp_path / "set"
    (folder / ".cache").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", ".cache/c.jsonl"):
        jsonl(folder / name, numbered(1, name))
    (folder / "README.json").write_text("{}")
    _, report = read(folder)
    assert report.files == {str(folder): [str(folder / "a.jsonl"), str(folder / "b.jsonl")]}
    assert sum(".cache" in note or "README.json" in note for note in report.notes) == 2


# Repeats and mixing


def test_identical_repeated_and_contradicting_rows(tmp_path):
    swapped = {
        **ROW,
        "response_0": ROW["response_1"],
        "response_1": ROW["response_0"],
        "is_response_0_safe": None,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    rows = [
        {**ROW, "is_response_0_safe": None},
        ROW,  # the same, and one label more
        swapped,  # the same in the other order
        {**swapped, "better_response_id": 1},
        {**ROW, "response_1": ROW["response_0"]},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    (pair,), report = read(path)
    assert pair.labels == (True, None, 1, 0)
    assert report.dropped == {
        "repeats an earlier row": 2,
        "contradicts an earlier row": 1,
        "identical responses": 1,
    }
    assert report.conflicts == [f"{path}:4 contradicts {path}:1 (better_response_id)"]
    json.dumps(report.as_dict())


def test_two_sets_complete_each_other(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", [{**ROW, "better_response_id": None}])
    two = jsonl(tmp_path / "b.jsonl", [{**ROW, "safer_response_id": None}])
    (pair,), _ = read(one, two)
    assert (pair.better, pair.safer) == (1, 0)


def test_rows_are_drawn_by_seed_in_the_file_s_order(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered(50))
    names = [[p.prompt[0][1] for p in read(path, rows=20, seed=seed)[0]] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 20
    assert names[0] == sorted(names[0], key=lambda name: int(name[1:]))
    pairs, report = read(path, rows=60)
    assert len(pairs) == 50
    assert "60 rows are asked for, it has 50" in report.notes[0]


def test_weights_give_the_share_that_the_scarcest_set_allows(tmp_path):
    sets = [
        DataSet(path=str(jsonl(tmp_path / "a.jsonl", numbered(60, "a"))), weight=3),
        DataSet(path=str(jsonl(tmp_path / "b.jsonl", numbered(40, "b"))), weight=1),
        DataSet(path=str(jsonl(tmp_path / "c.jsonl", numbered(5, "c")))),
    ]
    pairs, report = read_pairs(sets, seed=0)
    assert Counter(p.prompt[0][1][0] for p in pairs) == {"a": 60, "b": 20, "c": 5}
    assert [kept for _, kept in report.kept] == [60, 20, 5]


# Faults: one line each, with the place


def bad(**changes):
    return json.dumps({**ROW, **changes}).encode()


def without(*names):
    return json.dumps({k: v for k, v in ROW.items() if k not in names}).encode()


LABELS = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
GOOD = bad() + b"\n"
FAULTS = [
    ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
    ("blank.jsonl", b"\n \n", r"blank\.jsonl: the file is empty"),
    ("empty.json", b"[]", r"empty\.json: the file is empty"),
    ("header.csv", b"prompt,response_0\n", r"header\.csv: the file is empty"),
    ("a.jsonl", GOOD + b'{"prompt": \n', r"a\.jsonl:2: malformed JSON \(Expecting value at column"),
    ("a.jsonl", GOOD + b"[1]\n", r"a\.jsonl:2: a JSON object .* list"),
    ("a.json", b'[{"prompt": 1},\n{"prompt" 2}]', r"a\.json:2: malformed JSON"),
    (
        "a.jsonl",
        without("response_1"),
        r"a\.jsonl:1: column response_1 missing; there are better_response_id,",
    ),
    (
        "a.jsonl",
        b'{"question": "x", "reply": "y"}',
        r"a\.jsonl:1: columns prompt, .* missing; there are question, reply",
    ),
    (
        "a.jsonl",
        b'{"prompt": "x", "chosen": "y"}',
        r"a\.jsonl:1: column rejected missing; there are chosen, prompt",
    ),
    ("a.jsonl", without(*LABELS), "no label column"),
    ("a.jsonl", GOOD + bad(better_response_id=2), r"a\.jsonl:2: better_response_id is 2, allowed"),
    ("a.jsonl", bad(better_response_id=True), "better_response_id is True, allowed"),
    ("a.jsonl", bad(safer_response_id="2"), "safer_response_id is '2', allowed"),
    ("a.jsonl", bad(safer_response_id=-2), "safer_response_id is -2, allowed"),
    (
        "a.jsonl",
        bad(is_response_0_safe="yes"),
        "is_response_0_safe is 'yes', allowed are true, false and null",
    ),
    ("a.jsonl", bad(response_0=""), r"a\.jsonl:1: response_0 is empty"),
    ("a.jsonl", bad(response_1=" \n\t"), r"a\.jsonl:1: response_1 is empty"),
    ("a.jsonl", bad(response_1=None), r"a\.jsonl:1: response_1 is empty"),
    ("a.jsonl", bad(response_1=["a"]), r"a\.jsonl:1: response_1 is \['a'\], a text is expected"),
    ("a.jsonl", bad(prompt="  "), r"a\.jsonl:1: prompt is empty"),
    ("a.jsonl", bad(prompt="half \ud83d"), "prompt holds half a character"),
    ("a.jsonl", GOOD + b'{"prompt": "caf\xe9"}', r"a\.jsonl:2: not UTF-8 \(byte 16"),
    ("a.json", b'[\n"caf\xe9"]', r"a\.json:2: not UTF-8"),
    ("a.csv", b"prompt,response_0\ncaf\xe9,b\n", r"a\.csv:2: not UTF-8"),
    (
        "a.csv",
        b"prompt,response_0,response_1,safer_response_id\na,b,c,0\na,b,c\n",
        r"a\.csv:3: 3 fields, the header has 4",
    ),
    (
        "a.csv",
        b"prompt,response_0,response_1,safer_response_id\na,b,c,2\n",
        r"a\.csv:2: safer_response_id is '2', allowed",
    ),
    ("a.csv", b'prompt,response_0\n"a,b\n', r"a\.csv:2: malformed CSV"),
    ("a.parquet", b"PAR1 nothing", r"a\.parquet: not a Parquet file"),
    ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(GOOD * 100)[:-20], r"a\.jsonl\.gz: not a whole gzip file"),
    ("a.txt", GOOD, r"a\.txt: unknown file ending, known are \.jsonl, \.json, \.parquet, \.csv"),
    (
        "a.jsonl",
        b'{"prompt": "x", "chosen": "y", "rejected": ["z"]}',
        "two texts or two lists of messages",
    ),
    (
        "a.jsonl",
        b'{"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"}',
        "margin is 'big', a finite number",
    ),
    ("a.jsonl", b'{"prompt": "x", "chosen": "y", "rejected": ""}', "rejected is empty"),
    ("a.jsonl", b'{"chosen": "abc", "rejected": "xyz"}', "do not begin with the same words"),
    (
        "a.jsonl",
        b'{"chosen": [{"from": "user"}], "rejected": []}',
        "chosen holds {'from': 'user'}; a message is an object",
    ),
    (
        "a.jsonl",
        json.dumps({"chosen": [answer("a")], "rejected": [answer("b")]}).encode(),
        "column prompt missing",
    ),
    (
        "a.jsonl",
        json.dumps({"prompt": [answer("x")], "chosen": "a", "rejected": "b"}).encode(),
        "the role 'assistant', user is",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)]
)
def test_faults_are_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/nowhere/rows.jsonl", "rows.parquet", "s3://bucket/rows", "a/b/c"]
)
def test_missing_file(path):
    with pytest.raises(UserError, match="no such file"):
        read(path)


def test_a_hub_name_out_of_reach():
    with pytest.raises(UserError, match="nobody/no-such-set: no such file or folder") as caught:
        read("nobody/no-such-set")
    assert "\n" not in str(caught.value)


def test_a_hub_set_is_read_at_its_revision(monkeypatch):
    import datasets

    asked = []
    rows = datasets.Dataset.from_list([{**row, "when": 2**50} for row in numbered(3)])
    rows = rows.cast_column("when", datasets.Value("timestamp[s]"))

    def load(name, config, **keys):
        asked.append((name, config, keys))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs, _ = read("some/set", revision="abc", split="train")
    assert asked == [("some/set", None, {"split": "train", "revision": "abc"})]
    assert [p.source for p in pairs] == [f"some/set row {n}" for n in (1, 2, 3)]
    assert pairs[0].labels == (True, None, 1, 0)


# Real files


def test_real_sets(shared):
    data = shared / "data"
    pairs, report = read(data / "pku_safety_pairs.jsonl")
    assert len(pairs) == 1801
    assert not report.dropped
    assert not report.conflicts
    assert all(sum(p.safe) == 1 and p.better is None and p.safe[p.safer] for p in pairs)
    assert [p.better for p in read(data / "pku_full_schema_sample.jsonl")[0]] == [1, 1]
    assert len(read(data / "helpful_pairs.jsonl")[0]) == 2999


def test_real_dialogues(shared):
    pairs, report = read(shared / "data" / "hh_harmless_base_test.jsonl.gz", labels="safer")
    assert len(pairs) == 2308
    assert report.dropped == {"dialogue without a last answer": 4}
    assert all(p.prompt[-1][0] == "user" and p.safe == (True, False) for p in pairs)
    assert max(len(p.prompt) for p in pairs) > 5
