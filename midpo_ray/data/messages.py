"""Prompts as messages: from a row's columns, lists of messages, and hh-rlhf dialogues."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from .files import Row
from .schema import Message, Prompt

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = ("context", "contextstring")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("prompt", "question", "instruction", "query", "input")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_MESSAGE = "a message is an object with the role system, user or assistant and a text as content"


class Asked(NamedTuple):
    """The messages that a row's columns ask with, and the columns that they come from."""

    messages: list[Message]
    columns: tuple[str, ...]  # of the question and its context; none where there is no question
    system: str | None = None  # column of the system message
    unused: tuple[str, ...] = ()  # columns that could be the question too


def asked(row: Row, source: str, questions: Sequence[str] = QUESTION_COLUMNS) -> Asked:
    """The prompt that a row states explicitly.

    The question is the first of ``questions`` that is not empty. Alpaca's ``input`` follows it, a
    ``context`` goes before it, a system column becomes the system message.

    Raises:
        UserError: columns that contradict each other, or values that are neither text nor messages.
    """
    filled: dict[str, str] = {}  # names by their lower case
    for name, value in row.items():
        if not is_empty(value) and filled.setdefault(name.lower(), name) != name:
            raise UserError(f"{source}: columns {filled[name.lower()]} and {name} are alike")
    present = [filled[name.lower()] for name in questions if name.lower() in filled]
    contexts = [filled[name] for name in CONTEXT_COLUMNS if name in filled]
    system = next((filled[name] for name in SYSTEM_COLUMNS if name in filled), None)
    if not is_empty(row.get("history")):
        raise UserError(
            f"{source}: column history is not read: write the conversation as messages in prompt"
        )
    messages: list[Message] = []
    columns = present[:1]
    unused: list[str] = []
    if present:
        value = row[present[0]]
        if is_messages(value):
            messages = as_messages(value, present[0], source)
        else:
            messages = _turns(text_of(value, present[0], source))
        role, content = messages[-1]
        for name in [*present[1:], *contexts]:
            other = row[name]
            if is_messages(other):
                unused.append(name)
                continue
            other = text_of(other, name, source)
            if _contains(content, other.strip()):
                continue
            if name.lower() == "input":
                content = f"{content}\n\n{other}"
            elif name in contexts:
                content = f"{other}\n\n---\n\n{content}"
            elif present[0].lower() == "prompt":
                unused.append(name)
                continue
            else:
                raise UserError(
                    f"{source}: columns {present[0]} and {name} could both be the prompt: rename "
                    "the right one to prompt, or remove the other"
                )
            columns.append(name)
        messages[-1] = (role, content)
        unused += [filled[name] for name in CONVERSATION_COLUMNS if name in filled]
    if system is not None:
        text = text_of(row[system], system, source)
        if not messages or messages[0][0] != "system":
            messages = [("system", text), *messages]
        elif messages[0][1].strip() != text.strip():
            raise UserError(f"{source}: {system} contradicts the system message of {columns[0]}")
    return Asked(messages, tuple(columns), system, tuple(unused))


def _contains(text: str, part: str) -> bool:
    """Whether a prompt has a column's text already: as lines of its own, or a long one anywhere."""
    return f"\n{part}\n" in f"\n{text}\n" or (len(part) >= 20 and part in text)


def _turns(text: str) -> list[Message]:
    """The messages of a text; one that ends with "Assistant:" waits for the answer."""
    if not is_dialogue(text):
        return [("user", text)]
    messages = dialogue(text)
    return messages[:-1] if messages[-1] == ("assistant", "") else messages


def complete(explicit: Sequence[Message], turns: list[Message], name: str, source: str) -> Prompt:
    """The whole conversation: the explicit prompt, then the completion's turns (as in TRL).

    The prompt is not repeated where the completion begins with the same messages.

    Raises:
        UserError: the two contradict each other.
    """
    prompt = list(explicit)
    body = [m for m in prompt if m[0] != "system"]
    own = [m for m in turns if m[0] != "system"]
    systems = {m for m in (*prompt, *turns) if m[0] == "system"}
    contradiction = UserError(
        f"{source}: {name} contradicts the prompt: it must begin with the prompt's messages or "
        "continue them"
    )
    if len(systems) > 1:
        raise contradiction
    if body and own[: len(body)] == body:
        return (*systems, *own)
    if turns[0][0] == "system" and prompt:
        if body:
            raise contradiction
        return (*systems, *own)
    if prompt and prompt[-1][0] == turns[0][0]:
        raise contradiction
    if prompt and turns[0][0] == "assistant" and prompt[-1][0] != "user":
        raise UserError(f"{source}: the prompt has no question that {name} answers")
    return (*prompt, *turns)


def is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def dialogue(text: str) -> list[Message]:
    """hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return joined((roles[speaker], content.strip()) for speaker, content in turns)


def joined(messages: Iterable[Message]) -> list[Message]:
    """Consecutive messages of one role become one (ours): chat templates want roles in turn."""
    runs = itertools.groupby(messages, key=lambda message: message[0])
    return [(role, "\n\n".join(content for _, content in run)) for role, run in runs]


def checked(messages: Sequence[Message], source: str) -> Prompt:
    """A prompt, which ends with a user message that is not empty."""
    role = messages[-1][0] if messages else "none"
    if role != "user":
        raise UserError(
            f"{source}: the prompt's last message has the role {role!r}, user is expected"
        )
    text_of(messages[-1][1], "prompt", source)
    return tuple(messages)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; a table program writes NaN there."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value != value


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages and not a text or a list of text parts."""
    if isinstance(value, Mapping):
        return "role" in value
    return isinstance(value, list) and not _is_parts(value)


def as_messages(value: Any, name: str, source: str) -> list[Message]:
    """A list of messages (or a single one); text parts of their contents are joined."""
    messages = []
    for message in [value] if isinstance(value, Mapping) else value:
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if isinstance(content, list):
            content = _joined_parts(content, name, source)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(f"{source}: {name} holds {short(message)}; {_MESSAGE}")
        messages.append((role, _unicode(content, name, source)))
    if not messages:
        raise UserError(f"{source}: {name} is an empty list of messages")
    return joined(messages)


def _is_parts(value: list[Any]) -> bool:
    typed = [isinstance(part, Mapping) and "type" in part and "role" not in part for part in value]
    return bool(typed) and all(typed)


def _joined_parts(parts: list[Any], name: str, source: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise UserError(
                f"{source}: {name} has a content part of type {kind!r}; text parts alone are read"
            )
        texts.append(text)
    return "".join(texts)


def text_of(value: Any, name: str, source: str) -> str:
    """A text that is not empty and valid Unicode; a list of text parts is joined."""
    if isinstance(value, list) and _is_parts(value):
        value = _joined_parts(value, name, source)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{source}: {name} is {short(value)}, a text is expected")
    if not value or value.isspace():
        raise UserError(f"{source}: {name} is empty, a text is expected")
    if _MESSAGES_AS_TEXT.match(value):
        raise UserError(f"{source}: {name} is a list of messages written as a text; use JSON lines")
    return _unicode(value, name, source)


def _unicode(value: str, name: str, source: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source}: {name} holds half a character (a lone surrogate), which is not Unicode"
        ) from None
    return value


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str, limit: int | None = None) -> str:
    """One line of text with control characters escaped, so that data cannot steer a terminal."""
    plain = " ".join(text.split()) if limit else text
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
    return plain if limit is None or len(plain) <= limit else plain[: limit - 3] + "..."
