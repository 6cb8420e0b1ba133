"""Preference sets from files or the hub into ``Pair``s, checked row by row.

Three schemas, told apart by their columns: PKU-SafeRLHF (``prompt, response_0, response_1`` and labels), TRL's preference format
(``chosen, rejected``, with or without ``prompt``, texts or message lists), and hh-rlhf (``chosen, rejected`` as whole dialogues).
A fault that a user can mend ends in one line that names file and row. What is dropped is counted (ours, where not in method):
rows with identical responses, repeated rows, and in hh-rlhf dialogues rows without a usable last answer.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import DataSet
from ..errors import UserError
from .files import Row, read_rows
from .schema import Message, Pair, Prompt

LABELS = ("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id")


@dataclass
class ReadReport:
    """What reading found; ``rows`` and ``kept`` have one number for each set, in order."""

    rows: list[tuple[str, int]] = field(default_factory=list)  # (path, rows in it)
    kept: list[tuple[str, int]] = field(default_factory=list)  # (path, pairs of it in the mixture)
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason
    conflicts: list[str] = field(
        default_factory=list
    )  # "FILE:9 contradicts FILE:3 (safer_response_id)"; the later is dropped
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """How the sets were read, for a log."""
        return [f"note: {text}" for text in self.notes]

    def as_dict(self) -> dict[str, Any]:
        """For a run's JSON files."""
        return asdict(self) | {"dropped": dict(self.dropped)}


def printable(text: str, limit: int | None = None) -> str:
    """One line of text with control characters escaped, so that data cannot steer a terminal."""
    plain = " ".join(text.split()) if limit else text
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
    return plain if limit is None or len(plain) <= limit else plain[: limit - 3] + "..."


class _Unusable(Exception):
    """A row that is left out and counted by this reason."""


def read_pairs(sets: Sequence[DataSet], *, seed: int) -> tuple[list[Pair], ReadReport]:
    """All pairs of the sets, mixed as they ask; the order is the sets' and the files' own.

    Of a set with ``rows`` that many are drawn by ``seed``. Sets with a ``weight`` are drawn in proportion to it, as many as the
    scarcest of them allows; a set without is taken whole.

    Raises:
        UserError: one line that names the file and row, and what would have been right.
    """
    report = ReadReport()
    drawn: list[list[Pair]] = []
    for number, data_set in enumerate(sets):
        pairs = _without_repeats(_read_set(data_set, report), report)
        if data_set.rows is not None:
            if data_set.rows > len(pairs):
                report.notes.append(
                    f"{data_set.path}: {data_set.rows} rows are asked for, it has {len(pairs)}: all are taken"
                )
            pairs = _draw(pairs, data_set.rows, f"{seed}:rows:{number}")
        drawn.append(pairs)
    shares = {
        number: data_set.weight
        for number, data_set in enumerate(sets)
        if data_set.weight is not None
    }
    if shares:
        total = min(len(drawn[number]) / weight for number, weight in shares.items())
        for number, weight in shares.items():
            drawn[number] = _draw(
                drawn[number], math.floor(total * weight + 1e-9), f"{seed}:weight:{number}"
            )
    report.kept = [(data_set.path, len(pairs)) for data_set, pairs in zip(sets, drawn, strict=True)]
    mixed = list(itertools.chain.from_iterable(drawn))
    return (_without_repeats(mixed, report) if len(sets) > 1 else mixed), report


def _draw(pairs: list[Pair], count: int, seed: str) -> list[Pair]:
    if count >= len(pairs):
        return pairs
    chosen = random.Random(seed).sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(chosen)]


def _read_set(data_set: DataSet, report: ReadReport) -> Iterator[Pair]:
    count = 0
    for source, row in read_rows(data_set.path, data_set.split, data_set.revision):
        count += 1
        try:
            pair = _pair(row, source, data_set.labels)
        except _Unusable as reason:
            report.dropped[str(reason)] += 1
            continue
        if pair.responses[0] == pair.responses[1]:
            report.dropped["identical responses"] += 1
        else:
            yield pair
    report.rows.append((data_set.path, count))


