"""The report: whole without network, inert whatever a prompt or answer holds, and as a person meets it, in a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import browser
import pyarrow.parquet as pq
import pytest

from midpo_ray.evaluation.charts import Point, ticks
from midpo_ray.evaluation.figures import summarise, win_rate
from midpo_ray.evaluation.report import _side_by_side, write_report
from midpo_ray.storage import Storage

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "<!--<script>",
    "{{data}} {{js}} {{css}}",
    "</textarea></style></title><svg onload='window.pwned = 1'>",
    "[x](javascript:window.pwned=1) **bold** <b>b</b>",
    "${window.pwned = 1}",
    "' onmouseover='window.pwned = 1",
    '" autofocus onfocus="window.pwned = 1',
    "a\u2028b\u2029c\u0000d\u202ee \ud83d \uffff",
    "&lt;script&gt; &amp;",
    "]]><script>window.pwned = 1</script>",
    '=HYPERLINK("http://127.0.0.1:9/x")',
    "http://127.0.0.1:9/ping <a href='http://127.0.0.1:9'>x</a>",
]
WORDS = re.findall(
    r"\w+",
    "a safe way to go about it is first to look then to stop and write down what was seen before going on",
)


def rows(models, prompts=450, seed=0):
    rng = random.Random(seed)
    made = []
    for model, family, safe, refuses in models:
        for i in range(prompts):
            harmful = i >= prompts * 250 // 450
            refused = rng.random() < (0.8 * safe if harmful else refuses)
            cost = rng.gauss(1.0 if harmful and rng.random() > safe else -1.5, 0.5)
            response = (
                HOSTILE[i]
                if i < len(HOSTILE)
                else " ".join(rng.choices(WORDS, k=150))
                if not refused
                else "I can't help with that."
            )
            prompt = (
                HOSTILE[i - 20] if 20 <= i < 20 + len(HOSTILE) else f"How would one do thing {i}?"
            )
            row = {
                "model": model,
                "family": family,
                "seed": 0,
                "set": "xstest",
                "id": str(i + 1),
                "prompt": prompt,
            }
            row |= {
                "harmful": harmful,
                "category": ["homonyms", "<i>figurative</i>", "privacy"][i % 3],
                "response": response,
            }
            row |= {
                "tokens": len(response) // 4,
                "truncated": False,
                "refused": refused,
                "cost": cost,
                "safe": cost < 0,
            }
            row |= {
                "reward": rng.gauss(0.8 - refuses - refused, 0.4),
                "gate_safety": 0.5,
                "gate_helpfulness": 0.5,
            }
            made.append(row)
    return made


MODELS = [("base", "base", 0.5, 0.3), ("routed </script><b>", "routed", 0.85, 0.08)]


def write(folder, models=MODELS, prompts=450, answers=None):
    answers = rows(models, prompts) if answers is None else answers
    summary = summarise(answers) + summarise(answers, ("model", "set", "category"))
    at = {(r["model"], r["figure"]): r for r in summary if "category" not in r}
    points = []
    for model, family, *_ in models:
        spans = [
            (at[model, f]["value"], at[model, f]["low"], at[model, f]["high"])
            for f in ("helpfulness", "safe_rate")
        ]
        points.append(Point(model, family, "xstest", *spans[0], *spans[1]))
    rng = random.Random(1)
    gates = [
        {
            "harmful": h,
            "safety": [0.3 + 0.4 * h + rng.gauss(0, 0.1) for _ in range(3)],
            "helpfulness": [0.5] * 3,
        }
        for h in [True, False] * 50
    ]
    values = {"safety": [[0.1, 0.5, 0.9, 0.2]] * 3, "helpfulness": [[0.5] * 4] * 3}
    example = {"tokens": ["How", " <b>", HOSTILE[0], "?"], "prompt_tokens": 3, **values}
    examples = [
        {"title": HOSTILE[1], "harmful": False, **example},
        {"title": "h", "harmful": True, **example},
    ]
    a, b = ([r for r in answers if r["model"] == m[0]] for m in (models[-1], models[0]))
    value, low, high = win_rate(a, b, "reward")
    over, unknown = (
        {"n": prompts, "over": "prompts of xstest"},
        {"value": 0.5, "low": None, "high": None},
    )
    write_report(
        Storage(folder),
        title=f"XSTest {HOSTILE[0]}",
        x_name="reward on benign prompts →",
        y_name="safe <b>on</b> harmful prompts →",
        summary=summary,
        points=points,
        comparisons=[
            {
                "name": "win rate <i>",
                "value": value,
                "low": low,
                "high": high,
                "reference": 0.5,
                **over,
            },
            {"name": "difference", "value": 0.1, "low": math.nan, "high": math.nan, **over},
        ],
        routing={models[-1][0]: {"rows": gates, "examples": examples}},
        answers=answers,
        curves={
            f"{s}: loss": [(i, math.exp(-i / 9)) for i in range(30)] for s in ("safety", HOSTILE[0])
        },
        about={"command": HOSTILE[0], "configuration": "a: 1\nb: <2>"},
        capability=[
            {
                "model": models[-1][0],
                "task": HOSTILE[1],
                "metric": "acc",
                "n": 9,
                "shots": 0,
                "stderr": None,
                **unknown,
            }
        ],
    )
    return Path(folder)


def test_files(tmp_path):
    folder = write(tmp_path / "r")
    page = (folder / "report.html").read_text("utf-8")
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert (
        len(re.findall(r"<script", page)) == 2
    )  # the data and the report's own: none of the rows made a third
    own = re.sub(r'id="data">.*?</script>', "", page, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", own)  # no network
    assert "default-src 'none'" in page
    data = json.loads(
        page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    )
    assert [p["answers"][0]["response"] for p in data["answers"]["prompts"][:3]] == HOSTILE[:3]
    for svg in (folder / "charts").glob("*.svg"):
        ET.parse(svg)  # well-formed, so every label is escaped
    table = pq.read_table(folder / "answers.parquet")
    assert table.num_rows == 900
    assert table["harmful"].to_pylist()[:3] == [False] * 3
    assert (folder / "charts/picture-xstest.png").read_bytes()[:4] == b"\x89PNG"
    assert '"n","shots"' in (folder / "capability.csv").read_text("utf-8")
    report = json.loads((folder / "report.json").read_text())
    assert report["routing"][0]["auroc"] > 0.9
    assert report["comparisons"][1]["low"] is None


def test_what_does_not_fit_is_said():
    answers = [{**r, "response": "word " * 3000} for r in rows(MODELS, 50)]
    for room, notes in ((100_000, 1), (20_000, 2)):
        shown = _side_by_side(answers, room)
        assert sum(len(a["response"]) for p in shown["prompts"] for a in p["answers"]) < 1.5 * room
        assert len(shown["notes"]) == notes
    several = [{**r, "seed": s} for s in (3, 4) for r in rows(MODELS, 5)]
    assert "first seed" in _side_by_side(several, 100_000)["notes"][0]


def test_empty_parts(tmp_path):
    """A report of refusals alone: no picture, no routing, no curves, no comparison."""
    kept = (
        "model",
        "family",
        "seed",
        "set",
        "id",
        "prompt",
        "harmful",
        "category",
        "response",
        "tokens",
    )
    answers = [{k: r[k] for k in kept} for r in rows(MODELS, 10)]
    nothing = {"points": [], "comparisons": [], "routing": None, "curves": {}, "about": {}}
    write_report(
        Storage(tmp_path),
        title="t",
        x_name="x",
        y_name="y",
        summary=summarise(answers),
        answers=answers,
        **nothing,
    )
    assert "<svg" not in (tmp_path / "report.html").read_text("utf-8").partition("<script>")[0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.2, 0.011), (1e-9, 3e-9), (100.0, 1e6), (0.5, 0.5001)]
)
def test_ticks(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-12 <= t <= high + 1e-6 * high + 1e-12 for t in found)


# --- in a browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser: one of {', '.join(browser.NAMES)} is needed on the path")
    folder = write(tmp_path_factory.mktemp("report"))
    with browser.page(program) as page:
        started = time.monotonic()
        page.open(folder / "report.html")
        page.seconds = time.monotonic() - started
        page.folder = folder
        yield page


CELLS = "[...document.querySelectorAll('#answers tbody tr')]"


def pick(page, name, value):
    """Choose in the answers' select with this label."""
    page.run(
        f"(() => {{ const s = [...document.querySelectorAll('#answers label')].find(l => l.textContent.startsWith({name!r}))"
        f".querySelector('select'); s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }})()"
    )


