"""Score models: a step against the textbook, equal numbers after saving, and something learnt."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from midpo_ray import UserError
from midpo_ray.config import Config, Scorer
from midpo_ray.data.batching import Document, collate
from midpo_ray.data.schema import Prompt
from midpo_ray.data.tokens import Tokenization, render_plain
from midpo_ray.models.base import check_targets, load_tokenizer
from midpo_ray.models.score_model import (
    ResponseScores,
    build_score_model,
    save_score_model,
    score_documents,
    scoring_tokenizer,
)
from midpo_ray.models.scorers import load_scorer
from midpo_ray.storage import Storage
from midpo_ray.training.checkpoint import Checkpoints
from midpo_ray.training.engine import plain, trained_state
from midpo_ray.training.loop import fit
from midpo_ray.training.metrics import MetricsLog
from midpo_ray.training.steps import ScoreStep, StepBatch
from midpo_ray.training.table import ScoreTable

PROMPTS: list[Prompt] = [
    (("user", "Is it late?"),),
    (("system", "Be brief."), ("user", "Hi")),
    (("user", "one"),),
]
RESPONSES = [
    ("It is not.", "It is, and a longer answer."),
    ("Hello", "Hello!"),
    ("same" * 30 + "a", "same" * 30 + "b"),
]


def config(model: Path, template: str = "paper", max_length: int = 96, **section: Any) -> Config:
    return Config.model_validate(
        {
            "name": "small",
            "model": {"path": str(model)},
            "data": {"sets": [{"path": "x"}], "template": template, "max_length": max_length},
            "router": {"rule": "labels"},
            "experts": {name: {"objective": {"name": "dpo"}} for name in ("safety", "helpfulness")},
            "logging": {"every": 10, "tensorboard": False},
            "reward_model": {
                "lora": {"r": 4, "alpha": 8, "target_modules": ["down_proj", "q_proj"]},
                **section,
            },
        }
    )


def scores(settings: Config) -> ResponseScores:
    """A score model away from its start."""
    module = ResponseScores(build_score_model(settings))
    torch.manual_seed(3)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def documents(count: int = 6, seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(3, 259) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [Document(ids(3, 9), [ids(1, 8), ids(1, 8)]) for _ in range(count)]


def batch(made: list[Document], layout: str = "tree") -> StepBatch:
    signs = {}
    for k, name in enumerate(("chosen", "rejected")):
        values = [(-1.0, 0.0, 1.0)[(i + k) % 3] for i in range(len(made))]
        signs[f"sign_{name}"] = torch.tensor(values)
    return StepBatch(collate(made, layout), signs)


@pytest.mark.parametrize("kind", ["reward", "cost"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_step_and_gradient_are_the_textbooks(tiny_model_dir, kind, train):
    module = scores(config(tiny_model_dir(), train=train))
    parameters = [p for p in module.parameters() if p.requires_grad]
    made = documents()
    given = batch(made)
    loss, metrics = ScoreStep(module, kind)(given)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)

    def read(ids: list[int]) -> Tensor:
        return module.model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))
        ).logits[0, 0]

    total, right = torch.zeros(()), 0
    for b, document in enumerate(made):
        chosen, rejected = (read(document.prefix + suffix) for suffix in document.suffixes)
        margin = chosen - rejected if kind == "reward" else rejected - chosen
        total = total - margin.sigmoid().log()
        right += int(margin > 0)
        if kind == "cost":
            for name, value in (("chosen", chosen), ("rejected", rejected)):
                sign = float(given.signals[f"sign_{name}"][b])
                total = total - (sign * value).sigmoid().log() * abs(sign)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    assert metrics["accuracy"] == right
    assert metrics["pairs"] == len(made)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scores_do_not_depend_on_the_layout(tiny_model_dir, layout):
    module, made = scores(config(tiny_model_dir())), documents()
    with torch.no_grad():
        torch.testing.assert_close(
            module(collate(made, layout)), module(collate(made)), rtol=1e-4, atol=1e-5
        )


def test_the_first_loss_is_known(tiny_model_dir):
    module, given = ResponseScores(build_score_model(config(tiny_model_dir()))), batch(documents())
    for kind, terms in (
        ("reward", 6),
        ("cost", 6 + int(sum(s.abs().sum() for s in given.signals.values()))),
    ):
        assert ScoreStep(module, kind).deviation(given).tolist() == [
            0.0,
            pytest.approx(terms * math.log(2), rel=1e-5),
            6.0,
        ]


def test_only_the_last_layers_get_the_lora(tiny_model_dir):
    names = [
        n
        for n, p in build_score_model(config(tiny_model_dir(), layers=1)).named_parameters()
        if p.requires_grad
    ]
    assert len(names) == 5
    assert all("layers.1." in name or name.endswith("score.weight") for name in names)
    settings = config(tiny_model_dir())
    with pytest.raises(UserError, match=r"reward_model.layers is 3, .* has 2"):
        check_targets(settings.model, settings.reward_model.lora, 3)


CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.mark.parametrize("template", ["auto", "chat", "paper", "### {prompt}\n### "])
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("pad", ["<pad>", None, "</s>"])
def test_training_scorer_and_classifier_give_the_same_numbers(
    tmp_path, tiny_model_dir, template, train, pad
):
    folder = tiny_model_dir(pad_token_id=None)
    special = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if template in ("auto", "chat"):
        (folder / "chat_template.jinja").write_text(CHAT)
    settings = config(folder, template, train=train)
    module = scores(settings)
    engine = plain(module, settings.reward_model.optim)
    save_score_model(settings, trained_state(engine, module.model), tmp_path / "saved")

    made = score_documents(scoring_tokenizer(settings), PROMPTS, RESPONSES)
    assert made[2] is None  # they differ behind max_length alone
    with torch.no_grad():
        trained = module(collate(made[:2])).tolist()
    prompts, responses = (
        [p for p in PROMPTS[:2] for _ in range(2)],
        [r for pair in RESPONSES[:2] for r in pair],
    )
    assert load_scorer(Scorer(model=str(tmp_path / "saved")), "cost")(
        prompts, responses
    ) == pytest.approx(trained, abs=1e-5)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in (*p, ("assistant", a))], tokenize=False
        )
        for p, a in zip(prompts, responses, strict=True)
    ]
    given = tokenizer(
        texts, add_special_tokens=False, padding=True, return_tensors="pt", truncation=True
    )
    with torch.no_grad():
        read = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    assert read.shape == (4, 1)
    assert read[:, 0].tolist() == pytest.approx(trained, abs=1e-5)
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert not list((tmp_path / "saved").glob("adapter*"))


def test_the_papers_format_is_its_text(tiny_model_dir, byte_tokenizer):
    tokenizer = scoring_tokenizer(config(tiny_model_dir()))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a {x}"},
        {"role": "assistant", "content": 'b"'},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == '<s>BEGINNING OF CONVERSATION: USER: S\n\na {x} ASSISTANT:b"</s>'


@pytest.mark.parametrize("template", ["paper", '# {prompt}\n\n"é😀" {{ x }} again {prompt}:\n'])
def test_training_s_format_is_the_saved_template(tiny_model_dir, template):
    """What a policy is trained on, and what the saved tokenizer renders, are one text."""
    settings = config(tiny_model_dir(), template)
    texts = Tokenization(load_tokenizer(settings.model), settings.data)
    turns = (("user", "a"), ("assistant", "b "), ("system", "S"), ("user", "c\n{prompt}"))
    turn = texts.plain_format[1]
    begin = "BEGINNING OF CONVERSATION: " if template == "paper" else ""
    questions = [turn.replace("{prompt}", "a"), turn.replace("{prompt}", "S\n\nc\n{prompt}")]
    expected = f"{begin}{questions[0]}b </s>{questions[1]}"
    assert render_plain(turns, *texts.plain_format) == expected
    messages = [{"role": role, "content": content} for role, content in turns]
    tokenizer = scoring_tokenizer(settings)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>" + expected


@pytest.mark.parametrize(
    ("template", "message"),
    [("chat", "has no chat template"), ("nothing", r"a text that holds \{prompt\}")],
)
def test_templates_that_do_not_fit(tiny_model_dir, template, message):
    with pytest.raises(UserError, match=message):
        scoring_tokenizer(config(tiny_model_dir(), template))


def test_documents_share_what_is_alike(tiny_model_dir):
    tokenizer = scoring_tokenizer(config(tiny_model_dir(), max_length=1000))
    for document, prompt, responses in zip(
        score_documents(tokenizer, PROMPTS, RESPONSES), PROMPTS, RESPONSES, strict=True
    ):
        assert document is not None
        for suffix, response in zip(document.suffixes, responses, strict=True):
            text = tokenizer.decode(document.prefix + suffix)
            assert text.endswith(f" ASSISTANT:{response}</s>")
            assert prompt[-1][1] in text
        assert document.suffixes[0][0] != document.suffixes[1][0]


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_it_learns_to_order_and_to_sign(tmp_path, tiny_model_dir, kind):
    """Answers of eight good bytes are better and safe, those of eight bad ones are neither."""
    draw, count = random.Random(0), 160

    def answer(low: int, high: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(draw.randint(2, 6))]

    good = [answer(3, 11) for _ in range(count)]
    bad = [answer(11, 19) for _ in range(count)]
    table = ScoreTable(
        pa.table(
            {
                "id": [f"f:{i}" for i in range(count)],
                "prompt": [[1, *(draw.randrange(3, 259) for _ in range(5))] for _ in range(count)],
                "chosen": good,
                "rejected": bad,
                "sign_chosen": [-1.0] * count,
                "sign_rejected": [1.0] * count,
                "validation": [i % 4 == 0 for i in range(count)],
            }
        )
    )
    optim = {"lr": 2e-2, "epochs": 3, "batch_size": 8}
    settings = config(tiny_model_dir(), optim=optim)
    engine = plain(ResponseScores(build_score_model(settings)), settings.reward_model.optim)
    fit(
        engine=engine, step=ScoreStep(engine, kind), table=table,
        optim=settings.reward_model.optim, seed=0,
        checkpoints=Checkpoints(Storage(tmp_path / "checkpoints"), keep=1, digest="d"),
        metrics=MetricsLog(Storage(tmp_path), kind, settings.logging),
        checkpoint=settings.checkpoint, logging=settings.logging,
    )  # fmt: skip
    *_, last = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
    assert last["split"] == "validation"
    assert last["accuracy"] > 0.8
    if kind == "cost":
        assert last["score_chosen"] < 0 < last["score_rejected"]
