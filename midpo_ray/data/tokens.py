"""Texts into token ids: a shared prompt, counted truncation, one BOS, EOS where nothing was cut."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import jinja2

from ..config import Data, digest
from ..errors import UserError
from .schema import Document, Message, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of the MidPO paper's base models (Safe RLHF, arXiv 2310.12773). A response follows the
# colon without a space.
PAPER_BEGIN, PAPER_TURN = "BEGINNING OF CONVERSATION: ", "USER: {prompt} ASSISTANT:"
PAPER = PAPER_BEGIN + PAPER_TURN
# Templates that print today's date get this one, so that token ids and scores do not depend on the
# day. It is the date that Llama 3's own template falls back to.
TEMPLATE_DATE = datetime.date(2024, 7, 26)
_NOW = re.compile(r"strftime_now\s*\(")
_NOW_LITERAL = re.compile(r"""strftime_now\s*\(\s*(['"])([^'"\\]*)\1\s*\)""")
_PART = 1024  # texts per call of a tokenizer, which keeps far more than the ids in memory
NAMED = "chat:"  # data.template of one of several chat templates, by its name
Ids = list[int]


def select_chat_template(tokenizer: Any, template: str, where: str) -> bool:
    """Whether the tokenizer has a chat template; of several named ones, it keeps the chosen one.

    Args:
        template: a recipe's ``data.template``; ``chat:NAME`` chooses by name.
        where: what the message names.

    Raises:
        UserError: there is none of the name, or there are several and none is named default.
    """
    templates = tokenizer.chat_template
    chooses = template in ("auto", "chat") or template.startswith(NAMED)
    if not chooses or not (isinstance(templates, dict) or template.startswith(NAMED)):
        return bool(templates)
    name = template.removeprefix(NAMED) if template.startswith(NAMED) else "default"
    templates = templates if isinstance(templates, dict) else {"default": templates}
    if templates.get(name) is None:
        names = ", ".join(sorted(n for n, text in templates.items() if text)) or "none"
        raise UserError(
            f"{where}: it has no chat template named {name!r}, its named chat templates are: "
            f"{names}; choose one by data.template: {NAMED}NAME"
        )
    tokenizer.chat_template = templates[name]
    return True


class Tokenization:
    """How a recipe's tokenizer and template turn prompts and responses into ids.

    The ids of a prompt do not depend on the response, so both responses of a pair have the same
    prefix. ``counts`` holds what the calls so far cut or dropped. ``dated`` is True where the chat
    template prints a date, which is then fixed to ``TEMPLATE_DATE``.

    Raises:
        UserError: no EOS token, no {prompt} in the template, ``chat`` without a chat template, or
            no room for a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.tokenizer, self.data = tokenizer, data
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {name}: it has no EOS token, which ends every response; set eos_token "
                "in its configuration"
            )
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        own = select_chat_template(tokenizer, data.template, f"tokenizer {name}")
        named = data.template.startswith(NAMED)
        self.chat = named or data.template == "chat" or (data.template == "auto" and own)
        if self.chat and not own:
            raise UserError(
                f"data.template is chat, and the tokenizer {name} has no chat template: use paper "
                "or a text with {prompt}"
            )
        own_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self.fixed_template = with_fixed_date(own_template, name) if self.chat else None
        self.dated = self.fixed_template is not None
        self.template = PAPER if data.template in ("auto", "paper") else data.template
        if "{prompt}" not in self.template and not self.chat:
            raise UserError(
                f"data.template is {data.template!r}, allowed are auto, chat, paper, or a text "
                "that holds {prompt}"
            )
        self.max_length = data.max_length
        self.max_prompt_length = data.max_prompt_length or data.max_length // 2
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length is {self.max_prompt_length}, which leaves no room for a "
                f"response: it must be below data.max_length, {self.max_length}"
            )
        self.counts: Counter[str] = Counter()
        self._lead, self._gap = self._joint()
        self._lead_ids = self._encode([self._lead])[0] if self._lead else []

    def prompt_ids(self, prompt: Prompt, source: str = "prompt") -> Ids:
        """Ids of a prompt as in training; BOS and the end of a long one are kept, and counted.

        Raises:
            UserError: longer than ``max_length``, unless ``long_prompts`` is truncate.
        """
        ids = self._encode_prompts([prompt], [source])[0]
        bounded = self._bounded(ids, source)
        if bounded is None:
            raise UserError(self._too_long(source, len(ids)))
        return bounded

    @property
    def plain_format(self) -> tuple[str, str, str]:
        """(begin, turn, eos) of ``plain_template``, where prompts are not rendered as a chat."""
        own = self.template == PAPER
        begin, turn = (PAPER_BEGIN, PAPER_TURN) if own else ("", self.template)
        return begin, turn, str(self.tokenizer.eos_token)

    @cached_property
    def null_ids(self) -> Ids:
        """The context of a response's unconditional log-probability: the template with an empty
        prompt, or BOS alone (EOS where there is no BOS)."""
        alone = [self.eos if self.bos is None else self.bos]
        if self.data.null_context == "bos":
            return alone
        ids = self._encode_prompts([(("user", ""),)], ["data.null_context template"])[0]
        return ids[-self.max_prompt_length :] or alone

    def response_ids(self, text: str, room: int) -> tuple[Ids, bool]:
        """At most ``room`` ids of a response, and whether it was cut; else EOS ends it."""
        return self._end(self._encode_responses([text])[0], room)

    def documents(self, pairs: Sequence[Pair]) -> list[Document | None]:
        """Each pair's document, with prompt and response of at most ``max_length`` tokens.

        A pair is dropped, counted and None here if its prompt is longer than ``max_length`` and
        ``long_prompts`` is drop, or if its two responses are the same tokens.

        Raises:
            UserError: a prompt longer than ``max_length`` where ``long_prompts`` is error, or a
                response without tokens.
        """
        sources = [pair.source for pair in pairs]
        prompts = self._encode_prompts([pair.prompt for pair in pairs], sources)
        responses = self._encode_responses([text for pair in pairs for text in pair.responses])
        documents: list[Document | None] = []
        for i, pair in enumerate(pairs):
            prefix = self._bounded(prompts[i], pair.source)
            answers = responses[2 * i : 2 * i + 2]
            documents.append(None if prefix is None else self._document(prefix, answers, pair))
        return documents

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of everything that decides the ids: template, tokenizer, lengths, null
        context, and an example as it is rendered."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content: Any = sorted(self.tokenizer.get_vocab().items())
        if backend is not None:
            content = json.loads(backend.to_str())
            content.pop("truncation", None)
            content.pop("padding", None)
        template = self.tokenizer.chat_template if self.chat else self.template
        example = self._render([("user", "x")], "chat template")
        lengths = (self.max_length, self.max_prompt_length)
        return digest(content, template, self.bos, self.eos, *lengths, self.null_ids, example)

    def template_ids(self, prompt: Prompt) -> Ids:
        """Ids of the same turns with the text "x": which special tokens are the template's own."""
        return self._encode_prompts([tuple((role, "x") for role, _ in prompt)], ["template"])[0]

    def _document(self, prefix: Ids, answers: Sequence[Ids], pair: Pair) -> Document | None:
        suffixes = []
        cuts = 0
        for number, answer in enumerate(answers):
            if not answer:
                raise UserError(
                    f"{pair.source}: response {number} has no tokens, a text that the tokenizer "
                    "knows is expected"
                )
            ids, cut = self._end(answer, self.max_length - len(prefix))
            suffixes.append(ids)
            cuts += cut
        if suffixes[0] == suffixes[1]:
            self.counts["identical responses (as tokens)"] += 1
            return None
        if cuts:
            self.counts["responses cut"] += cuts
        return Document(prefix, suffixes, pair.keys)

    def _bounded(self, ids: Ids, source: str) -> Ids | None:
        room = self.max_prompt_length
        if len(ids) <= room:
            return ids
        if len(ids) > self.max_length and self.data.long_prompts != "truncate":
            if self.data.long_prompts == "error":
                raise UserError(self._too_long(source, len(ids)))
            self.counts["prompt longer than max_length"] += 1
            return None
        self.counts["prompts cut"] += 1
        if self.bos is not None and ids[0] == self.bos and room > 1:  # BOS is kept (ours)
            return [self.bos, *ids[1 - room :]]
        return ids[-room:]

    def _too_long(self, source: str, length: int) -> str:
        return (
            f"{source}: the prompt has {length} tokens, data.max_length is {self.max_length}: "
            "raise it, or set data.long_prompts to truncate or drop"
        )

    def _end(self, ids: Ids, room: int) -> tuple[Ids, bool]:
        return ([*ids, self.eos], False) if len(ids) < room else (ids[:room], True)

    def _encode_prompts(self, prompts: Sequence[Prompt], sources: Sequence[str]) -> list[Ids]:
        pairs = zip(prompts, sources, strict=True)
        many = self._encode([self._render(prompt, source) for prompt, source in pairs])
        if self.bos is None:
            return many
        for i, ids in enumerate(many):
            while ids[:2] == [self.bos, self.bos]:
                del ids[0]
            if not self.chat and ids[:1] != [self.bos]:  # a chat template has its own BOS or none
                many[i] = [self.bos, *ids]
        return many

    def _encode_responses(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of responses as they follow a template; names of special tokens are plain text."""
        many = self._encode([self._lead + self._gap + text for text in texts], plain=True)
        skip = len(self._lead_ids)
        for i, ids in enumerate(many):
            if ids[:skip] != self._lead_ids:  # the lead merged with the response's first character
                many[i] = self._encode([self._gap + texts[i]], plain=True)[0]
            elif skip:
                many[i] = ids[skip:]
        return many

    def _encode(self, texts: Sequence[str], plain: bool = False) -> list[Ids]:
        many: list[Ids] = []
        for start in range(0, len(texts), _PART):
            many += self.tokenizer(
                list(texts[start : start + _PART]),
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
                split_special_tokens=plain,
            )["input_ids"]
        return many

    def _joint(self) -> tuple[str, str]:
        """(lead, gap): a response alone gets the ids that it has behind its template.

        Tokenizers like SentencePiece put a space before any text. Then responses are tokenised
        behind the lead, the template's last character, whose ids are taken off. The gap is the
        white space that a chat template has before an answer.
        """
        first = self.tokenizer.convert_ids_to_tokens(self._encode(["a"])[0][:1])
        spaced = bool(first) and first[0].startswith(("▁", "Ġ"))
        if not self.chat:
            lead = spaced and not self.template.endswith("{prompt}")
            return (self.template[-1] if lead else ""), ""
        question: Prompt = (("user", "question"),)
        asked = self._render(question, "chat template")
        answer = (*question, ("assistant", "answer"))
        answered = self._render(answer, "chat template", ask=False)
        gap = ""
        if answered.startswith(asked):
            gap = answered[len(asked) : answered.find("answer", len(asked))]
        return (asked[-1:].strip() if spaced else ""), ("" if gap.strip() else gap)

    def _render(self, prompt: Sequence[Message], source: str, ask: bool = True) -> str:
        if not self.chat:
            return render_plain(prompt, *self.plain_format)
        messages = [{"role": role, "content": content} for role, content in prompt]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=ask,
                    chat_template=self.fixed_template,
                )
            )
        except Exception as error:  # only the tokenizer's own template runs here
            what = " ".join(str(error).split())
            raise UserError(
                f"{source}: the chat template does not take this conversation ({what})"
            ) from None


def with_fixed_date(template: str, name: str) -> str | None:
    """The template with calls of ``strftime_now`` replaced by a date; None without any."""
    if not _NOW.search(template):
        return None
    fixed = _NOW_LITERAL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)
    if _NOW.search(fixed):
        raise UserError(
            f"tokenizer {name}: its chat template computes today's date from an expression, so "
            "that scores would depend on the day; fix the date there, or set data.template"
        )
    return fixed


def plain_template(begin: str, turn: str, eos: str) -> str:
    """A chat template (Jinja): each question in ``turn``, which holds {prompt}, each answer ended
    by ``eos``. A system message goes before the next question (ours)."""
    quoted = [
        json.dumps(part, ensure_ascii=False) for part in (begin, eos, *turn.split("{prompt}"))
    ]
    question = " + ns.system + m['content'] + ".join(quoted[2:])
    return (
        f"{{% set ns = namespace(system='') %}}{{{{ {quoted[0]} }}}}{{% for m in messages %}}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
        f"{{% elif m['role'] == 'user' %}}{{{{ {question} }}}}{{% set ns.system = '' %}}"
        f"{{% else %}}{{{{ m['content'] + {quoted[1]} }}}}{{% endif %}}{{% endfor %}}"
    )


@lru_cache
def _compiled(begin: str, turn: str, eos: str) -> jinja2.Template:
    return jinja2.Template(plain_template(begin, turn, eos))


def render_plain(prompt: Sequence[Message], begin: str, turn: str, eos: str) -> str:
    """A conversation up to the response, by ``plain_template``."""
    messages = [{"role": role, "content": content} for role, content in prompt]
    return _compiled(begin, turn, eos).render(messages=messages)
