"""Texts into ids: templates, BOS and EOS, truncation, and what `midpo inspect` prints of them."""

from __future__ import annotations

import copy
import time

import pytest
from transformers import AutoTokenizer

from midpo_ray.config import Data, DataSet
from midpo_ray.data import Document, Pair, Tokenization, read_pairs
from midpo_ray.data.inspect import describe_pairs, special_faults
from midpo_ray.data.read import ReadReport
from midpo_ray.data.tokens import PAPER
from midpo_ray.errors import UserError

BOS, EOS = 1, 2
CHATML = (
    "{% for m in messages %}{{ '<<' + m['role'] + '>>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<<assistant>>' }}{% endif %}"
)
DIALOGUE = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))


def data(**keys):
    return Data(sets=(DataSet(path="x.jsonl"),), **keys)


def pair(prompt="Why?", first="yes", second="no", source="a.jsonl:7"):
    return Pair(prompt=(("user", prompt),), responses=(first, second), source=source)


@pytest.fixture
def chatty(byte_tokenizer):
    """The byte tokenizer with a chat template."""

    def make(template=CHATML):
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_paper_template_bos_once_and_eos_at_the_end(byte_tokenizer):
    tokenization = Tokenization(byte_tokenizer, data())
    (document,) = tokenization.documents([pair()])
    prefix, (first, second) = document.prefix, document.suffixes
    assert document.keys == pair().keys
    assert prefix == [
        BOS,
        *plain(byte_tokenizer, "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:"),
    ]
    assert (first, second) == (
        [*plain(byte_tokenizer, "yes"), EOS],
        [*plain(byte_tokenizer, "no"), EOS],
    )
    assert tokenization.prompt_ids((("user", "Why?"),)) == prefix
    assert not tokenization.counts


def test_paper_template_of_many_turns(byte_tokenizer):
    ids = Tokenization(byte_tokenizer, data()).prompt_ids(DIALOGUE)
    text = "<s>BEGINNING OF CONVERSATION: USER: Be brief.\n\nHi ASSISTANT:Yes?</s>"
    text += "USER: Why? ASSISTANT:"
    assert byte_tokenizer.decode(ids) == text
    assert ids.count(EOS) == 1  # the template's, as one token


@pytest.mark.parametrize(
    "template", ["Q: {prompt}\nA:", "<s>Q: {prompt}\nA:", "<s><s>Q: {prompt}\nA:"]
)
def test_a_template_of_one_s_own(byte_tokenizer, template):
    ids = Tokenization(byte_tokenizer, data(template=template)).prompt_ids(
        (("user", "{prompt} 50%"),)
    )
    assert byte_tokenizer.decode(ids) == "<s>Q: {prompt} 50%\nA:"


def test_chat_template_is_the_tokenizer_s_own(chatty):
    tokenizer = chatty()
    messages = [{"role": role, "content": content} for role, content in DIALOGUE]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert Tokenization(tokenizer, data()).prompt_ids(DIALOGUE) == expected
    with_bos = Tokenization(chatty("{{ bos_token }}{{ bos_token }}" + CHATML), data())
    assert with_bos.prompt_ids(DIALOGUE) == [BOS, *expected]
    assert with_bos.template_ids(DIALOGUE).count(EOS) == 4
    assert Tokenization(tokenizer, data(template="paper")).chat is False


def test_white_space_that_a_chat_template_has_before_an_answer(chatty):
    template = (
        "{% for m in messages %}{{ '[' + m['content'] + ']' if m['role'] == 'user' "
        "else ' ' + m['content'] }}{% endfor %}"
    )
    tokenizer = chatty(template)
    assert tokenizer.decode(Tokenization(tokenizer, data()).response_ids("yes", 9)[0]) == " yes</s>"


def test_null_context(byte_tokenizer, chatty):
    assert byte_tokenizer.decode(
        Tokenization(byte_tokenizer, data()).null_ids
    ) == "<s>" + PAPER.replace("{prompt}", "")
    assert chatty().decode(Tokenization(chatty(), data()).null_ids) == "<<user>></s><<assistant>>"
    assert Tokenization(byte_tokenizer, data(null_context="bos")).null_ids == [BOS]
    without = copy.deepcopy(byte_tokenizer)
    without.bos_token = None
    tokenization = Tokenization(without, data(null_context="bos", template="{prompt}"))
    assert tokenization.null_ids == [EOS]
    assert tokenization.prompt_ids((("user", "a"),)) == plain(byte_tokenizer, "a")


def test_truncation_keeps_the_prompt_s_end_and_the_response_s_start(byte_tokenizer):
    tokenization = Tokenization(
        byte_tokenizer, data(template="{prompt}:", max_length=20, max_prompt_length=8)
    )
    long, fits = "r" * 30, "s" * 11
    (document,) = tokenization.documents([pair("abcdefghijkl", long, fits)])
    prefix, (cut, whole) = document.prefix, document.suffixes
    assert byte_tokenizer.decode(prefix) == "<s>ghijkl:"
    assert cut == plain(byte_tokenizer, "r" * 12)  # 20 - 8, and no EOS
    assert whole == [*plain(byte_tokenizer, fits), EOS]  # exactly full
    assert tokenization.counts == {"prompts cut": 1, "responses cut": 1}
    assert tokenization.response_ids("s" * 12, 12) == (
        plain(byte_tokenizer, "s" * 12),
        True,
    )  # no room for EOS
    assert Tokenization(byte_tokenizer, data(max_length=9)).max_prompt_length == 4


