"""Texts into token ids: one prompt shared by both responses, counted truncation, BOS once, EOS only where nothing was cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..config import Data, digest
from ..errors import UserError
from .schema import Message, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of the MidPO paper's base models (Safe RLHF, arXiv 2310.12773). A response follows the colon without a space.
PAPER_BEGIN, PAPER_TURN = "BEGINNING OF CONVERSATION: ", "USER: {prompt} ASSISTANT:"
PAPER = PAPER_BEGIN + PAPER_TURN
Ids = list[int]


class Tokenization:
    """How a recipe's tokenizer and template turn prompts and responses into ids.

    A prompt's ids are made apart from the response's, so that both responses of a pair have the same prefix. ``counts`` tells
    what was cut or left out by the calls so far.

    Raises:
        UserError: a tokenizer without EOS, a template without {prompt}, ``chat`` where there is no chat template, or no room.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.tokenizer, self.data = tokenizer, data
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {name}: it has no EOS token, which ends every response; set eos_token in its configuration"
            )
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.chat = data.template == "chat" or (
            data.template == "auto" and bool(tokenizer.chat_template)
        )
        if self.chat and not tokenizer.chat_template:
            raise UserError(
                f"data.template is chat, and the tokenizer {name} has no chat template: use paper or a text with {{prompt}}"
            )
        self.template = PAPER if data.template in ("auto", "paper") else data.template
        if "{prompt}" not in self.template and not self.chat:
            raise UserError(
                f"data.template is {data.template!r}, allowed are auto, chat, paper, or a text that holds {{prompt}}"
            )
        self.max_length = data.max_length
        self.max_prompt_length = data.max_prompt_length or data.max_length // 2
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length is {self.max_prompt_length}, which leaves no room for a response: it is to be below "
                f"data.max_length, {self.max_length}"
            )
        self.counts: Counter[str] = Counter()
        self._lead, self._gap = self._joint()
        self._lead_ids = self._encode([self._lead])[0] if self._lead else []

    # What a caller asks for

    def prompt_ids(self, prompt: Prompt, source: str = "prompt") -> Ids:
        """Ids of a prompt as training sees it: above ``max_prompt_length`` BOS and the end are kept, and it is counted.

        Raises:
            UserError: longer than ``max_length``, unless ``long_prompts`` says truncate.
        """
        ids = self._encode_prompts([prompt], [source])[0]
        bounded = self._bounded(ids, source)
        if bounded is None:
            raise UserError(self._too_long(source, len(ids)))
        return bounded

    @cached_property
    def null_ids(self) -> Ids:
        """What stands before a response for its unconditional log-probability: the template with an empty prompt, or BOS alone
        (EOS where there is no BOS)."""
        alone = [self.eos if self.bos is None else self.bos]
        if self.data.null_context == "bos":
            return alone
        return (
            self._encode_prompts([(("user", ""),)], ["data.null_context template"])[0][
                -self.max_prompt_length :
            ]
            or alone
        )

    def response_ids(self, text: str, room: int) -> tuple[Ids, bool]:
        """At most ``room`` ids of a response, and whether it was cut; EOS ends it where it was not."""
        return self._end(self._encode_responses([text])[0], room)

    def documents(self, pairs: Sequence[Pair]) -> list[tuple[Ids, list[Ids]] | None]:
        """(prompt's ids, [response 0's ids, response 1's]) of each pair, every response at most ``max_length`` with its prompt.

        None stands for a pair that is left out and counted: its prompt is longer than ``max_length`` and ``long_prompts`` is
        drop, or its two responses are the same tokens.

        Raises:
            UserError: a prompt longer than ``max_length`` where ``long_prompts`` is error, or a response of no tokens.
        """
        prompts = self._encode_prompts(
            [pair.prompt for pair in pairs], [pair.source for pair in pairs]
        )
        responses = self._encode_responses([text for pair in pairs for text in pair.responses])
        made: list[tuple[Ids, list[Ids]] | None] = []
        for i, (ids, pair) in enumerate(zip(prompts, pairs, strict=True)):
            prefix = self._bounded(ids, pair.source)
            made.append(
                None
                if prefix is None
                else self._document(prefix, responses[2 * i : 2 * i + 2], pair.source)
            )
        return made

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of everything that decides the ids: template, tokenizer, lengths, null context."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content: Any = sorted(self.tokenizer.get_vocab().items())
        if backend is not None:
            content = {
                k: v
                for k, v in json.loads(backend.to_str()).items()
                if k not in ("truncation", "padding")
            }
        template = self.tokenizer.chat_template if self.chat else self.template
        return digest(
            content,
            template,
            self.bos,
            self.eos,
            self.max_length,
            self.max_prompt_length,
            self.null_ids,
        )

    def template_ids(self, prompt: Prompt) -> Ids:
        """Ids of the same turns with nothing said in them: which special tokens are the template's own."""
        return self._encode_prompts([tuple((role, "x") for role, _ in prompt)], ["template"])[0]

    # How it is done

    def _document(
        self, prefix: Ids, answers: Sequence[Ids], source: str
    ) -> tuple[Ids, list[Ids]] | None:
        suffixes = []
        cuts = 0
        for number, answer in enumerate(answers):
            if not answer:
                raise UserError(
                    f"{source}: response {number} has no tokens, a text that the tokenizer knows is expected"
                )
            ids, cut = self._end(answer, self.max_length - len(prefix))
            suffixes.append(ids)
            cuts += cut
        if suffixes[0] == suffixes[1]:
            self.counts["identical responses (as tokens)"] += 1
            return None
        if cuts:
            self.counts["responses cut"] += cuts
        return prefix, suffixes

    def _bounded(self, ids: Ids, source: str) -> Ids | None:
        if len(ids) <= self.max_prompt_length:
            return ids
        if len(ids) > self.max_length and self.data.long_prompts != "truncate":
            if self.data.long_prompts == "error":
                raise UserError(self._too_long(source, len(ids)))
            self.counts["prompt longer than max_length"] += 1
            return None
        self.counts["prompts cut"] += 1
        if (
            self.bos is not None and ids[0] == self.bos and self.max_prompt_length > 1
        ):  # BOS stays in front (ours)
            return [self.bos, *ids[-(self.max_prompt_length - 1) :]]
        return ids[-self.max_prompt_length :]

    def _too_long(self, source: str, length: int) -> str:
        return (
            f"{source}: the prompt has {length} tokens, data.max_length is {self.max_length}: raise it, or set "
            "data.long_prompts to truncate or drop"
        )

    def _end(self, ids: Ids, room: int) -> tuple[Ids, bool]:
        return ([*ids, self.eos], False) if len(ids) < room else (ids[:room], True)

    def _encode_prompts(self, prompts: Sequence[Prompt], sources: Sequence[str]) -> list[Ids]:
        render = self._render_chat if self.chat else self._render_plain
        texts = [render(prompt, source) for prompt, source in zip(prompts, sources, strict=True)]
        many = self._encode(texts)
        if self.bos is None:
            return many
        for i, ids in enumerate(
            many
        ):  # BOS once: a chat template says itself where it stands, a plain one gets it in front
            while ids[:2] == [self.bos, self.bos]:
                del ids[0]
            if not self.chat and ids[:1] != [self.bos]:
                many[i] = [self.bos, *ids]
        return many

    def _encode_responses(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of responses as they follow a template; a special token's name in a response is plain text and ends nothing."""
        many = self._encode([self._lead + self._gap + text for text in texts], plain=True)
        skip = len(self._lead_ids)
        for i, ids in enumerate(many):
            if (
                ids[:skip] != self._lead_ids
            ):  # the lead grew together with the response's first character
                many[i] = self._encode([self._gap + texts[i]], plain=True)[0]
            elif skip:
                many[i] = ids[skip:]
        return many

    def _encode(self, texts: Sequence[str], plain: bool = False) -> list[Ids]:
        many: list[Ids] = []
        for start in range(
            0, len(texts), 1024
        ):  # bounded memory: the tokenizer keeps far more than ids of what it is given
            part = list(texts[start : start + 1024])
            many += self.tokenizer(
                part,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
                split_special_tokens=plain,
            )["input_ids"]
        return many

    def _joint(self) -> tuple[str, str]:
        """(lead, gap), so that a response alone gets the ids that it has behind its template.

        A tokenizer of the SentencePiece kind puts a space before any text. Where it does, responses are tokenised behind the
        lead, the template's last character, which is then taken off. The gap is white space that a chat template has before an
        answer.
        """
        first = self.tokenizer.convert_ids_to_tokens(self._encode(["a"])[0][:1])
        spaced = bool(first) and first[0].startswith(("▁", "Ġ"))
        if not self.chat:
            return (
                self.template[-1] if spaced and not self.template.endswith("{prompt}") else ""
            ), ""
        question: Prompt = (("user", "question"),)
        asked = self._render_chat(question, "chat template")
        answered = self._render_chat(
            (*question, ("assistant", "answer")), "chat template", ask=False
        )
        gap = (
            answered[len(asked) : answered.find("answer", len(asked))]
            if answered.startswith(asked)
            else ""
        )
        return (asked[-1:].strip() if spaced else ""), ("" if gap.strip() else gap)

    def _render_chat(self, prompt: Sequence[Message], source: str, ask: bool = True) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in prompt]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )  # type: ignore[return-value]
        except TemplateError as error:
            raise UserError(
                f"{source}: the chat template does not take this conversation ({error})"
            ) from None

    def _render_plain(self, prompt: Sequence[Message], source: str) -> str:
        """Turn by turn, an answer ended by EOS as in Safe RLHF; a system message goes before the first question (ours)."""
        begin, turn = (PAPER_BEGIN, PAPER_TURN) if self.template == PAPER else ("", self.template)
        return render_plain(prompt, begin, turn, self.tokenizer.eos_token)


def render_plain(prompt: Sequence[Message], begin: str, turn: str, eos: str) -> str:
    """A conversation up to the response: each question in ``turn``, each answer ended by ``eos``."""
    text, before = begin, ""
    for role, content in prompt:
        if role == "system":
            before = f"{content}\n\n"
        elif role == "user":
            text, before = text + turn.replace("{prompt}", before + content), ""
        else:
            text += f"{content}{eos}"
    return text
