"""One row of a preference set as a ``Pair``.

The columns of a row decide its format: PKU-SafeRLHF (``response_0, response_1`` and labels), TRL's
preference format (``chosen, rejected``, texts or messages), and hh-rlhf (``chosen, rejected`` as
whole dialogues).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from .files import Row
from .messages import (
    Asked,
    as_messages,
    asked,
    checked,
    complete,
    dialogue,
    is_dialogue,
    is_empty,
    is_messages,
    short,
    text_of,
)
from .schema import Message, Pair, Prompt

LABELS = ("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id")
_IDS = LABELS[2:]
_WORDS = {"true": 1, "false": 0}
_DIGITS = {"0": 0, "1": 1, "-1": -1, "0.0": 0, "1.0": 1, "-1.0": -1}
# Text columns of these names are never a prompt.
_METADATA = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|source|dataset|category|type|subset|split|domain"
    r"|lang|language|model|url|author|license|date|time|timestamp|label|labels|margin|score|rating"
    r"|score_.*|rating_.*|reward_.*|cost_.*)",
    re.IGNORECASE,
)


class Unusable(Exception):
    """A row that is dropped and counted by this reason."""


class Origin(NamedTuple):
    """How a row was read."""

    format: str
    prompt: str  # where the prompt comes from
    system: str  # where the system message comes from; empty: there is none


class LabelColumns:
    """The label columns of a set: all values of a file's column are of one kind."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], tuple[str, str]] = {}  # (file, column) -> kind, source
        self.values: dict[tuple[str, str], Counter[int]] = {}

    def read(self, row: Row, source: str) -> list[Any]:
        """The four labels of a row; None where a label is not known."""
        file = re.sub(r"(:| row )\d+$", "", source)
        return [self._read(row.get(name), name, file, source) for name in LABELS]

    def _read(self, value: Any, name: str, file: str, source: str) -> bool | int | None:
        kind, label = "a value", None
        if isinstance(value, str):
            text = value.strip().lower()
            if text in ("", "null", "none", "nan"):
                return None
            kind = "true or false as texts" if text in _WORDS else "numbers as texts"
            label = _WORDS.get(text, _DIGITS.get(text))
        elif is_empty(value):
            return None
        elif isinstance(value, int | float) and value in (0, 1, -1):
            label = int(value)
        is_id = name in _IDS
        is_word = isinstance(value, bool) or kind.startswith("true")
        if label is None or (is_word if is_id else label < 0):
            allowed = "0, 1, -1 (a tie)" if is_id else "true, false"
            raise UserError(f"{source}: {name} is {short(value)}, allowed are {allowed} and null")
        first, where = self.kinds.setdefault((file, name), (kind, source))
        if kind != first:
            raise UserError(
                f"{source}: {name} is {short(value)}, in {where} it is {first}: one kind of value "
                "is expected in a column"
            )
        self.values.setdefault((file, name), Counter())[label] += 1
        if is_id:
            return None if label < 0 else label
        return bool(label)

    def notes(self) -> list[str]:
        """What was converted. Raises UserError where -1 could mean response 0 instead of a tie."""
        notes = []
        for (file, name), (kind, _) in self.kinds.items():
            values = self.values[file, name]
            if kind != "a value" and not file.lower().endswith((".csv", ".csv.gz")):
                notes.append(f"{file}: {name} holds {kind}, which are taken as labels")
            if values[-1] and not values[0] and values.total() >= 10:
                raise UserError(
                    f"{file}: {name} holds 1 and -1 and never 0: write 0 for the first response, "
                    "1 for the second, null for a tie"
                )
            if values[-1]:
                notes.append(f"{file}: {name} is -1 in {values[-1]} rows: a tie, taken as null")
        return notes