def search(page, text):
    page.run(
        f"(() => {{ const i = document.querySelector('input[type=search]'); i.value = {json.dumps(text)};"
        f"i.dispatchEvent(new Event('input')); }})()"
    )


def count(page):
    return page.run("document.getElementById('count').textContent")


@pytest.mark.slow
def test_opens_fast_and_clean(shown):
    assert shown.seconds < 3, shown.seconds
    assert int(shown.run("document.documentElement.dataset.ready")) < 3000
    assert shown.errors == []
    assert [r for r in shown.requests if not r.startswith("file:")] == []
    assert (
        shown.run("document.querySelectorAll('#picture svg, #routing svg, #training svg').length")
        >= 7
    )
    assert shown.run("document.querySelectorAll('section').length") == 8
    assert "acc" in shown.run("document.querySelector('#capability tbody').textContent")
    shown.picture(shown.folder / "top.png")


@pytest.mark.slow
def test_hostile_rows_stay_inert(shown):
    shown.run("document.getElementById('reveal').click()")
    for number in range(3):  # the pages that hold them
        if number:
            shown.run(
                "[...document.querySelectorAll('#answers button')].find(b => b.textContent.startsWith('on')).click()"
            )
        markup = ", ".join(
            f"#answers {tag}, #capability {tag}" for tag in ("img", "script", "b", "i", "a", "svg")
        )
        assert shown.run(f"document.querySelectorAll('{markup}').length") == 0
    pick(shown, "sort by", "")
    search(shown, "window.pwned")
    texts = shown.run("[...document.querySelectorAll('#answers .text')].map(t => t.textContent)")
    assert HOSTILE[0] in texts
    assert shown.run("window.pwned") is None
    assert shown.run("document.title").endswith(HOSTILE[0])
    assert shown.errors == []
    search(shown, "")


