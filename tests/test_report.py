"""Reports: whole without network, inert whatever a text holds, and as a person meets them, in a browser."""

from __future__ import annotations

import json
import math
import random
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from midpo_ray.evaluation.report import answers_table, write_report
from midpo_ray.evaluation.results import over_prompts, summary_text, training_curves
from midpo_ray.metrics import Estimate, difference, win_rate
from midpo_ray.report import plots
from midpo_ray.report.page import AnswerBrowser, Page, PageSection, PageTable, TokenMap, write_page
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


def write(folder, models=MODELS):
    answers = answers_table(rows(models)).to_pandas()
    rng = random.Random(1)
    gates = []
    for harmful in [True, False] * 50:
        safety = [0.3 + 0.4 * harmful + rng.gauss(0, 0.1) for _ in range(3)]
        gates.append({"harmful": harmful, "safety": safety, "helpfulness": [0.5] * 3})
    values = {"safety": [[0.1, 0.5, 0.9, 0.2]] * 3, "helpfulness": [[0.5] * 4] * 3}
    example = {"tokens": ["How", " <b>", HOSTILE[0], "?"], "prompt_tokens": 3, **values}
    examples = [
        {"title": HOSTILE[1], "harmful": False, **example},
        {"title": "h", "harmful": True, **example},
    ]
    task = {"model": models[-1][0], "task": HOSTILE[1], "metric": "acc", "n": 9, "shots": 0}
    curve = [(i, math.exp(-i / 9)) for i in range(30)]
    write_report(
        Storage(folder),
        f"XSTest {HOSTILE[0]}",
        over_prompts(answers, [(models[-1][0], models[0][0])]),
        answers,
        routing={models[-1][0]: {"rows": gates, "examples": examples}},
        curves={f"{stage}: loss": curve for stage in ("safety", HOSTILE[0])},
        about={"command": HOSTILE[0], "configuration": "a: 1\nb: <2>"},
        capability=pd.DataFrame([{**task, "value": 0.5, "low": None, "high": None}]),
    )
    return Path(folder)


def data_of(page: str) -> dict:
    return json.loads(
        page.partition('<script type="application/json">')[2].partition("</script>")[0]
    )


def test_files(tmp_path):
    folder = write(tmp_path / "r")
    page = (folder / "report.html").read_text("utf-8")
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert len(re.findall(r"<script", page)) == 2  # the answers and the page's own
    own = re.sub(r'<script type="application/json">.*?</script>', "", page, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)", own)  # no network
    assert "default-src 'none'" in page
    assert [p["answers"][0]["response"] for p in data_of(page)["prompts"][:3]] == HOSTILE[:3]
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64', own)) == 1 + 2 + 5 + 1
    names = {p.stem for p in (folder / "charts").glob("*.svg")}
    assert names == {p.stem for p in (folder / "charts").glob("*.png")}
    assert {"tradeoff-xstest", "comparisons-win-rates", "training-loss"} <= names
    table = pq.read_table(folder / "answers.parquet")
    assert table.num_rows == 900
    assert table["harmful"].to_pylist()[:3] == [False] * 3
    assert "n,shots" in (folder / "capability.csv").read_text("utf-8")
    columns = {"model", "set", "metric", "value", "low", "high", "prompts", "nulls", "category"}
    assert {*pd.read_csv(folder / "summary.csv")} == columns


def test_numbers_of_the_files_are_those_of_metrics(tmp_path):
    folder = write(tmp_path)
    report = json.loads((folder / "report.json").read_text())
    answers = pq.read_table(folder / "answers.parquet").to_pandas()
    routed, base = (answers[answers["model"] == m[0]] for m in reversed(MODELS))
    lines = {line["name"].rpartition(": ")[2]: line for line in report["comparisons"]}
    for name, estimate in (
        ("win rate, reward, all", win_rate(routed, base)),
        ("safe, harmful", difference(routed, base, "safe_rate")),
    ):
        assert [lines[name][k] for k in ("value", "low", "high", "n")] == pytest.approx([*estimate])
    assert {line["reference"] for line in report["comparisons"]} == {0.5, 0.0}
    assert report["routing"][0]["auroc"] > 0.9
    assert report["routing"][0]["safety_harmful"] == pytest.approx(0.7, abs=0.05)
    assert "safe, harmful" in summary_text(over_prompts(answers).summary).splitlines()[0]