def pair_of(row: Row, source: str, meaning: str, labels: LabelColumns) -> tuple[Pair, Origin]:
    """The pair of a row, and how it was read; ``meaning`` is ``DataSet.labels``.

    Raises:
        UserError: one line that names the row and what would have been right.
        Unusable: a row that published sets have and that is to be counted.
    """
    if "response_0" in row or "response_1" in row:
        return _labelled(row, source, labels)
    if "chosen" in row or "rejected" in row:
        return _preference(row, source, meaning)
    raise UserError(
        f"{source}: columns prompt, response_0, response_1 (PKU-SafeRLHF) or chosen, rejected "
        f"(TRL, hh-rlhf) are missing; there are {_names(row)}"
    )


def _labelled(row: Row, source: str, labels: LabelColumns) -> tuple[Pair, Origin]:
    """A row of PKU-SafeRLHF. It has one label column or more; each label may be null."""
    question = asked(row, source)
    if not question.columns:
        _need(row, source, "prompt")
        text_of(row["prompt"], "prompt", source)
    _need(row, source, "response_0", "response_1")
    if not any(name in row for name in LABELS):
        raise UserError(f"{source}: no label column ({', '.join(LABELS)}); there are {_names(row)}")
    responses = [text_of(row[f"response_{i}"], f"response_{i}", source) for i in (0, 1)]
    first, second, better, safer = labels.read(row, source)
    pair = Pair(
        prompt=checked(question.messages, source),
        responses=(responses[0], responses[1]),
        safe=(first, second),
        better=better,
        safer=safer,
        source=source,
        extra=_extra(row, {"response_0", "response_1", *LABELS, *question.columns}),
    )
    return pair, Origin("PKU-SafeRLHF", *_origin(question, pair.prompt))


def _preference(row: Row, source: str, meaning: str) -> tuple[Pair, Origin]:
    """A row of TRL's format or of hh-rlhf: response 0 is the chosen one.

    ``meaning`` says what "chosen" compares: both axes (safe flags unknown), better alone, or safer
    alone; the last also makes chosen safe and rejected unsafe (ours), as the safety rule needs.
    """
    _need(row, source, "chosen", "rejected")
    question = asked(row, source)
    sides = [row["chosen"], row["rejected"]]
    if all(is_messages(side) for side in sides):
        kind = "TRL messages"
        chosen = as_messages(sides[0], "chosen", source)
        rejected = as_messages(sides[1], "rejected", source)
        prompt, responses = _from_messages(row, question, chosen, rejected, source)
    elif any(is_messages(side) for side in sides):
        raise UserError(f"{source}: chosen and rejected must be two texts or two lists of messages")
    else:
        kind = "TRL texts"
        texts = [text_of(row[name], name, source) for name in ("chosen", "rejected")]
        if all(is_dialogue(text) for text in texts):
            kind = "hh-rlhf dialogues"
            prompt, responses = _from_dialogues(question.messages, texts[0], texts[1], source)
        elif question.columns:
            prompt, responses = checked(question.messages, source), (texts[0], texts[1])
        else:
            prompt, responses = _shared_beginning(row, question, texts[0], texts[1], source)
    origin = _origin(question, prompt)
    if not question.columns:
        shared = "the messages that chosen and rejected share"
        if kind == "TRL texts":
            shared = "the common beginning of chosen and rejected (a guess: there is no prompt)"
        origin = (shared, origin[1])
    pair = Pair(
        prompt=prompt,
        responses=responses,
        safe=(True, False) if meaning == "safer" else (None, None),
        better=None if meaning == "safer" else 0,
        safer=None if meaning == "better" else 0,
        margin=_margin(row, source),
        source=source,
        extra=_extra(row, {"chosen", "rejected", "margin", *question.columns}),
    )
    return pair, Origin(kind, *origin)


def _origin(question: Asked, prompt: Prompt) -> tuple[str, str]:
    """(where the prompt comes from, where the system message comes from)."""
    what = "columns" if len(question.columns) > 1 else "column"
    columns = f"{what} {' and '.join(question.columns)}"
    if question.unused:
        columns += f" (not used: {', '.join(question.unused)})"
    system = "the messages" if prompt[0][0] == "system" else ""
    return columns, f"column {question.system}" if question.system else system


