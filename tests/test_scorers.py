"""Scorers: small checkpoints of the real formats against a computation by hand, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from midpo_ray.config import Scorer
from midpo_ray.data.tokens import PAPER_BEGIN, PAPER_TURN, render_plain
from midpo_ray.errors import UserError
from midpo_ray.models.scorers import load_scorer

PROMPTS = [
    (("user", "Is it late?"),),
    (("user", "Hi"),),
    (("user", "one"), ("assistant", "two"), ("user", "three")),
]
SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
}  # fmt: skip
RESPONSES = ["It is not.", "Hello, and a much longer answer than the others have.", "four"]


@pytest.fixture
def score_model(tmp_path, tiny_llama, byte_tokenizer):
    """A checkpoint in PKU's format; ``shards`` writes two files and an index."""

    def make(
        score_type: str = "cost",
        *,
        normalize: bool = False,
        shards: bool = False,
        head: int = 1,
        bias: bool = True,
    ) -> Path:
        folder = tmp_path / "score"
        model = tiny_llama()
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        weights = {
            k: v
            for k, v in load_file(folder / "model.safetensors").items()
            if k.startswith("model.")
        }
        generator = torch.Generator().manual_seed(5)
        extra = {"score_head.weight": torch.randn(head, 32, generator=generator)}
        if bias:
            extra["score_head.bias"] = torch.tensor([0.25] * head)
        extra |= {
            "normalizer.mean": torch.tensor([1.5]),
            "normalizer.var": torch.tensor([4.0]),
            "normalizer.count": torch.tensor([9]),
        }
        if shards:
            (folder / "model.safetensors").unlink()
            files = {
                "model-00001-of-00002.safetensors": weights,
                "model-00002-of-00002.safetensors": extra,
            }
            for name, part in files.items():
                save_file(part, folder / name, metadata={"format": "pt"})
            index = {
                "metadata": {},
                "weight_map": {key: name for name, part in files.items() for key in part},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "architectures": ["LlamaModelForScore" if shards else "LlamaForScore"],
            "score_type": score_type,
            "bias": bias,
        }
        config |= {"do_normalize": normalize, "normalizer_type": "RunningMeanStd", "score_dim": 1}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("score_type", ["cost", "reward"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_score_model_by_hand(
    score_model, tiny_llama, byte_tokenizer, score_type, normalize, shards
):
    folder = score_model(score_type, normalize=normalize, shards=shards)
    file = "model-00002-of-00002.safetensors" if shards else "model.safetensors"
    head = load_file(folder / file)
    expected = []
    texts = [
        "BEGINNING OF CONVERSATION: USER: Is it late? ASSISTANT:It is not.</s>",
        f"BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:{RESPONSES[1]}</s>",
        "BEGINNING OF CONVERSATION: USER: one ASSISTANT:two</s>USER: three ASSISTANT:four</s>",
    ]
    for text in texts:
        ids = byte_tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == 1
        assert ids[0, -1] == 2
        with torch.no_grad():
            hidden = tiny_llama().model(ids).last_hidden_state[0, -1]
        value = float(head["score_head.weight"][0] @ hidden) + 0.25
        expected.append(
            value if not normalize else (value - 1.5) / 2 if score_type == "reward" else value / 2
        )
    score = load_scorer(Scorer(model=str(folder)), score_type)
    assert score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)
    small = load_scorer(Scorer(model=str(folder)), score_type, batch_tokens=1)  # one row a pass
    assert small(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)
    assert score(PROMPTS[1:2], RESPONSES[1:2]) == pytest.approx(expected[1:2], abs=1e-5)
    assert score([], []) == []


def test_score_model_without_bias_and_in_bfloat16(score_model):
    folder = score_model("cost", bias=False)
    full = load_scorer(Scorer(model=str(folder)), "cost")(PROMPTS, RESPONSES)
    half = load_scorer(Scorer(model=str(folder), dtype="bfloat16"), "cost")(PROMPTS, RESPONSES)
    assert half == pytest.approx(full, abs=0.5)
    assert half != full


def test_long_input_keeps_its_eos(score_model, tiny_llama, byte_tokenizer):
    folder = score_model("cost")
    prompt = (("user", "a" * 5),)
    cut = load_scorer(Scorer(model=str(folder), max_length=50), "cost")([prompt], ["b" * 100])
    ids = [
        *byte_tokenizer(
            render_plain(prompt, PAPER_BEGIN, PAPER_TURN, "</s>") + "b" * 100
        ).input_ids[:49],
        2,
    ]
    with torch.no_grad():
        hidden = tiny_llama().model(torch.tensor([ids])).last_hidden_state[0, -1]
    assert cut == [
        pytest.approx(
            float(load_file(folder / "model.safetensors")["score_head.weight"][0] @ hidden) + 0.25,
            abs=1e-5,
        )
    ]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"score_type": "cost"},
            "reward",
            "score_type is 'cost', .* name it as scores.cost",
        ),
        ({"score_type": "reward"}, "cost", "score_type is 'reward', .* scores.reward"),
        (
            {"score_type": "cost", "head": 2},
            "cost",
            r"score_head.weight is \(2, 32\), \(1, 32\) is expected",
        ),
    ],
)
def test_score_models_that_do_not_fit(score_model, options, kind, message):
    with pytest.raises(UserError, match=message) as error:
        load_scorer(Scorer(model=str(score_model(**options))), kind)
    assert "\n" not in str(error.value)


