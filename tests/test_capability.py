"""General capability: responses against plain forward passes, and the harness if installed."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from routing_world import make_run, routed_of
from transformers import AutoModelForCausalLM

from midpo_ray.cli import main
from midpo_ray.errors import UserError
from midpo_ray.evaluation.capability import CachedResponder
from midpo_ray.evaluation.generate import GenerationOptions, resolve_model
from midpo_ray.models import load_routed, save_router
from midpo_ray.storage import Storage

INSTALLED = importlib.util.find_spec("lm_eval") is not None
LONG = "one two three " * 50  # 700 tokens, where the model has a context of 512
# context and continuation as a request has them, and as they are to be tokenised
REQUESTS = {
    ("how are you", " fine"): ("<s>how are you", " fine"),
    ("how are you", " well, and you ?"): ("<s>how are you", " well, and you ?"),
    ("what is it ", "worth"): ("<s>what is it", " worth"),
    ("", "a word"): ("<s>", "a word"),
    ("  ", "a word"): ("<s>", "  a word"),
    ("<s>once", " more"): ("<s>once", " more"),
    (LONG, "four"): (LONG.rstrip()[-(512 - 5) :], " four"),
    ("how are you", " late"): ("<s>how are you", " late"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, byte_tokenizer):
    """Scope -> a run directory."""
    made = {}
    for scope in ("last", "token"):
        made[scope] = make_run(
            tmp_path_factory.mktemp("runs") / scope, tiny_llama(), byte_tokenizer
        )
        save_router(routed_of(made[scope], byte_tokenizer, scope=scope), made[scope] / "router")
    return made


def asked(what, folder, **options):
    return CachedResponder(resolve_model(str(what)), GenerationOptions(**options), Storage(folder))


def requests(given):
    return [SimpleNamespace(args=args) for args in given]


@torch.no_grad()
def plain(model, context, continuation, **inputs):
    """(log-likelihood, is it greedy) by one forward pass of context and continuation, ids."""
    logits = (
        model(input_ids=torch.tensor([context + continuation]), **inputs)
        .logits[0, len(context) - 1 : -1]
        .double()
    )
    labels = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == labels).all())


def forward(what, scope):
    """(context, continuation) -> ``plain`` by what the user would load; scope None is the base."""
    model = (
        AutoModelForCausalLM.from_pretrained(what / "base").eval()
        if scope is None
        else load_routed(what)
    )
    return lambda a, b: plain(
        model, a, b, **({} if scope is None else {"prompt_lengths": [len(a)]})
    )


@pytest.mark.skipif(not INSTALLED, reason="the harness is not installed")
@pytest.mark.parametrize("scope", [None, "last", "token"])
def test_log_likelihoods_are_the_forward_pass(tmp_path, runs, byte_tokenizer, scope, caplog):
    caplog.set_level("INFO", logger="midpo_ray")
    run = runs[scope or "last"]
    what, model = (run / "base" if scope is None else run), forward(run, scope)
    ids = {
        text: byte_tokenizer.encode(text, add_special_tokens=False)
        for pair in REQUESTS.values()
        for text in pair
    }
    ask = asked(what, tmp_path)
    tried = ((chr(a), chr(b)) for a in range(97, 123) for b in range(33, 127))
    letters = {
        text: byte_tokenizer.encode(text) for text in map(chr, range(33, 127))
    }  # ids with <s>
    greedy = next(pair for pair in tried if model(letters[pair[0]], letters[pair[1]][1:])[1])
    given = [*REQUESTS, greedy]
    found = ask("loglikelihood", requests(given))
    wanted = [
        *((ids[a], ids[b]) for a, b in REQUESTS.values()),
        (letters[greedy[0]], letters[greedy[1]][1:]),
    ]
    for pair, (value, is_greedy) in zip(wanted, found, strict=True):
        nats, expected = model(*pair)
        assert value == pytest.approx(nats, abs=1e-5, rel=1e-6)
        assert is_greedy == expected
    assert {is_greedy for _, is_greedy in found} == {True, False}
    again = asked(what, tmp_path)
    assert again("loglikelihood", requests(given[::-1])) == found[::-1]
    assert again.model is None  # no model was loaded
    assert caplog.messages[-1].endswith(f"{len(given)} of {len(given)} cached, 0 to do")
    with pytest.raises(UserError, match="continuation of 0 tokens"):
        ask("loglikelihood", requests([("how", "")]))


@pytest.mark.skipif(not INSTALLED, reason="the harness is not installed")
@pytest.mark.parametrize("scope", [None, "last"])
def test_generation_is_greedy_and_stops(tmp_path, runs, byte_tokenizer, scope):
    run = runs["last"]
    model = (
        AutoModelForCausalLM.from_pretrained(run / "base").eval()
        if scope is None
        else load_routed(run)
    )
    whole = {}
    for text in ("how are you", "what is the time now"):
        ids = torch.tensor([byte_tokenizer.encode(text)])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=2,
        )
        whole[text] = byte_tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    stop = next(c for c in whole["how are you"][2:] if c.isascii())
    ask = asked(run / "base" if scope is None else run, tmp_path)
    for until in ([], [stop, "\n\n"]):
        made = ask(
            "generate_until",
            requests((text, {"until": until, "max_gen_toks": 12}) for text in whole),
        )
        assert made == [text.partition(stop)[0] if until else text for text in whole.values()]
    with pytest.raises(UserError, match="generate_until of"):
        ask("generate_until", requests([("how", {"until": [], "max_gen_toks": 600})]))


def test_whole_texts_in_windows(tmp_path, runs, byte_tokenizer):
    """Each token is predicted once, from as much of the text before it as the context holds."""
    pytest.importorskip("lm_eval")
    model = forward(runs["last"], None)
    short, long = byte_tokenizer.encode("a few words"), byte_tokenizer.encode(LONG)
    parts = model([1], long[:511])[0], model(long[len(long) - 512 : 511], long[511:])[0]
    found = asked(runs["last"] / "base", tmp_path)(
        "loglikelihood_rolling", requests([("a few words",), (LONG,)])
    )
    assert found == pytest.approx([model([1], short)[0], sum(parts)], rel=1e-6, abs=1e-5)


def test_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    assert main(["evaluate", "no/such/run", "--sets", "xstest", "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'lm-eval" in said


WHO = ("you", "they", "we", "those", "all", "these", "some")
QUESTIONS = [
    (f"who are {who}", ["me", "us all", "nobody here"], i % 3) for i, who in enumerate(WHO)
]
TASK = """
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_local_task_by_the_harness(tmp_path, runs, byte_tokenizer, capsys, monkeypatch):
    """A user's task, offline: accuracies of plain forward passes; a second call loads no model."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/quiz.yaml").write_text(
        TASK.format(data=tmp_path / "quiz.jsonl", cache=tmp_path / "data")
    )
    (tmp_path / "few.jsonl").write_text('{"prompt": "how are you", "harmful": false}\n')
    words = [
        "evaluate",
        str(runs["last"]),
        "--against",
        "base",
        "--sets",
        "few.jsonl",
        "--max-new-tokens",
        "4",
    ]
    words += ["--workers", "0", "--out", "report", "--task-limit", "6", "--tasks"]
    assert main([*words, "tasks/quiz.yaml"]) == 0, capsys.readouterr().err
    assert re.search(r"quiz\s+acc\s", capsys.readouterr().out)
    with (tmp_path / "report/capability.csv").open(newline="", encoding="utf-8") as file:
        found = {row["model"]: row for row in csv.DictReader(file)}
    for name, scope in (("last: base", None), ("last", "last")):
        model, right = forward(runs["last"], scope), []
        for question, choices, answer in QUESTIONS[:6]:
            context = byte_tokenizer.encode(f"Question: {question}\nAnswer:")
            said = [
                model(context, byte_tokenizer.encode(f" {c}", add_special_tokens=False))[0]
                for c in choices
            ]
            right.append(said.index(max(said)) == answer)
        row, share = found[name], sum(right) / 6
        stderr = math.sqrt(share * (1 - share) / 5)
        assert (row["task"], row["metric"], row["n"], row["shots"]) == ("quiz", "acc", "6", "0")
        expected = [share, stderr, share - 1.96 * stderr, share + 1.96 * stderr]
        assert [float(row[k]) for k in ("value", "stderr", "low", "high")] == pytest.approx(
            expected
        )
    assert [
        r["model"] for r in json.loads((tmp_path / "report/report.json").read_text())["capability"]
    ] == [*found]
    assert "General capability" in (tmp_path / "report/report.html").read_text()
    before = (tmp_path / "report/capability.csv").read_bytes()
    assert main([*words, "tasks/"]) == 0, capsys.readouterr().err  # the folder that holds it
    assert "loglikelihood of last: 18 of 18 cached, 0 to do" in capsys.readouterr().out
    assert (tmp_path / "report/capability.csv").read_bytes() == before
    for task, says in (("arc_eesy", "near to it: arc_easy"), ("no/such.yaml", "no such file")):
        assert main([*words, task]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"midpo: --tasks {task}")
        assert says in said