def _margin(row: Row, source: str) -> float | None:
    value = row.get("margin")
    if is_empty(value) and not isinstance(value, float):
        return None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            margin = float(value)
            if math.isfinite(margin):
                return margin
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{source}: margin is {short(value)}, a finite number is expected")


def _from_messages(
    row: Row, question: Asked, chosen: list[Message], rejected: list[Message], source: str
) -> tuple[Prompt, tuple[str, str]]:
    """Messages: the explicit prompt, then turns that are the same but for the last answer."""
    if not question.columns and len(chosen) == len(rejected) == 1:
        _need(row, source, "prompt")
        text_of(row["prompt"], "prompt", source)
    first = complete(question.messages, chosen, "chosen", source)
    second = complete(question.messages, rejected, "rejected", source)
    for name, whole in (("chosen", first), ("rejected", second)):
        role, content = whole[-1]
        if role != "assistant":
            raise UserError(
                f"{source}: the last message of {name} has the role {role!r}, assistant is expected"
            )
        text_of(content, name, source)
    if first[:-1] != second[:-1]:
        raise UserError(
            f"{source}: chosen and rejected must be the same conversation but for the last message"
        )
    return checked(first[:-1], source), (first[-1][1], second[-1][1])


def _from_dialogues(
    explicit: Sequence[Message], chosen: str, rejected: str, source: str
) -> tuple[Prompt, tuple[str, str]]:
    """The shared dialogue is the prompt. A few published rows have no answers to compare."""
    first, second = dialogue(chosen), dialogue(rejected)
    if first[:-1] != second[:-1]:
        raise Unusable("dialogues part before the last answer")
    for role, answer in (first[-1], second[-1]):
        if role != "assistant" or not answer:
            raise Unusable("dialogue without a last answer")
    if len(first) < 2 or not first[-2][1]:
        raise Unusable("dialogue without a question")
    prompt = complete(explicit, first, "chosen", source)[:-1]
    return prompt, (first[-1][1], second[-1][1])


def _shared_beginning(
    row: Row, question: Asked, chosen: str, rejected: str, source: str
) -> tuple[Prompt, tuple[str, str]]:
    """TRL's implicit prompt: what both texts begin with, cut back to the end of a word.

    It is a guess, and is refused where another column could be the prompt.
    """
    taken = {"chosen", "rejected", "margin", question.system}
    for name, value in row.items():
        possible = isinstance(value, str | list) and not is_empty(value)
        if name == "prompt" or (
            possible and name not in taken and not _METADATA.fullmatch(name.strip())
        ):
            raise UserError(
                f"{source}: the prompt is not known: column {name} could be it. Name the right "
                "column prompt and fill it, or remove the others"
            )
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    while cut and chosen[cut - 1].isspace():
        cut -= 1
    if not chosen[:cut].strip():
        raise UserError(
            f"{source}: no column prompt, and chosen and rejected do not begin with the same words"
        )
    first = text_of(chosen[cut:].strip(), "chosen", source)
    second = text_of(rejected[cut:].strip(), "rejected", source)
    return (*question.messages, ("user", chosen[:cut])), (first, second)


def _need(row: Row, source: str, *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        what = "column" if len(missing) == 1 else "columns"
        raise UserError(f"{source}: {what} {', '.join(missing)} missing; there are {_names(row)}")


def _names(row: Row) -> str:
    return ", ".join(sorted(row)) or "none"


def _extra(row: Row, taken: set[str]) -> dict[str, Any]:
    """Plain values of the other columns; lists and objects would only cost memory."""
    return {
        k: v
        for k, v in row.items()
        if k not in taken and isinstance(v, str | int | float) and v != ""
    }