def _without_repeats(pairs: Iterable[Pair], report: ReadReport) -> list[Pair]:
    """The first of rows with the same prompt and responses, in either order; labels that the first lacks come from the later.

    A later row whose label contradicts the first is a conflict: reported, and dropped as well.
    """
    kept: list[Pair] = []
    seen: dict[tuple[Prompt, str, str], int] = {}
    for pair in pairs:
        first, second = pair.responses
        place = seen.setdefault((pair.prompt, min(first, second), max(first, second)), len(kept))
        if place == len(kept):
            kept.append(pair)
            continue
        old = kept[place]
        new = pair if pair.responses == old.responses else _swapped(pair)
        mine, theirs = old.labels, new.labels
        clash = [
            name
            for name, a, b in zip(LABELS, mine, theirs, strict=True)
            if None not in (a, b) and a != b
        ]
        if clash:
            report.conflicts.append(f"{pair.source} contradicts {old.source} ({', '.join(clash)})")
            report.dropped["contradicts an earlier row"] += 1
            continue
        report.dropped["repeats an earlier row"] += 1
        if None in mine:
            filled: list[Any] = [b if a is None else a for a, b in zip(mine, theirs, strict=True)]
            kept[place] = replace(
                old, safe=(filled[0], filled[1]), better=filled[2], safer=filled[3]
            )
    return kept


def _swapped(pair: Pair) -> Pair:
    other = {None: None, 0: 1, 1: 0}
    return replace(
        pair,
        responses=pair.responses[::-1],
        safe=pair.safe[::-1],
        better=other[pair.better],
        safer=other[pair.safer],
    )


def _pair(row: Row, source: str, labels: str) -> Pair:
    if "response_0" in row or "response_1" in row:
        return _labelled(row, source)
    if "chosen" in row or "rejected" in row:
        return _preference(row, source, labels)
    raise UserError(
        f"{source}: columns prompt, response_0, response_1 (PKU-SafeRLHF) or chosen, rejected (TRL, hh-rlhf) are missing; "
        f"there are {_names(row)}"
    )


def _labelled(row: Row, source: str) -> Pair:
    """A row of PKU-SafeRLHF. At least one label column is there; each label may be null."""
    _need(row, source, "prompt", "response_0", "response_1")
    if not any(name in row for name in LABELS):
        raise UserError(f"{source}: no label column ({', '.join(LABELS)}); there are {_names(row)}")
    return Pair(
        prompt=_prompt(row["prompt"], source),
        responses=(_response(row, "response_0", source), _response(row, "response_1", source)),
        safe=(_flag(row, "is_response_0_safe", source), _flag(row, "is_response_1_safe", source)),
        better=_index(row, "better_response_id", source),
        safer=_index(row, "safer_response_id", source),
        source=source,
        extra=_extra(row, {"prompt", "response_0", "response_1", *LABELS}),
    )


def _preference(row: Row, source: str, labels: str) -> Pair:
    """A row of TRL's format or of hh-rlhf: response 0 is the chosen one.

    What "chosen" means is ``labels``: better and safer (safe flags unknown), better alone, or safer alone; the last says too that
    the chosen response is safe and the rejected one is not (ours), which the safety expert's view asks for.
    """
    _need(row, source, "chosen", "rejected")
    sides = [row["chosen"], row["rejected"]]
    if all(isinstance(side, list) for side in sides):
        prompt, responses = _from_messages(row, source)
    elif not all(isinstance(side, str) for side in sides):
        raise UserError(
            f"{source}: chosen and rejected are to be two texts or two lists of messages"
        )
    elif row.get("prompt") is not None:
        prompt = _prompt(row["prompt"], source)
        responses = (_response(row, "chosen", source), _response(row, "rejected", source))
    elif all(_is_dialogue(side) for side in sides):
        prompt, responses = _from_dialogues(sides[0], sides[1])
    else:
        prompt, responses = _shared_beginning(sides[0], sides[1], source)
    margin = row.get("margin")
    if margin is not None and (
        isinstance(margin, bool)
        or not isinstance(margin, int | float | str)
        or not _is_finite(margin)
    ):
        raise UserError(f"{source}: margin is {margin!r}, a finite number is expected")
    return Pair(
        prompt=prompt,
        responses=responses,
        safe=(True, False) if labels == "safer" else (None, None),
        better=None if labels == "safer" else 0,
        safer=None if labels == "better" else 0,
        margin=None if margin in (None, "") else float(margin),
        source=source,
        extra=_extra(row, {"prompt", "chosen", "rejected", "margin"}),
    )