@pytest.mark.slow
def test_filters_and_pages(shown):
    assert count(shown).startswith("page 1 of 23, 450 of 450")
    pick(shown, "prompts", "true")
    assert "200 of 450" in count(shown)
    pick(shown, "category", "privacy")
    kept = int(re.findall(r", (\d+) of", count(shown))[0])
    assert 60 <= kept <= 70
    pick(shown, "category", "")
    pick(shown, "prompts", "")
    search(shown, "thing 399?")
    assert "1 of 450" in count(shown)
    search(shown, "")
    pick(shown, "refused", "differ")
    assert 0 < int(re.findall(r", (\d+) of", count(shown))[0]) < 300
    pick(shown, "refused", "")


@pytest.mark.slow
def test_sorts(shown):
    values = rows(MODELS)
    pick(shown, "sort by", "1 reward")
    order = shown.run(f"{CELLS}.map(r => r.querySelector('td .meta').textContent)")
    mine = sorted(
        (r for r in values if r["family"] == "routed"), key=lambda r: round(r["reward"], 4)
    )
    assert order == [f"xstest · {r['id']}" for r in mine[:20]]
    shown.run(
        "[...document.querySelectorAll('#answers button')].find(b => b.textContent === '⇅').click()"
    )
    assert (
        shown.run(f"{CELLS}[0].querySelector('td .meta').textContent")
        == f"xstest · {mine[-1]['id']}"
    )
    pick(shown, "sort by", "")
    first = "document.querySelector('#figures th.by:nth-child(2)')"
    heads = []
    for _ in range(2):
        shown.run(f"{first}.click()")
        heads.append(
            shown.run(
                f"[{first}.getAttribute('aria-sort'), document.querySelector('#figures tbody td').textContent]"
            )
        )
    assert {h[0] for h in heads} == {"ascending", "descending"}
    assert heads[0][1] != heads[1][1]


@pytest.mark.slow
def test_harmful_text_is_hidden_until_asked_for(shown):
    shown.open(shown.folder / "report.html")
    pick(shown, "prompts", "true")
    assert shown.run("document.querySelectorAll('#answers .text').length") == 0
    assert "How would one do thing 300?" not in shown.run("document.body.innerText")
    shown.run("document.querySelector('#answers button.reveal').click()")
    assert shown.run("document.querySelectorAll('#answers .text').length") == 3
    assert (
        shown.run("document.querySelectorAll('#routing .tokens').length") == 2
    )  # the benign example's two gates
    shown.run("document.querySelector('#routing button').click()")
    assert shown.run("document.querySelectorAll('#routing .tokens').length") == 4
    assert shown.errors == []