def llama_classifier(folder: Path, tokenizer, labels: int = 1, seed: int = 0, **keys) -> Path:
    config = LlamaConfig(
        **SMALL, num_hidden_layers=2, initializer_range=0.2, num_labels=labels,
        **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, **keys},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [None, 0])
def test_classifier_with_a_chat_template(tmp_path, byte_tokenizer, pad):
    folder = llama_classifier(tmp_path / "c", byte_tokenizer, pad_token_id=pad)
    template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}</s>"
    (folder / "chat_template.jinja").write_text(template)
    got = load_scorer(Scorer(model=str(folder)), "reward")(PROMPTS[:2], RESPONSES[:2])
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for prompt, response, value in zip(PROMPTS, RESPONSES, got, strict=False):
        ids = byte_tokenizer(
            f"<s>[user] {prompt[0][1]}[assistant] {response}</s>", add_special_tokens=False
        ).input_ids
        assert ids[-1] == 2
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert value == pytest.approx(float(model.score.weight[0].detach() @ hidden), abs=1e-5)


def test_classifier_of_a_pair_of_texts(tmp_path, byte_tokenizer):
    folder = tmp_path / "bert"
    config = BertConfig(
        **SMALL, num_hidden_layers=2, num_labels=1, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    got = load_scorer(Scorer(model=str(folder)), "cost")(PROMPTS, RESPONSES)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    texts = ["Is it late?", "Hi", "user: one\nassistant: two\nuser: three"]
    for text, response, value in zip(texts, RESPONSES, got, strict=True):
        with torch.no_grad():
            assert value == pytest.approx(
                float(model(**byte_tokenizer(text, response, return_tensors="pt")).logits), abs=1e-5
            )


ENCODERS = {
    "bert": (BertConfig, BertForSequenceClassification, 64),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, 64 - 2),  # padding id 1
}


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)
@pytest.mark.parametrize("name", ENCODERS)
def test_texts_beyond_a_model_s_positions(tmp_path, byte_tokenizer, caplog, name, template):
    """They are truncated to its positions; the first batch with any is reported, with a count."""
    make_config, make_model, positions = ENCODERS[name]
    config = make_config(
        **SMALL, num_hidden_layers=1, num_labels=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=1, type_vocab_size=2,
    )  # fmt: skip
    make_model(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    prompt, short, long = (("user", "question"),), "a" * 20, "b" * 3000
    score = load_scorer(Scorer(model=str(tmp_path)), "cost")
    with caplog.at_level("WARNING", logger="midpo_ray"):
        values = score([prompt] * 4, [short, long, long + "c", short])
        score([prompt], [long])
    (record,) = [r for r in caplog.records if r.name == "midpo_ray.models.scorers"]
    assert record.args == (f"scorer {tmp_path}", 2, 4, positions)
    model = make_model.from_pretrained(tmp_path).eval()
    if template:
        inputs = byte_tokenizer("question" + long, add_special_tokens=False, return_tensors="pt")
        ids = inputs.input_ids[:, :positions]
    else:
        cut = {"truncation": True, "max_length": positions, "return_tensors": "pt"}
        ids = byte_tokenizer("question", long, **cut).input_ids
    assert ids.shape == (1, positions)
    with torch.no_grad():
        expected = float(model(input_ids=ids).logits)
    assert values[1:3] == pytest.approx([expected, expected], abs=1e-5)
    assert values[0] == pytest.approx(values[3])
    bounded = load_scorer(Scorer(model=str(tmp_path), max_length=40), "cost")
    assert bounded([prompt], [long]) != pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("what", ["labels", "causal", "nothing", "pickle"])
def test_not_a_scorer(tmp_path, byte_tokenizer, tiny_model_dir, score_model, what):
    message = {
        "labels": "a classifier of 3 labels, one label is expected",
        "causal": "LlamaForCausalLM is not a scorer",
        "nothing": "no model with a tokenizer is found there",
        "pickle": "a score model in safetensors is expected, no pickle is read",
    }[what]
    if what == "pickle":
        folder = score_model("cost")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        folder = {
            "labels": lambda: llama_classifier(tmp_path / "c", byte_tokenizer, labels=3),
            "causal": tiny_model_dir,
            "nothing": lambda: tmp_path / "missing",
        }[what]()
    with pytest.raises(UserError, match=message) as error:
        load_scorer(Scorer(model=str(folder)), "cost")
    assert "\n" not in str(error.value)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of the user's beside the working directory."""
    (tmp_path / "my_scorer.py").write_text(
        "import torch\n"
        "def lengths(prompts, responses):\n"
        "    return torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses)])\n"
        "def few(prompts, responses): return [1.0]\n"
        "def bad(prompts, responses): return [0.0, float('nan'), 1.0]\n"
        "def words(prompts, responses): return ['a' for _ in responses]\n"
        "def nothing(prompts, responses): return None\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_scorer", None)


def test_a_function_gets_texts(functions):
    values = load_scorer(Scorer(function="my_scorer:lengths"), "reward")(PROMPTS, RESPONSES)
    assert values == [
        11 + 10,
        2 + len(RESPONSES[1]),
        len("user: one\nassistant: two\nuser: three") + 4,
    ]
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_scorer:few", "1 values for 3 responses"),
        ("my_scorer:bad", "nan for row 1, response 'Hello, and"),
        ("my_scorer:words", "a list of numbers is expected"),
        ("my_scorer:nothing", "a list of numbers is expected, not NoneType"),
        ("my_scorer:none", "has no function none; it has: bad, few"),
        ("my_scorer:constant", "has no function constant"),
        ("no_such_module:f", "module no_such_module cannot be imported"),
        ("my_scorer", "module:function is expected"),
    ],
)
def test_functions_that_do_not_work(functions, name, message):
    with pytest.raises(UserError, match=message) as error:
        load_scorer(Scorer(function=name), "cost")(PROMPTS, RESPONSES)
    assert "\n" not in str(error.value)


