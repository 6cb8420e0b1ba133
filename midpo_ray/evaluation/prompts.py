"""Prompt sets by name or file, each prompt with whether it is harmful and its category.

The columns of a file tell which set it is:

| set | prompt | harmful | category |
|---|---|---|---|
| XSTest | prompt | label unsafe (older files: type contrast_...) | type |
| StrongREJECT | forbidden_prompt | all | category |
| HarmBench | Behavior, ContextString | all | SemanticCategory |
| JailbreakBench | Goal | files named harmful, not those named benign | Category |
| Do-Not-Answer | question; or prompt beside intents | all | risk_area; the file's name |
| WildGuardMix | prompt | prompt_harm_label | subcategory |
| PKU-SafeRLHF | prompt | an answer to it is labelled unsafe (ours) | first harm category |
| any other | the first of ``COLUMNS`` | harmful or label, else unknown | category |

A system and a context column belong to the prompt. ``FILE:column=NAME`` names its column.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import digest
from ..data.files import Row, read_rows
from ..data.messages import asked, checked, is_empty, text_of
from ..data.schema import Message
from ..errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str  # unique in its set
    set: str
    text: str  # of several messages, the last user message
    harmful: bool | None  # None: not known
    category: str
    messages: tuple[Message, ...] = ()  # where the set has several

    @property
    def turns(self) -> tuple[Message, ...]:
        return self.messages or (("user", self.text),)


class Hub(NamedTuple):
    """Where a known set is on the hub."""

    path: str
    config: str | None = None
    split: str = "train"


KNOWN = {
    "pku-saferlhf": Hub("PKU-Alignment/PKU-SafeRLHF", split="test"),
    "do-not-answer": Hub("LibrAI/do-not-answer"),
    "wildguardmix": Hub("allenai/wildguardmix", "wildguardtest", "test"),
    "xstest": Hub("Paul/XSTest"),
    "strongreject": Hub("walledai/StrongREJECT"),
    "harmbench": Hub("walledai/HarmBench", "standard"),
}
ALL_HARMFUL = ("strongreject", "harmbench", "donotanswer")
MINIATURE = "builtin:miniature"
# Columns that can be the prompt, the first that a row fills is; compared in lower case.
COLUMNS = (
    "forbidden_prompt", "prompt", "goal", "behavior", "question", "instruction", "query", "text",
    "input",
)  # fmt: skip
CATEGORIES = ("semanticcategory", "risk_area", "category", "type", "subcategory", "kind")
HARMFUL_WORDS = {
    **dict.fromkeys(("unsafe", "harmful", "true", "1", "yes"), True),
    **dict.fromkeys(("safe", "benign", "unharmful", "harmless", "false", "0", "no"), False),
}


def load_prompts(name_or_file: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a known set, a hub name, a file or folder, or ``builtin:miniature[:SEED]``.

    A row is identified by all that makes its prompt; repeated ones count once. Where rows name a
    split the test rows are taken. ``limit`` draws that many by their content, in any order alike.

    Raises:
        UserError: names the set, or the file and row, and what would have been right.
    """
    miniature = name_or_file.startswith("builtin:")
    prompts = _miniature(name_or_file) if miniature else _read(name_or_file)
    if not prompts:
        raise UserError(f"{name_or_file}: no prompts in it")
    if limit is not None and limit < len(prompts):
        hashes = [hashlib.sha256(p.text.encode()).digest() for p in prompts]
        drawn = sorted(range(len(prompts)), key=lambda i: hashes[i])[:limit]
        prompts = [prompts[i] for i in sorted(drawn)]
    return prompts


def load_sets(names: Sequence[str], limit: int | None = None) -> list[list[Prompt]]:
    """``load_prompts`` of each. Raises UserError where two sets have one name."""
    sets = [load_prompts(name, limit) for name in names]
    if len({prompts[0].set for prompts in sets}) < len(sets):
        raise UserError(
            f"--sets: two sets have one name ({', '.join(p[0].set for p in sets)}); rename a file"
        )
    return sets


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """What identifies a set's content in a report."""
    return digest([(p.id, p.text, p.messages, p.harmful, p.category) for p in prompts])


def split_name(name: str) -> tuple[str, str | None]:
    """(file or name, column) of ``FILE:column=NAME``."""
    path, _, column = name.partition(":column=")
    return path, column or None


def _read(name: str) -> list[Prompt]:
    path, column = split_name(name)
    place = Path(path).expanduser()
    hub = None
    if not place.exists():
        known = (h for n, h in KNOWN.items() if path in (n, h.path) or path.lower() == n)
        hub = next(known, None)
        if hub is None and "/" not in path:
            names = ", ".join([*KNOWN, MINIATURE])
            raise UserError(f"--sets {path}: no such file, and no known set; known are {names}")
    if hub is not None:
        title = next(n for n, h in KNOWN.items() if h == hub)
        rows = read_rows(hub.path, hub.split, config=hub.config)
    else:
        title = re.sub(r"(\.(jsonl|json|csv|parquet|gz))+$", "", place.name)
        rows = read_rows(path, "test")
    prompts: dict[tuple[Any, ...], Prompt] = {}
    ids: set[str] = set()
    origins: Counter[str] = Counter()
    for number, (source, row) in enumerate(rows, 1):
        if row.get("split") not in (None, "test"):
            continue
        prompt, origin = _prompt(row, source, title, column)
        origins[origin] += 1
        before = prompts.get(prompt.turns)
        if before is not None:  # PKU: another answer to it is unsafe
            if prompt.harmful and before.harmful is False and "response_0" in row:
                prompts[prompt.turns] = replace(before, harmful=True, category=prompt.category)
            continue
        unique = prompt.id if prompt.id and prompt.id not in ids else str(number)
        while unique in ids:
            unique += "'"
        ids.add(unique)
        prompts[prompt.turns] = replace(prompt, id=unique)
    for origin, count in origins.items():
        log.info("%s: %s rows, prompt from %s", path, count, origin)
    for note in rows.notes:
        log.info("%s", note)
    return list(prompts.values())


