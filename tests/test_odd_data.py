"""Odd data files from a seeded generator: each is read as its oracle says, or refused in a line."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from midpo_ray.config import DataSet
from midpo_ray.data import read_pairs
from midpo_ray.errors import UserError

ENDINGS = ("jsonl", "json", "csv", "parquet")
TEXTS = (
    "plain",
    "two\nlines",
    'a "quoted" word',
    "semi;colon, comma",
    "tab\there",
    "Ünïcödé",
    "日本語",
    "🙂 smile",
    "שלום",
    "line\u2028separator",
    "back\\slash",
    "trailing space ",
    "{'a': 1}",
    "=1+1",
    "e\u0301 combining",
    "a\u00a0space",
    "<b>bold</b>",
    "NaN",
    "null",
    "nul\x00character",
)
Row = dict[str, Any]
Expected = list[tuple[Any, ...]] | None  # (prompt, responses, labels) of each pair; None: refused


def text(rng: random.Random, number: int) -> str:
    return f"{number} {rng.choice(TEXTS)} {rng.choice(TEXTS)}"


def pku(rng: random.Random, count: int = 4) -> tuple[list[Row], list[tuple[Any, ...]]]:
    rows, expected = [], []
    for n in range(count):
        prompt, first, second = (text(rng, 3 * n + k) for k in range(3))
        first_safe, second_safe = rng.choice([True, False]), rng.choice([True, False])
        labels = (first_safe, second_safe, n % 2, rng.randrange(2))
        rows.append(
            {
                "prompt": prompt,
                "response_0": first,
                "response_1": second,
                "is_response_0_safe": labels[0],
                "is_response_1_safe": labels[1],
                "better_response_id": labels[2],
                "safer_response_id": labels[3],
            }
        )
        expected.append(((("user", prompt),), (first, second), labels))
    return rows, expected


def trl(rng: random.Random, count: int = 4) -> tuple[list[Row], list[tuple[Any, ...]]]:
    rows, expected = [], []
    for n in range(count):
        prompt, first, second = (text(rng, 3 * n + k) for k in range(3))
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
        expected.append(((("user", prompt),), (first, second), (None, None, 0, 0)))
    return rows, expected


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def encode(rows: list[Row], ending: str) -> bytes:
    if ending == "jsonl":
        return "".join(
            json.dumps(row, ensure_ascii="\\ud800" in repr(row)) + "\n" for row in rows
        ).encode()
    if ending == "json":
        return json.dumps(rows, ensure_ascii="\\ud800" in repr(rows), indent=1).encode()
    if ending == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sheet.getvalue().encode()


def cases() -> dict[str, tuple[dict[str, bytes], Expected]]:
    """Files by name (a case of several is a folder) and what reading them gives."""
    rng = random.Random(20)
    made: dict[str, tuple[dict[str, bytes], Expected]] = {}

    def add(name: str, content: bytes | dict[str, bytes], expected: Expected) -> None:
        files = content if isinstance(content, dict) else {name.split()[-1]: content}
        assert name not in made
        made[name] = (files, expected)

    for ending in ENDINGS:
        for kind in (pku, trl):
            rows, expected = kind(rng)
            add(f"{kind.__name__} a.{ending}", encode(rows, ending), expected)
            packed = gzip.compress(encode(rows, ending))
            add(f"{kind.__name__} packed a.{ending}.gz", packed, expected)
        rows, expected = pku(rng)
        content = encode(rows, ending)
        add(f"truncated gzip a.{ending}.gz", gzip.compress(content)[:-9], None)
        add(f"half a file a.{ending}", content[: len(content) // 2], None)
        add(f"no bytes a.{ending}", b"", None)
        add(f"zeros a.{ending}", bytes(64), None)

        old = [{**row, "better_response_id": 1 - row["better_response_id"]} for row in rows]
        hidden = encode(old, ending)
        for place in (".ipynb_checkpoints/a-checkpoint", "_old/a", ".a", ".cache/b/train"):
            files = {f"a.{ending}": content, f"{place}.{ending}": hidden}
            add(f"hidden {place} {ending}", files, expected)
        add(f"only hidden {ending}", {f".git/a.{ending}": content}, None)
        about = {"README.json": b'{"about": "this set"}', "dataset_info.json": b'{"features": {}}'}
        about |= {"stats.json": b'{"rows": 4}', "notes.txt": b"x"}
        add(f"descriptions {ending}", {f"a.{ending}": content, **about}, expected)
        more, others = trl(rng)
        for other in ENDINGS:
            files = {f"a.{ending}": content, f"b/c.{other}": encode(more, other)}
            add(f"mixed schemas {ending} {other}", files, [*expected, *others])

        huge = [{**rows[0], "response_1": "long " * 60_000}]
        long = [(expected[0][0], (expected[0][1][0], huge[0]["response_1"]), expected[0][2])]
        add(f"huge a.{ending}", encode(huge, ending), long)
        words = [{k: str(v) for k, v in row.items()} for row in rows]
        add(f"labels as texts a.{ending}", encode(words, ending), expected)
        lower = [dict(row) for row in words]
        for row in lower:
            for k in ("is_response_0_safe", "is_response_1_safe"):
                row[k] = row[k].lower()
        add(f"labels in lower case a.{ending}", encode(lower, ending), expected)
        ties = [{**row, "better_response_id": -1} for row in rows[:2]] + rows[2:]
        tied = [(p, r, (*x[:2], None, x[3])) for p, r, x in expected[:2]] + expected[2:]
        add(f"ties a.{ending}", encode(ties, ending), tied)
        wrong = [{**row, "safer_response_id": 2} for row in rows]
        add(f"label of 2 a.{ending}", encode(wrong, ending), None)
        empty = [*rows, {**rows[0], "prompt": " ", "response_0": "x"}]
        add(f"empty prompt a.{ending}", encode(empty, ending), None)

        asked = [{("question" if k == "prompt" else k): v for k, v in row.items()} for row in more]
        system = [{"system": "Be exact.", **row} for row in asked]
        instructed = [((("system", "Be exact."), *p), r, x) for p, r, x in others]
        add(f"system and question a.{ending}", encode(system, ending), instructed)
        context = [{**row, "context": "A note."} for row in more]
        noted = [((("user", f"A note.\n\n---\n\n{p[0][1]}"),), r, x) for p, r, x in others]
        add(f"context a.{ending}", encode(context, ending), noted)
        alpaca = [{"instruction": "Shorten.", "input": r["question"], **r} for r in asked]
        for row in alpaca:
            del row["question"]
        short = [((("user", f"Shorten.\n\n{p[0][1]}"),), r, x) for p, r, x in others]
        add(f"instruction and input a.{ending}", encode(alpaca, ending), short)
        vowel = [
            {"instruction": "Is this a vowel?", "input": "a", "chosen": "Yes", "rejected": "No"}
        ]
        asks = [((("user", "Is this a vowel?\n\na"),), ("Yes", "No"), (None, None, 0, 0))]
        add(f"a short input a.{ending}", encode(vowel, ending), asks)
        vowel[0]["instruction"] += "\n\na"
        add(f"a repeated input a.{ending}", encode(vowel, ending), asks)
        both = [{"instruction": "Do it.", **row} for row in asked]
        add(f"two prompts a.{ending}", encode(both, ending), None)
        begun = {"chosen": "The answer is 1.", "rejected": "The answer is 2."}
        add(f"unknown prompt a.{ending}", encode([{"q": "What is 0+1?", **begun}], ending), None)
        guess = [((("user", "The answer is"),), ("1.", "2."), (None, None, 0, 0))]
        add(f"guessed prompt a.{ending}", encode([{"id": "a1", **begun}], ending), guess)

    for ending in ("jsonl", "json", "parquet"):
        answers = {"chosen": [assistant("A")], "rejected": [assistant("B")]}
        labels = (None, None, 0, 0)
        question = (("user", "Q?"),)
        more_turns = {"chosen": [*answers["chosen"], user("And?"), assistant("C")]}
        more_turns["rejected"] = [*answers["chosen"], user("And?"), assistant("D")]
        asked_twice = (*question, ("assistant", "A"), ("user", "And?"))
        whole = {"chosen": [user("Q?"), assistant("A")], "rejected": [user("Q?"), assistant("B")]}
        be_exact = {"role": "system", "content": "Be exact."}
        told = (("system", "Be exact."), *question)
        parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
        image = [{"type": "image", "text": None}, {"type": "text", "text": "?"}]
        conversations: dict[str, tuple[Row, Expected]] = {
            "messages": ({"prompt": [user("Q?")], **answers}, [(question, ("A", "B"), labels)]),
            "text and messages": ({"prompt": "Q?", **answers}, [(question, ("A", "B"), labels)]),
            "implicit": (whole, [(question, ("A", "B"), labels)]),
            "not repeated": ({"prompt": "Q?", **whole}, [(question, ("A", "B"), labels)]),
            "turns": ({"prompt": "Q?", **more_turns}, [(asked_twice, ("C", "D"), labels)]),
            "system prompt": ({"prompt": [be_exact], **whole}, [(told, ("A", "B"), labels)]),
            "system column": ({"system": "Be exact.", **whole}, [(told, ("A", "B"), labels)]),
            "system before a repeated question": (
                {"prompt": [be_exact, user("Q?")], **whole},
                [(told, ("A", "B"), labels)],
            ),
            "contradiction": ({"prompt": "Another?", **whole}, None),
            "two systems": (
                {"system": "Be brief.", "prompt": [be_exact, user("Q?")], **answers},
                None,
            ),
            "no prompt": (answers, None),
            "parts": ({"prompt": [user(parts)], **answers}, [(question, ("A", "B"), labels)]),
            "image": ({"prompt": [user(image)], **answers}, None),
            "half a character": (
                {"prompt": [user("x\ud800"), assistant("y"), user("z")], **answers},
                None,
            ),
            "history": ({"history": [["a", "b"]], "question": "Q?", **answers}, None),
            "in capitals": (
                {"System": "Be exact.", "Question": "Q?", **answers},
                [(told, ("A", "B"), labels)],
            ),
            "tool": ({"prompt": [{"role": "tool", "content": "Q?"}], **answers}, None),
            "no content": ({"prompt": [user(None)], **answers}, None),
            "empty list": ({"prompt": "Q?", "chosen": [], "rejected": []}, None),
            "text parts alone": (
                {"prompt": parts, "chosen": "A", "rejected": "B"},
                [(question, ("A", "B"), labels)],
            ),
        }
        if ending == "parquet":
            del conversations["half a character"]  # cannot be written
        for name, (row, outcome) in conversations.items():
            add(f"{name} a.{ending}", encode([row], ending), outcome)

    rows, expected = pku(rng)
    lines = encode(rows, "jsonl")
    add("byte order mark a.jsonl", b"\xef\xbb\xbf" + lines, expected)
    add("byte order mark a.json", b"\xef\xbb\xbf" + encode(rows, "json"), expected)
    add("lines named json a.json", lines, expected)
    add("blank lines a.jsonl", b"\n \n" + lines.replace(b"\n", b"\n\n"), expected)
    add("CRLF a.jsonl", lines.replace(b"\n", b"\r\n"), expected)
    add("upper case name A.JSONL", lines, expected)
    add("UTF-16 a.jsonl", lines.decode().encode("utf-16"), None)
    add("Latin-1 a.csv", "prompt,chosen,rejected\ncafé,a,b\n".encode("latin-1"), None)
    add("lone surrogate a.jsonl", json.dumps({**rows[0], "prompt": "x\ud800"}).encode(), None)
    add("deep a.jsonl", b'{"prompt": ' + b"[" * 100_000, None)
    add("deep array a.json", b"[" * 100_000, None)
    add("many digits a.jsonl", b'{"prompt": ' + b"7" * 5000 + b"}", None)
    add("large label a.jsonl", json.dumps({**rows[0], "safer_response_id": 10**400}).encode(), None)
    add("scalars a.jsonl", b"1\n2\n", None)
    add("array of arrays a.json", b"[[1, 2]]", None)
    add(
        "an object of columns a.json", json.dumps({"prompt": ["a"], "chosen": ["b"]}).encode(), None
    )
    add(
        "mixed label kinds a.jsonl",
        encode([rows[0], {**rows[1], "safer_response_id": "1"}], "jsonl"),
        None,
    )
    many = [{**row, "safer_response_id": rng.choice([-1, 1])} for row in pku(rng, 40)[0]]
    add("1 and -1 a.jsonl", encode(many, "jsonl"), None)
    add("yes and no a.jsonl", encode([{**rows[0], "is_response_0_safe": "yes"}], "jsonl"), None)
    twice = lines.replace(b'"prompt"', b'"response_0": "x", "prompt"', 1)
    add("a key twice a.jsonl", twice, None)
    add("a key twice a.json", b"[" + twice.splitlines()[0] + b"]", None)
    inner = b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "c", '
    inner += b'"rejected": "d"}'
    add("a nested key twice a.jsonl", inner, None)
    add("a column twice a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", None)
    add("a column twice, spaced a.csv", b"prompt,chosen,rejected, chosen\na,b,c,d\n", None)
    sink = pa.BufferOutputStream()
    arrays = [pa.array([x]) for x in "abcd"]
    pq.write_table(
        pa.Table.from_arrays(arrays, names=["prompt", "chosen", "rejected", "chosen"]), sink
    )
    add("a column twice a.parquet", sink.getvalue().to_pybytes(), None)
    unnamed = b",prompt,chosen,rejected,,\n0,a,b,c,,\n"
    one = [((("user", "a"),), ("b", "c"), (None, None, 0, 0))]
    add("columns without a name a.csv", unnamed, one)
    add("CRLF a.csv", b"prompt,chosen,rejected\r\na,b,c\r\n", one)
    add("spaces in the header a.csv", b"prompt, chosen , rejected\na,b,c\n", one)
    add("a byte order mark a.csv", b"\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n", one)
    messages = json.dumps([user("Q?")]).replace('"', '""')
    add("messages as text a.csv", f'prompt,chosen,rejected\n"{messages}",a,b\n'.encode(), None)
    add("semicolons a.csv", b"prompt;chosen;rejected\na;b;c\n", None)
    add("an open quote a.csv", b'prompt,chosen,rejected\n"a,b,c\n', None)
    add("a field too many a.csv", b"prompt,chosen,rejected\na,b,c,d\n", None)

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    odd: dict[str, Any] = {
        "date overflow": pa.array([2**31 - 1] * 4, pa.int32()).cast(pa.date32()),
        "nanoseconds": pa.array([2**62 + 1] * 4, pa.int64()).cast(pa.timestamp("ns")),
        "far seconds": pa.array([2**50] * 4, pa.int64()).cast(pa.timestamp("s")),
        "duration": pa.array([2**62] * 4, pa.int64()).cast(pa.duration("s")),
        "binary": pa.array([b"\xff\xfe"] * 4),
        "map": pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
        "dates in a list": pa.array([[datetime.date(2020, 1, 1)]] * 4),
        "nothing": pa.nulls(4),
    }
    for name, values in odd.items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({**columns, "created": values}), sink)
        add(f"{name} a.parquet", sink.getvalue().to_pybytes(), expected)
    for name in ("date overflow", "binary"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({**columns, "response_0": odd[name]}), sink)
        add(f"{name} as a response a.parquet", sink.getvalue().to_pybytes(), None)
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.large_string()):
        typed = {**columns, "prompt": pa.array(columns["prompt"]).cast(kind)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(typed), sink)
        add(f"{str(kind)[:10]} a.parquet", sink.getvalue().to_pybytes(), expected)
    sink = pa.BufferOutputStream()
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"prompt": bad, "chosen": ["a"], "rejected": ["b"]}), sink)
    add("not UTF-8 a.parquet", sink.getvalue().to_pybytes(), None)
    whole_file = encode(rows, "parquet")
    for place in (20, len(whole_file) // 2, len(whole_file) - 30):
        damaged = bytearray(whole_file)
        damaged[place : place + 16] = bytes(rng.randrange(256) for _ in range(16))
        # Damage that Parquet does not notice may be read; it must not end in a traceback.
        made[f"damaged at {place} a.parquet"] = ({"a.parquet": bytes(damaged)}, [])
    return made


CASES = cases()


def test_there_are_many() -> None:
    assert len(CASES) >= 150
    refused = sum(expected is None for _, expected in CASES.values())
    assert 60 <= refused <= len(CASES) - 60


@pytest.mark.parametrize("name", CASES)
def test_read_as_the_oracle_says_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    files, expected = CASES[name]
    for file, content in files.items():
        place = tmp_path / "set" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    folder = tmp_path / "set"
    path = folder if len(files) > 1 or "/" in next(iter(files)) else place
    sets = [DataSet(path=str(path))]
    if name.startswith("damaged"):
        with contextlib.suppress(UserError):
            read_pairs(sets, seed=0)
        return
    if expected is None:
        with pytest.raises(UserError) as caught:
            read_pairs(sets, seed=0)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
        return
    pairs, report = read_pairs(sets, seed=0)
    assert [(p.prompt, p.responses, p.labels) for p in pairs] == expected
    assert sum(way.pairs for way in report.read_as) == len(expected)
    assert all("\n" not in line for line in report.lines())
    json.dumps(report.as_dict())