def test_a_report_of_refusals_alone(tmp_path):
    """Without rewards, routing, curves and comparisons: the axes are refusals, benign ones as 1 - rate."""
    kept = ("model", "family", "seed", "set", "id", "prompt", "harmful", "category", "response")
    found = [{k: r[k] for k in (*kept, "refused")} for r in rows(MODELS)]
    answers = answers_table(found).to_pandas()
    results = over_prompts(answers)
    whole = results.summary[results.summary["category"].isna()].set_index(["model", "metric"])
    refused = whole.loc[("base", "refusal_benign")]
    point = results.points.set_index("label").loc["base"]
    expected = [1 - refused["value"], 1 - refused["high"], 1 - refused["low"]]
    assert point[["x", "x_low", "x_high"]].tolist() == pytest.approx(expected)
    write_report(Storage(tmp_path), "t", results, answers)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert [s for s in ("Routing", "Training", "Comparisons") if f"<h2>{s}</h2>" in page] == []


def test_training_curves_are_thinned(tmp_path):
    lines = [{"split": "train", "step": s, "loss": float(s), "note": "x"} for s in range(1000)]
    lines.append({"split": "validation", "step": 1, "loss": 9.0})
    run = Storage(tmp_path)
    run.write("metrics/safety.jsonl", "\n".join(map(json.dumps, lines)).encode())
    curves = training_curves([("run", run)])
    assert list(curves) == ["safety of run: loss"]
    assert len(curves["safety of run: loss"]) == 200
    assert curves["safety of run: loss"][1] == (5.0, 5.0)


# --- the page -------------------------------------------------------------------------------------


def test_tables_show_values_intervals_and_the_best(tmp_path):
    values = [Estimate(0.25, 0.2, 0.3, 9), Estimate(0.5, math.nan, math.nan, 1), None]
    frame = pd.DataFrame({"model": ["<b>", "b", "c"], "loss": values, "rate": [0.5, 0.25, 0.125]})
    table = PageTable(frame, better={"loss": "low", "rate": "high"}, shares=["rate"])
    assert [head["arrow"] for head in table.heads()] == ["", "↓", "↑"]
    cells = list(zip(*table.lines(), strict=True))
    assert [c["text"] for c in cells[1]] == ["0.250", "0.500", "–"]
    assert [c["interval"] for c in cells[1]] == ["0.200 to 0.300", "", ""]
    assert [c["best"] for c in cells[1]] == [True, False, False]
    assert [c["text"] for c in cells[2]] == ["50.0%", "25.0%", "12.5%"]
    sections = [PageSection("S", [table]), PageSection("no part at all", [])]
    write_page(Storage(tmp_path), Page("<i>", sections, summary=["<u>"]))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search("<(b|i|u)>", page)
    assert "no part at all" not in page


def test_harmful_tokens_are_inert_until_clicked(tmp_path):
    parts = [TokenMap("t", ["kill"], {"g": [0.5]}, 1, hidden=hidden) for hidden in (True, False)]
    write_page(Storage(tmp_path), Page("t", [PageSection("S", parts)]))
    page = (tmp_path / "report.html").read_text("utf-8")
    inside = "".join(re.findall("<template>.*?</template>", page, flags=re.S))
    assert (inside.count("kill"), page.count("kill")) == (1, 2)