def test_prompts_longer_than_everything(byte_tokenizer):
    keys = {"template": "{prompt}:", "max_length": 20, "max_prompt_length": 8}
    rows = [pair("x" * 19, source="a.jsonl:3"), pair("short")]
    with pytest.raises(
        UserError,
        match=r"a\.jsonl:3: the prompt has 21 tokens, data\.max_length is 20: raise it, or set",
    ):
        Tokenization(byte_tokenizer, data(**keys)).documents(rows)
    dropping = Tokenization(byte_tokenizer, data(**keys, long_prompts="drop"))
    assert [d is None for d in dropping.documents(rows)] == [True, False]
    assert dropping.counts == {"prompt longer than max_length": 1}
    cutting = Tokenization(byte_tokenizer, data(**keys, long_prompts="truncate"))
    assert len(cutting.documents(rows)[0].prefix) == 8
    assert cutting.counts == {"prompts cut": 1}
    with pytest.raises(UserError, match="prompt has 21 tokens"):
        dropping.prompt_ids(rows[0].prompt)


def test_responses_that_become_the_same_tokens_are_dropped(byte_tokenizer):
    tokenization = Tokenization(
        byte_tokenizer, data(template="{prompt}", max_length=10, max_prompt_length=5)
    )
    assert tokenization.documents([pair("abcd", "same beginning", "same end")]) == [None]
    assert tokenization.counts == {"identical responses (as tokens)": 1}


def test_names_of_special_tokens_in_a_response_are_text(byte_tokenizer):
    ids, _ = Tokenization(byte_tokenizer, data()).response_ids("a</s>b<s>", 50)
    assert ids.count(EOS) == 1
    assert BOS not in ids
    assert byte_tokenizer.decode(ids) == "a</s>b<s></s>"


def test_a_response_of_no_tokens(byte_tokenizer):
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    with pytest.raises(UserError, match=r"a\.jsonl:7: response 1 has no tokens"):
        Tokenization(tokenizer, data()).documents([pair(first="a", second="??")])


def test_tokenizer_and_template_faults(byte_tokenizer, chatty):
    without = copy.deepcopy(byte_tokenizer)
    without.eos_token = None
    faults = [
        (without, {}, "has no EOS token"),
        (byte_tokenizer, {"template": "chat"}, "has no chat template: use paper"),
        (
            byte_tokenizer,
            {"template": "no place"},
            r"template is 'no place', allowed are auto, chat, paper, or .* \{prompt\}",
        ),
        (
            byte_tokenizer,
            {"max_length": 8, "max_prompt_length": 8},
            "leaves no room for a response",
        ),
    ]
    for tokenizer, keys, message in faults:
        with pytest.raises(UserError, match=message):
            Tokenization(tokenizer, data(**keys))
    picky = chatty(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}x"
    )
    with pytest.raises(
        UserError,
        match=r"a\.jsonl:1: the chat template does not take this conversation \(no system here\)",
    ):
        Tokenization(picky, data()).prompt_ids(DIALOGUE, "a.jsonl:1")


def test_fingerprint_is_of_what_decides_the_ids(byte_tokenizer, chatty):
    variants = [
        {},
        {"template": "{prompt}"},
        {"max_length": 100},
        {"max_prompt_length": 100},
        {"null_context": "bos"},
    ]
    prints = [Tokenization(byte_tokenizer, data(**keys)).fingerprint for keys in variants]
    prints += [
        Tokenization(chatty(template), data()).fingerprint for template in (CHATML, CHATML + " ")
    ]
    assert len(set(prints)) == len(prints)
    assert (
        Tokenization(byte_tokenizer, data(validation=0.5, template="paper")).fingerprint
        == prints[0]
    )
    byte_tokenizer(["a", "bcd"], padding=True)  # leaves padding switched on inside the tokenizer
    assert Tokenization(byte_tokenizer, data()).fingerprint == prints[0]


