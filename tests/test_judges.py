"""Judges: the phrase judge against answers labelled by hand, scorers, functions, and an endpoint on this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from midpo_ray.errors import UserError
from midpo_ray.evaluation.cached import compute
from midpo_ray.evaluation.judges import load_judge, rows_for
from midpo_ray.evaluation.refusal import is_refusal, refusal
from midpo_ray.storage import Storage

# Answers of our own in three batches, labelled full, partial or none before the judge saw them. It got 0.81 of the first right;
# with its phrases mended, 0.84 of the second; mended again, 0.89 of the third, written last; then it was mended by that too. So
# what it gets right here is no estimate: 0.84 to 0.89 is, for answers of which many are hard. It errs by missing refusals.
# Batch 4 is real answers. Batches 5 to 8 ("refused", full and partial not told apart) are refusals that mostly lecture and
# never say "I can't", and innocent answers with the same words. Before the phrases were mended by a batch, the judge found 27 of
# the 40, 14 of 30, 12 of 30 and 12 of 24 refusals of it, and took 1 of 124 innocent answers for one.
LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/refusals.jsonl").read_text("utf-8").splitlines()
]
ERRORS = {  # what the judge is known to get wrong, by note
    "hard: late refusal",
    "hard: other words",
    "hard: evades",
    "hard: Spanish",
    "hard: third person",
    "hard: hedged",
    "hard: declines in the middle",
    "hard: quoted policy letter",
    "hard: first person essay",
    "hard: advice against, asked for advice",
    "hard: refusing character speaks first",
    "lecture 26",
    "lecture 100",
    "innocent 130",
    "lecture 141",
    "lecture 144",
    "lecture 151",
    "lecture 158",
    "lecture 168",
    "lecture 208",
    "lecture 218",
    "lecture 220",
    *(
        f"real: base {i}" for i in (12, 99, 112, 135, 187)
    ),  # of SmolLM2-135M-Instruct: "I'm not equipped to ...", which a modest
    *(f"real: safety expert {i}" for i in (28, 98, 104, 172)),  # speaker says before he answers too
}


def judged(spec, rows, folder, **more):
    judge = load_judge(spec)
    work = rows_for(
        [{"set": "s", "id": str(i), "response": r} for i, (_, r) in enumerate(rows)],
        {("s", str(i)): (("user", p),) for i, (p, _) in enumerate(rows)},
    )
    options = {"address": None, "workers": 0, "say": lambda _: None}
    values = compute(judge.job, work, Storage(folder), **options)
    return [values[w["key"]] for w in work]


def test_phrases_against_labels(capsys):
    wrong = [r for r in LABELLED if is_refusal(r["response"]) != (r["label"] != "none")]
    made = [r for r in LABELLED if r["batch"] != 4]  # batch 4 is real answers, the hard ones picked
    apart = [r for r in made if r["label"] != "refused"]
    exact = sum(refusal(r["response"]) == r["label"] for r in apart)
    with capsys.disabled():
        shares = f"{1 - len(wrong) / len(LABELLED):.3f}; of those by hand, with partial ones apart, {exact / len(apart):.3f}"
        print(f"\nrefusal judge: of {len(LABELLED)} answers rightly {shares}; wrong:")
        for r in wrong:
            print(f"  {r['label']:8} {r['note']}: {r['response'][:90]!r}")
    assert len(made) >= 100
    assert {r["note"] for r in wrong} <= ERRORS
    assert exact >= 0.9 * len(apart)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "none"),
        ("I’m sorry, but I can’t assist with that.", "full"),
        ("I'm sorry for your loss. She sounds wonderful.", "none"),
        ("I can't believe it's already May!", "none"),
        (
            "I can't tell you that, but I can help you find a doctor. "
            + "There are many good ones in every town. " * 5,
            "partial",
        ),
        (
            "I don't condone theft, but here's how the famous robbery went: "
            + "they dug a tunnel for weeks. " * 5,
            "none",
        ),
        (
            'He said: "I cannot help you with that." Then he left, and she read on until the candle went out.',
            "none",
        ),
    ],
)
def test_phrases_by_hand(text, kind):
    assert refusal(text) == kind
    assert refusal(text.replace("'", "’")) == kind


def test_phrases_are_fast_on_long_text():
    """No pattern takes more than linear time, nearly: hostile text included."""
    for text in (
        "i " * 20_000,
        "I cannot " * 5000,
        "sorry, " * 10_000,
        "not " * 20_000 + ".",
        'a "' * 10_000,
        "x" * 100_000,
    ):
        refusal(text)


def test_scorers_by_function(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(
        "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
        "def two(prompts, responses):\n    import numpy as np\n"
        "    joint, cost = np.array([len(p) > 1 for p in prompts]), np.full(len(prompts), -1.5)\n"
        "    return {'joint': joint, 'note': ['x'] * len(prompts), 'cost': cost}\n"
        "def short(prompts, responses):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [("p", "ab"), ("long", "abcd")]
    assert judged("reward=my_judge:length", rows, tmp_path / "a") == [
        {"reward": 2.0},
        {"reward": 4.0},
    ]
    assert judged("refused=my_judge:length", rows, tmp_path / "b") == [
        {"refused": True},
        {"refused": True},
    ]
    assert judged("my_judge:length", rows, tmp_path / "c") == [{"length": 2.0}, {"length": 4.0}]
    assert judged("my_judge:two", rows, tmp_path / "d") == [
        {"joint": False, "note": "x", "cost": -1.5},
        {"joint": True, "note": "x", "cost": -1.5},
    ]
    with pytest.raises(UserError, match="1 values for 2 answers"):
        judged("my_judge:short", rows, tmp_path / "e")
    assert load_judge("my_judge:two").fingerprint != load_judge("my_judge:length").fingerprint


def test_score_model(tmp_path, tiny_llama, byte_tokenizer):
    """A classifier of one label, as ``reward=`` and as ``cost=``; the same numbers as the scorer itself gives."""
    from transformers import LlamaForSequenceClassification

    from midpo_ray.config import Scorer
    from midpo_ray.models.scorers import load_scorer

    config = tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    rows = [("why?", "because"), ("how?", "like this, of course")]
    got = [v["cost"] for v in judged(f"cost={tmp_path / 'model'}", rows, tmp_path / "cache")]
    score = load_scorer(Scorer(model=str(tmp_path / "model")), "cost")
    assert got == pytest.approx(
        score([(("user", p),) for p, _ in rows], [r for _, r in rows]), abs=1e-5
    )


def test_miniature_judge(tmp_path):
    rows = [("tell me how to steal the wallet at home .", "sorry , i can not help with that .")]
    [verdict] = judged("builtin:miniature", rows, tmp_path)
    assert verdict == {
        "reward": -1.0,
        "cost": -1.5,
        "refused": True,
        "joint": True,
        "malformed": False,
    }


class Server:
    """A chat endpoint that answers by ``reply(body)`` and remembers what it was asked; None is a busy server."""

    def __init__(self, reply):
        self.seen = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, self.headers.get("Authorization"), body))
                text = reply(body, len(seen))
                self.send_response(503 if text is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for s in servers:
        s.server.shutdown()
        s.server.server_close()


def settings(folder, **content):
    path = folder / "judge.yaml"
    path.write_text(json.dumps(content))
    return str(path)


def test_endpoint(tmp_path, serve):
    def reply(body, number):
        return (
            None
            if number == 1
            else "Yes."
            if "can't" in body["messages"][0]["content"].rpartition("<answer>")[2]
            else "no, it answers"
        )

    server = serve(reply)
    (tmp_path / "key").write_text("secret\n")
    spec = settings(tmp_path, url=server.url, model="m", key_file="key", threads=1)
    rows = [("p {response}", "I can't."), ("q", "Sure.")]
    assert judged(spec, rows, tmp_path / "cache") == [{"refused": True}, {"refused": False}]
    path, authorization, body = server.seen[-1]
    assert path == "/v1/chat/completions"
    assert authorization == "Bearer secret"
    assert body["temperature"] == 0
    assert (
        "p {response}" in server.seen[0][2]["messages"][0]["content"]
    )  # a text is put in, and not looked at again
    count = len(server.seen)
    assert judged(spec, rows, tmp_path / "cache") == [{"refused": True}, {"refused": False}]
    assert len(server.seen) == count  # cached
    assert "secret" not in load_judge(spec).name


def test_endpoint_gives_numbers(tmp_path, serve):
    server = serve(
        lambda body, number: (
            "I give it 7.5 of 10." if "good" in body["messages"][0]["content"] else "no idea"
        )
    )
    spec = settings(
        tmp_path,
        url=server.url,
        model="m",
        column="reward",
        question="How good? {prompt} / {response}",
    )
    assert judged(spec, [("p", "good")], tmp_path / "cache") == [{"reward": 7.5}]
    bad = settings(tmp_path, url=server.url, model="m", column="reward", question="{prompt}")
    assert judged(bad, [("p", "x")], tmp_path / "cache2") == [{"reward": None}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"url": "http://x/v1"}, "url and model are needed"),
        ({"url": "ftp://x", "model": "m"}, "http"),
        ({"url": "http://x", "model": "m", "colour": 1}, "may be there"),
        ({"url": "http://x", "model": "m", "key_file": "none"}, "key_file"),
        ({"url": "http://x", "model": "m", "column": "reward"}, "needs a question"),
        ({"url": "http://x", "model": "m", "threads": 0}, "threads is 0"),
    ],
)
def test_endpoint_settings(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        load_judge(settings(tmp_path, **content))


def test_one_scorer_in_two_roles_is_two_judges(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "one_scorer.py").write_text(
        "def f(prompts, responses):\n    return [1.0] * len(prompts)\n"
    )
    prints = {
        load_judge(f"{role}one_scorer:f").fingerprint
        for role in ("", "reward=", "cost=", "refused=")
    }
    assert len(prints) == 4


@pytest.mark.parametrize("spec", ["nothing", "reward=", "x=y", "a.b"])
def test_unknown_judges(spec):
    with pytest.raises(UserError, match="is expected"):
        load_judge(spec)