def test_what_does_not_fit_is_counted():
    long = [{**r, "response": "word " * 3000} for r in rows(MODELS, 50)]
    answers = answers_table(long).to_pandas()
    for room, notes in ((300_000, 1), (20_000, 2)):
        shown = AnswerBrowser(answers, room=room).data()
        found = [a["response"] for p in shown["prompts"] for a in p["answers"]]
        assert sum(map(len, found)) < 1.5 * room
        assert len(shown["notes"]) == notes
    several = [{**r, "seed": s} for s in (3, 4) for r in rows(MODELS, 5)]
    shown = AnswerBrowser(answers_table(several).to_pandas(), first=[MODELS[1][0]]).data()
    assert len(shown["notes"]) == 1
    assert (len(shown["prompts"]), shown["first"]) == (5, [1])


# --- plots ----------------------------------------------------------------------------------------


def systems(count: int) -> pd.DataFrame:
    point = {"family": "expert", "x_low": 0.0, "x_high": 0.5, "y_low": math.nan, "y_high": math.nan}
    values = np.random.default_rng(0).random(count)
    found = [
        {"label": f"$m_{i}$ {HOSTILE[i % 9]}", "x": v, "y": -v, **point}
        for i, v in enumerate(values)
    ]
    return pd.DataFrame(found)


def drawn() -> dict[str, plots.Plot]:
    trials = pd.DataFrame({"lambda": [0.0, 0.1, math.inf], "lr": [1e-5, 1e-4, 1e-3]})
    trials["name"], trials["state"] = ["a", "b", "<"], ["finished", "stopped", "failed"]
    trials["loss"] = [0.5, 0.4, 0.3]
    estimates = pd.DataFrame({"name": ["<a>", "b"], "value": [0.1, 0.2]})
    estimates = estimates.assign(low=[0.0, math.nan], high=[0.2, math.nan])
    named = {HOSTILE[0]: ([0, 1, 2], [1.0, math.nan, 3.0]), "_b": ([0], [1.0])}
    curves = {"1": ([0, 1], [1, 2]), "2": ([0, 1], [2, 1])}
    found = [
        plots.tradeoff("few", systems(3), "x", "y", HOSTILE[9]),
        plots.tradeoff("many", systems(20), "x", "y"),
        plots.lines("lines", named, "layer", "y", integers=True),
        plots.lines("grouped", curves, "x", "y", groups={"1": "stopped", "2": "stopped"}),
        plots.histogram("histogram", {"harmful": [0.1, 0.9], "benign": []}, "gate"),
        plots.scatter("state", trials, "lr", "loss", group="state"),
        plots.scatter("value", trials, "lambda", "name", value="loss"),
        plots.forest("a/b c", estimates, 0.5),
    ]
    return {plot.name: plot for plot in found}


def test_plots_are_well_formed_and_the_same_twice():
    first, second = drawn(), drawn()
    for name, plot in first.items():
        ET.fromstring(plot.svg)  # every label is escaped, and of characters that XML allows
        assert (plot.svg, plot.png) == (second[name].svg, second[name].png)
        assert plot.png[:4] == b"\x89PNG"
    assert "a-b-c" in first


def labels(plot: plots.Plot) -> list[str]:
    found = ET.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(e.itertext()).strip() for e in found]


def test_axes_and_labels():
    found = {name: labels(plot) for name, plot in drawn().items()}
    assert found["lines"][:3] == ["0", "1", "2"]
    assert {"0.0", "0.1", "∞", "a", "b", "<"} <= {*found["value"]}
    assert {"finished", "stopped", "failed"} <= {*found["state"]}
    assert any(t.startswith("$m_1$") for t in found["few"])  # no label is read as math
    assert "stopped" not in found["grouped"]  # a legend of one group is left out


# --- in a browser ---------------------------------------------------------------------------------


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


LINES = "[...document.querySelectorAll('.answers tbody tr')]"


def pick(page, name, value):
    """Choose in the answers' select of this name."""
    page.run(
        f"(() => {{ const s = document.querySelector('.answers select[name={json.dumps(name)}]');"
        f"s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }})()"
    )


def search(page, text):
    page.run(
        "(() => { const i = document.querySelector('input[type=search]');"
        f"i.value = {json.dumps(text)}; i.dispatchEvent(new Event('input')); }})()"
    )