def _from_messages(row: Row, source: str) -> tuple[Prompt, tuple[str, str]]:
    """Message lists: whole conversations that differ in the last message, or that message alone beside an explicit prompt."""
    chosen, rejected = (
        _messages(row["chosen"], "chosen", source),
        _messages(row["rejected"], "rejected", source),
    )
    if len(chosen) == len(rejected) == 1:
        _need(row, source, "prompt")
        prompt = _prompt(row["prompt"], source)
    elif chosen[:-1] == rejected[:-1]:
        prompt = _checked(chosen[:-1], source)
    else:
        raise UserError(
            f"{source}: chosen and rejected are to be the same conversation but for the last message"
        )
    for name, last in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if last[0] != "assistant":
            raise UserError(
                f"{source}: the last message of {name} has the role {last[0]!r}, assistant is expected"
            )
        _text(last[1], name, source)
    return prompt, (chosen[-1][1], rejected[-1][1])


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _dialogue(text: str) -> list[Message]:
    """hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages; turns of one speaker in a row become one."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return _joined(
        (roles[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def _from_dialogues(chosen: str, rejected: str) -> tuple[Prompt, tuple[str, str]]:
    """The shared dialogue is the prompt. The published files hold a few rows without an answer to compare: left out, counted."""
    first, second = _dialogue(chosen), _dialogue(rejected)
    if first[:-1] != second[:-1]:
        raise _Unusable("dialogues part before the last answer")
    if (
        first[-1][0] != "assistant"
        or second[-1][0] != "assistant"
        or not first[-1][1]
        or not second[-1][1]
    ):
        raise _Unusable("dialogue without a last answer")
    if len(first) < 2 or not first[-2][1]:
        raise _Unusable("dialogue without a question")
    return tuple(first[:-1]), (first[-1][1], second[-1][1])


def _shared_beginning(chosen: str, rejected: str, source: str) -> tuple[Prompt, tuple[str, str]]:
    """TRL's implicit prompt: what both texts begin with, cut back to the end of a word."""
    cut = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    while cut and chosen[cut - 1].isspace():
        cut -= 1
    if not chosen[:cut].strip():
        raise UserError(
            f"{source}: no column prompt, and chosen and rejected do not begin with the same words"
        )
    responses = chosen[cut:].strip(), rejected[cut:].strip()
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        _text(response, name, source)
    return (("user", chosen[:cut]),), responses


def _prompt(value: Any, source: str) -> Prompt:
    if isinstance(value, list):
        return _checked(_messages(value, "prompt", source), source)
    text = _text(value, "prompt", source)
    if not _is_dialogue(text):
        return (("user", text),)
    messages = _dialogue(text)
    return _checked(messages[:-1] if messages[-1] == ("assistant", "") else messages, source)


def _checked(messages: Sequence[Message], source: str) -> Prompt:
    """A prompt of messages ends with a user's, and that one says something."""
    if not messages or messages[-1][0] != "user":
        role = messages[-1][0] if messages else "none"
        raise UserError(
            f"{source}: the prompt's last message has the role {role!r}, user is expected"
        )
    _text(messages[-1][1], "prompt", source)
    return tuple(messages)


def _messages(value: Any, name: str, source: str) -> list[Message]:
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, Mapping)
            else (None, None)
        )
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(
                f"{source}: {name} holds {_short(message)}; a message is an object with the role system, user or assistant "
                "and a text as content"
            )
        messages.append((role, content))
    if not messages:
        raise UserError(f"{source}: {name} is an empty list of messages")
    return _joined(messages)


def _joined(messages: Iterable[Message]) -> list[Message]:
    """Messages of one role in a row as one (ours): chat templates ask for roles in turn."""
    runs = itertools.groupby(messages, key=lambda message: message[0])
    return [(role, "\n\n".join(content for _, content in run)) for role, run in runs]


def _response(row: Row, name: str, source: str) -> str:
    return _text(row[name], name, source)


def _text(value: Any, name: str, source: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{source}: {name} is {_short(value)}, a text is expected")
    if not value or value.isspace():
        raise UserError(f"{source}: {name} is empty, a text is expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source}: {name} holds half a character (a lone surrogate), which is not valid Unicode"
        ) from None
    return value


def _index(row: Row, name: str, source: str) -> int | None:
    value = row.get(name)
    if _is_null(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
        raise UserError(f"{source}: {name} is {_short(value)}, allowed are 0, 1 and null")
    return int(value)


def _flag(row: Row, name: str, source: str) -> bool | None:
    value = row.get(name)
    if _is_null(value):
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(f"{source}: {name} is {_short(value)}, allowed are true, false and null")
    return bool(value)


def _is_null(value: Any) -> bool:
    return value is None or (
        isinstance(value, float) and math.isnan(value)
    )  # a table program writes missing labels as NaN


def _is_finite(value: float | str) -> bool:
    try:
        return value == "" or math.isfinite(float(value))
    except ValueError:
        return False


def _need(row: Row, source: str, *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        what = "column" if len(missing) == 1 else "columns"
        raise UserError(f"{source}: {what} {', '.join(missing)} missing; there are {_names(row)}")


def _names(row: Row) -> str:
    return ", ".join(sorted(row)) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _extra(row: Row, taken: set[str]) -> dict[str, Any]:
    """Plain values of the columns not read here; lists and objects (harm categories, say) would only cost memory."""
    return {
        k: v
        for k, v in row.items()
        if k not in taken and isinstance(v, str | int | float) and v != ""
    }