def _prompt(row: Row, source: str, title: str, column: str | None) -> tuple[Prompt, str]:
    """The prompt of a row, and which columns it comes from."""
    if column is not None and column not in row:
        names = ", ".join(sorted(row)) or "none"
        raise UserError(f"{source}: no column {column}, which --sets names; there are {names}")
    lower = {name.lower(): name for name in row}
    candidates = [lower[c] for c in COLUMNS if c in lower and not is_empty(row[lower[c]])]
    used = column
    if used is None and candidates:
        used = candidates[0]
    if used is None:
        empty = [lower[c] for c in COLUMNS if c in lower]
        what = f"{empty[0]} is empty" if empty else "no column is known as the prompt"
        raise UserError(
            f"{source}: {what}; there are {', '.join(sorted(row)) or 'none'}, known are "
            f"{', '.join(COLUMNS)}, and --sets FILE:column=NAME names another"
        )
    questions = [used, "input"] if used == lower.get("instruction") else [used]
    question = asked(row, source, questions)
    if not question.columns:
        text_of(row[used], used, source)
    messages = checked(question.messages, source)
    others = [c for c in candidates if c not in question.columns]
    origin = " and ".join([*question.columns, *([question.system] if question.system else [])])
    if others:
        origin += f" (also possible, by FILE:column=NAME: {', '.join(others)})"
    harmful, category = _harmful(row, lower, source, title)
    identity = row.get("id", row.get("BehaviorID"))
    several = messages if len(messages) > 1 else ()
    return (
        Prompt(
            "" if identity is None else str(identity),
            title,
            messages[-1][1],
            harmful,
            category,
            several,
        ),
        f"column {origin}",
    )


def _harmful(
    row: Row, lower: Mapping[str, str], source: str, title: str
) -> tuple[bool | None, str]:
    """(whether the prompt is harmful or None, its category)."""
    values = [row[lower[name]] for name in CATEGORIES if name in lower]
    category = next((value for value in values if isinstance(value, str)), "")
    plain = re.sub(r"[^a-z]", "", title.lower())
    if {"goal", "behavior"} <= lower.keys():  # JailbreakBench
        if "benign" in plain:
            return False, category
        return (True if "harmful" in plain else _label(row, source)), category
    if "intents" in row and "prompt" in row:  # Do-Not-Answer: the file is the category
        file = Path(re.sub(r":\d+$| row \d+$", "", source)).name
        return True, file.partition(".")[0].replace("_", " ")
    if "response_0" in row:
        safe = [str(row.get(f"is_response_{i}_safe")).strip().lower() for i in (0, 1)]
        unsafe = [i for i in (0, 1) if safe[i] in ("false", "0", "0.0")]
        known = any(flag not in ("none", "null", "nan", "") for flag in safe)
        named = [_harm_category(row, i) for i in unsafe]
        return (bool(unsafe) if known else None), next(filter(None, named), "")
    label = _label(row, source)
    harmful_set = bool({"forbidden_prompt", "behavior", "risk_area"} & lower.keys())
    if label is None and (harmful_set or any(known in plain for known in ALL_HARMFUL)):
        label = True
    return label, category


def _harm_category(row: Row, number: int) -> str:
    categories = row.get(f"response_{number}_harm_category")
    if not isinstance(categories, Mapping):
        return ""
    return next((name for name, present in categories.items() if present), "")


def _label(row: Row, source: str) -> bool | None:
    for name in ("harmful", "prompt_harm_label", "label", "is_harmful"):
        value = row.get(name)
        if is_empty(value):
            continue
        known = HARMFUL_WORDS.get(str(value).strip().lower().removesuffix(".0"))
        if known is not None:
            return known
        if name != "label":  # any set may have labels of its own
            allowed = ", ".join(HARMFUL_WORDS)
            raise UserError(f"{source}: {name} is {str(value)[:40]!r}, allowed are {allowed}")
    kind = row.get("type")
    if isinstance(kind, str) and "focus" in row:  # XSTest without its label column
        return kind.startswith("contrast_")
    return None


def _miniature(name: str) -> list[Prompt]:
    from ..miniature.world import held_out_prompts, make_world  # only where it is asked for

    _, _, seed = name.removeprefix("builtin:").partition(":")
    if not re.fullmatch(r"builtin:miniature(:\d+)?", name):
        raise UserError(f"--sets {name}: {MINIATURE} or {MINIATURE}:SEED is expected")
    number = int(seed or 0)
    rows = [row for row in held_out_prompts(make_world(number), number) if row["split"] == "test"]
    return [
        Prompt(str(i), "miniature", row["prompt"], row["harmful"], row["kind"])
        for i, row in enumerate(rows, 1)
    ]