def count(page):
    return page.run("document.querySelector('.count').textContent")


def kept(page):
    return int(re.findall(r", (\d+) of", count(page))[0])


@pytest.mark.slow
def test_opens_fast_and_clean(shown):
    assert shown.seconds < 3, shown.seconds
    assert int(shown.run("document.documentElement.dataset.ready")) < 3000
    assert shown.errors == []
    assert [r for r in shown.requests if not r.startswith(("file:", "data:"))] == []
    sizes = shown.run("[...document.images].map(i => i.naturalWidth)")
    assert len(sizes) == 9
    assert all(size > 100 for size in sizes)
    assert shown.run("document.querySelectorAll('section').length") == 8
    shown.picture(shown.folder / "top.png")


@pytest.mark.slow
def test_hostile_rows_stay_inert(shown):
    shown.run("document.querySelector('.reveal-all').click()")
    for number in range(3):  # the pages that hold them
        if number:
            shown.run("document.querySelector('.answers button.next').click()")
        markup = ", ".join(f".answers {tag}" for tag in ("img", "script", "b", "i", "a", "svg"))
        assert shown.run(f"document.querySelectorAll('{markup}').length") == 0
    search(shown, "window.pwned")
    texts = shown.run("[...document.querySelectorAll('.answers .text')].map(t => t.textContent)")
    assert HOSTILE[0] in texts
    assert shown.run("window.pwned") is None
    assert shown.run("document.title").endswith(HOSTILE[0])
    assert shown.errors == []
    search(shown, "")


@pytest.mark.slow
def test_filters_and_pages(shown):
    assert count(shown).startswith("page 1 of 23, 450 of 450")
    pick(shown, "prompts", "true")
    assert kept(shown) == 200
    pick(shown, "category", "privacy")
    assert 60 <= kept(shown) <= 70
    pick(shown, "category", "")
    pick(shown, "prompts", "")
    search(shown, "thing 399?")
    assert kept(shown) == 1
    search(shown, "")
    pick(shown, "refused", "differ")
    assert 0 < kept(shown) < 300
    pick(shown, "refused", "")


@pytest.mark.slow
def test_sorts(shown):
    pick(shown, "sort by", "1 reward")
    order = shown.run(f"{LINES}.map(r => r.querySelector('td .meta').textContent)")
    routed = [r for r in rows(MODELS) if r["family"] == "routed"]
    routed.sort(key=lambda r: round(r["reward"], 4))
    assert order == [f"xstest · {r['id']}" for r in routed[:20]]
    pick(shown, "order", "descending")
    first = shown.run(f"{LINES}[0].querySelector('td .meta').textContent")
    assert first == f"xstest · {routed[-1]['id']}"
    pick(shown, "sort by", "")
    table = "document.querySelectorAll('table.sortable')[0]"
    head = f"{table}.querySelectorAll('th')[1]"
    seen = []
    for _ in range(2):
        shown.run(f"{head}.querySelector('button').click()")
        cell = f"{table}.querySelector('tbody td').textContent"
        seen.append(shown.run(f"[{head}.getAttribute('aria-sort'), {cell}]"))
    assert [s[0] for s in seen] == ["ascending", "descending"]
    assert seen[0][1] != seen[1][1]


@pytest.mark.slow
def test_harmful_text_is_hidden_until_asked_for(shown):
    shown.open(shown.folder / "report.html")
    pick(shown, "prompts", "true")
    assert shown.run("document.querySelectorAll('.answers .text').length") == 0
    assert "How would one do thing 300?" not in shown.run("document.body.innerText")
    shown.run("document.querySelector('.answers button.reveal').click()")
    assert shown.run("document.querySelectorAll('.answers .text').length") == 3
    tokens = "document.querySelectorAll('section span.token').length"
    assert shown.run(tokens) == 8  # four tokens of the benign example, for two gates
    shown.run("document.querySelector('section > button.reveal').click()")
    assert shown.run(tokens) == 16
    assert shown.errors == []