def test_a_template_with_today_s_date_gives_the_same_ids_every_day(chatty, monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    dated = "{{ strftime_now('%d %b %Y') }} " + CHATML
    prompt = (("user", "Why?"),)

    def on(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock, raising=False)
        tokenization = Tokenization(chatty(dated), data())
        return tokenization, tokenization.prompt_ids(prompt)

    (first, ids), (second, later) = on(1), on(2)
    assert first.dated
    assert ids == later
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.decode(ids).startswith("26 Jul 2024 ")
    assert not Tokenization(chatty(), data()).dated
    with pytest.raises(UserError, match="expression"):
        Tokenization(chatty("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML), data())


# Real tokenizer, real pairs


def test_real_pairs_have_the_ids_of_the_whole_text(shared):
    """A SentencePiece-like tokenizer puts a space before any text, which no response may get."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "stories260k")
    settings = data()
    start = time.perf_counter()
    pairs, _ = read_pairs([DataSet(path=str(shared / "data" / "pku_safety_pairs.jsonl"))], seed=0)
    tokenization = Tokenization(tokenizer, settings)
    documents = tokenization.documents(pairs)
    assert time.perf_counter() - start < 20
    assert tokenization.counts["responses cut"] > 100
    assert None not in documents
    for p, document in list(zip(pairs, documents, strict=True))[:200]:
        prefix = document.prefix
        assert prefix.count(tokenizer.bos_token_id) == 1
        for text, ids in zip(p.responses, document.suffixes, strict=True):
            whole = tokenizer(PAPER.replace("{prompt}", p.prompt[0][1]) + text)["input_ids"]
            cut = ids[-1] != tokenizer.eos_token_id
            assert [*prefix, *ids] == (whole[:512] if cut else [*whole, tokenizer.eos_token_id])


# What inspect prints


def test_inspect_text_alone():
    report = ReadReport(rows=[("a.jsonl", 4)], kept=[("a.jsonl", 3)])
    report.dropped["identical responses"] = 1
    report.conflicts = [f"c{i}" for i in range(7)]
    pairs = [
        Pair(
            (("user", "p \x1b[2J"),),
            ("yes it is", "no"),
            safe=(True, False),
            better=0,
            safer=0,
            source="a.jsonl:1",
        ),
        Pair((("user", "q"),), ("yes", "no"), safe=(False, True), safer=0, source="a.jsonl:2"),
        Pair(
            (("user", "q"),), ("a", "b"), safe=(True, True), better=1, safer=0, source="a.jsonl:3"
        ),
    ]
    text = describe_pairs(pairs, report, stage="safety", show=1)
    for part in (
        "a.jsonl: 4 rows, 3 taken",
        "3 pairs, 2 prompts",
        "dropped: 1 identical responses",
        "... and 2 conflicts more",
        "better_response_id: 0 1, 1 1, null 1",
        "safe flags: both safe 1, one safe 2",
        "better and safer: differ 1, same 1",
        "warning: in 1 pairs safer_response_id is the unsafe response",
        "left out: 1 both safe",
        "pair a.jsonl:1: chosen is response 0",
        "words",
        "user: p \\x1b[2J",
    ):
        assert part in text, part
    assert "router (rule labels)" in describe_pairs(pairs, report)
    assert "read scores" in describe_pairs(pairs, report, stage="pareto")
    assert "no pair to measure" in describe_pairs(pairs[2:], report, stage="safety")


def test_inspect_token_by_token(byte_tokenizer):
    tokenization = Tokenization(
        byte_tokenizer, data(template="{prompt}:", max_length=40, max_prompt_length=30)
    )
    pairs = [pair("ab", "yes", "n" * 50), pair("a</s>b", "yes", "no", source="a.jsonl:8")]
    text = describe_pairs(pairs, ReadReport(), tokenization=tokenization, show=1)
    assert "  prompt: 4 tokens\n    mask 0 | <s> a b :\n" in text
    assert "  response 0, ends with EOS: 4 tokens\n    mask 1 | y e s </s>" in text
    assert "response 1, cut, no EOS: 36 tokens" in text
    assert "  1 responses cut" in text
    assert "warning: EOS inside the prompt, not from the template: 1 pairs, first a.jsonl:8" in text


def test_faults_of_special_tokens():
    def faults(prefix, suffixes, template):
        return special_faults(Document(prefix, suffixes), template, BOS, EOS)

    assert faults([BOS, 5, 6], [[7, EOS]], [BOS, 9]) == []
    assert faults([BOS, 5, EOS, 6], [[7, EOS]], [BOS, 9, EOS]) == []
    assert len(faults([BOS, BOS, 5], [], [BOS])) == 2
    assert faults([BOS, EOS, 5], [[EOS, 7, EOS], [BOS]], [BOS]) == [
        "EOS inside the prompt, not from the template",
        "EOS inside response 0",
        "BOS inside response 1",
    ]


def test_named_chat_templates(byte_tokenizer) -> None:
    templates = {
        "short": "{% for m in messages %}({{ m['content'] }}{% endfor %}",
        "long": "{% for m in messages %}((({{ m['content'] }}{% endfor %}",
    }

    def start(template: str, named: dict | str | None) -> str:
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = named
        tokens = Tokenization(tokenizer, data(template=template))
        return tokenizer.decode(tokens.prompt_ids((("user", "x"),))).replace("<s>", "").strip()

    assert start("chat:short", templates) == "(x"
    assert start("chat:long", templates) == "(((x"
    assert start("auto", templates | {"default": templates["short"]}) == "(x"
    for template in ("auto", "chat", "chat:other"):
        with pytest.raises(UserError) as caught:
            start(template, templates)
        assert "long, short" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        start("chat:short", None)