def test_a_column_is_no_model():
    with pytest.raises(UserError, match="a column is read with the data"):
        load_scorer(Scorer(column="reward_{i}"), "reward")


def test_the_backbone_is_loaded_not_invented(score_model, tiny_llama):
    """Every weight of the decoder comes from the checkpoint."""
    loaded, info = AutoModel.from_pretrained(score_model("cost"), output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in tiny_llama().model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_revision_of_a_hub_scorer(tmp_path, monkeypatch, byte_tokenizer):
    """Two commits of one hub model in the local hub cache: each revision gives its own score."""
    hub = tmp_path / "models--maker--scorer"
    expected = {}
    for revision, seed in (("old", 1), ("new", 2)):
        commit = str(seed) * 40
        folder = hub / "snapshots" / commit
        llama_classifier(folder, byte_tokenizer, seed=seed, pad_token_id=0)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
        expected[revision] = load_scorer(Scorer(model=str(folder)), "cost")(PROMPTS, RESPONSES)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    for revision, scores in expected.items():
        score = load_scorer(Scorer(model="maker/scorer", revision=revision), "cost")
        assert score(PROMPTS, RESPONSES) == pytest.approx(scores)
    assert expected["old"] != expected["new"]


@pytest.mark.parametrize("aware", [True, False])
def test_where_padding_matters_rows_are_scored_alone(
    tmp_path, byte_tokenizer, monkeypatch, aware
) -> None:
    folder = llama_classifier(tmp_path, byte_tokenizer)
    plain = LlamaForSequenceClassification.forward

    def forward(self, input_ids, **inputs):
        """A model whose score depends on the width of the batch, where it is not ``aware``."""
        output = plain(self, input_ids, **inputs)
        output.logits = output.logits + (0 if aware else input_ids.shape[1])
        return output

    expected = load_scorer(Scorer(model=str(folder)), "reward", batch_tokens=1)(PROMPTS, RESPONSES)
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", forward)
    alone = load_scorer(Scorer(model=str(folder)), "reward", batch_tokens=1)(PROMPTS, RESPONSES)
    assert (alone == expected) is aware
    assert load_scorer(Scorer(model=str(folder)), "reward")(PROMPTS, RESPONSES) == pytest.approx(
        alone, abs=1e-4
    )
