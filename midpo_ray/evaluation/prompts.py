"""Prompt sets by name or file, each prompt with whether it is harmful and its category. A file's columns tell which set it is.

| set | columns | harmful | category |
|---|---|---|---|
| XSTest | prompt, type, label (older files: type alone) | label unsafe (type contrast_...) | type |
| StrongREJECT | forbidden_prompt, category | all | category |
| HarmBench | Behavior, ContextString, SemanticCategory | all | SemanticCategory |
| Do-Not-Answer | question, risk_area; or prompt, intents | all | risk_area; the file's name |
| WildGuardMix | prompt, prompt_harm_label, subcategory | prompt_harm_label | subcategory |
| PKU-SafeRLHF | prompt, response_0, is_response_0_safe, ... | an answer to it is labelled unsafe (ours) | first harm category |
| any other | prompt (text or messages), harmful or label, category | as it says, else unknown | category |

PKU-SafeRLHF labels answers, not prompts: a prompt that drew an unsafe answer counts as harmful (ours).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import digest
from ..data.files import Row, read_rows
from ..data.schema import Message
from ..errors import UserError


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
    """Where a known set lies on the hub."""

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
HARMFUL = {
    **dict.fromkeys(("unsafe", "harmful", "true", "1", "yes"), True),
    **dict.fromkeys(("safe", "benign", "unharmful", "harmless", "false", "0", "no"), False),
}


def load_prompts(name_or_file: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a known set, a hub name, a file or folder of JSONL, JSON, CSV or Parquet, or ``builtin:miniature[:SEED]``.

    Repeated prompts count once. Of a file whose rows name a split, the test rows are taken. ``limit`` draws that many, by their
    content, so that the same are drawn whatever the order.

    Raises:
        UserError: names the set, or the file and row, and what would have been right; a gated set says what to do.
    """
    read = _miniature if name_or_file.startswith("builtin:") else _read
    found = read(name_or_file)
    if not found:
        raise UserError(f"{name_or_file}: no prompts in it")
    if limit is not None and limit < len(found):
        kept = set(
            sorted(
                range(len(found)), key=lambda i: hashlib.sha256(found[i].text.encode()).digest()
            )[:limit]
        )
        found = [p for i, p in enumerate(found) if i in kept]
    return found


def load_sets(names: Sequence[str], limit: int | None = None) -> list[list[Prompt]]:
    """``load_prompts`` of each, whose answers are told apart by the sets' names. UserError where two are alike."""
    found = [load_prompts(name, limit) for name in names]
    if len({prompts[0].set for prompts in found}) < len(found):
        raise UserError(
            f"--sets: two sets are named alike ({', '.join(p[0].set for p in found)}); rename a file"
        )
    return found


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """What stands for a set's content in a report."""
    return digest([(p.id, p.text, p.messages, p.harmful, p.category) for p in prompts])


def _read(name: str) -> list[Prompt]:
    place = Path(name).expanduser()
    if not place.exists() and (
        hub := KNOWN.get(name.lower()) or next((h for h in KNOWN.values() if h.path == name), None)
    ):
        title, rows = _known_name(hub), _hub(hub)
    else:
        title, rows = (
            re.sub(r"(\.(jsonl|json|csv|parquet|gz))+$", "", place.name),
            iter(_local(place, name)),
        )
    plain = re.sub(r"[^a-z]", "", f"{title}".lower())
    all_harmful = any(known in plain for known in ALL_HARMFUL)
    found: dict[tuple[Any, ...], Prompt] = {}
    taken: set[str] = set()
    for number, (source, row) in enumerate(rows, 1):
        if row.get("split") not in (None, "test"):
            continue
        prompt = _prompt(row, source, title)
        if prompt.harmful is None and all_harmful:
            prompt = replace(prompt, harmful=True)
        before = found.get(prompt.turns)
        if before is not None:
            if (
                prompt.harmful and before.harmful is False and "response_0" in row
            ):  # PKU: another answer to it is unsafe
                found[prompt.turns] = replace(before, harmful=True, category=prompt.category)
            continue
        given = prompt.id if prompt.id and prompt.id not in taken else str(number)
        while given in taken:
            given += "'"
        taken.add(given)
        found[prompt.turns] = replace(prompt, id=given)
    return list(found.values())


def _known_name(hub: Hub) -> str:
    return next(name for name, known in KNOWN.items() if known == hub)


def _local(place: Path, name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a file or folder; of a folder whose files name splits, the test files. An unknown name is told with the known."""
    if not place.exists() and "/" not in name:
        raise UserError(
            f"--sets {name}: no such file, and no known set; known are {', '.join(KNOWN)}, {MINIATURE}"
        )
    yield from read_rows(name, "test")


def _hub(hub: Hub) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub's and the library's many errors alike: whatever it is, the set cannot be had
        what = " ".join(str(error).split())[:160]
        if any(
            sign in f"{type(error).__name__} {what}".lower() for sign in ("gated", "401", "403")
        ):
            raise UserError(
                f"{hub.path} is gated: accept its terms at https://huggingface.co/datasets/{hub.path}, log in by "
                "`hf auth login`, or name a file of it"
            ) from None
        raise UserError(
            f"{hub.path}: cannot be had from the hub ({type(error).__name__}: {what}); name a file or folder of it instead"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{hub.path} row {number}", row


def _prompt(row: Row, source: str, title: str) -> Prompt:
    def made(text: Any, harmful: bool | None, category: Any) -> Prompt:
        messages = _messages(text, source) if isinstance(text, list) else ()
        last = messages[-1][1] if messages else text
        if not isinstance(last, str) or not last.strip():
            raise UserError(
                f"{source}: the prompt is {str(text)[:40]!r}, a text (or messages that end with the user's) is expected"
            )
        name = row.get("id", row.get("BehaviorID"))
        return Prompt(
            "" if name is None else str(name), title, last, harmful, str(category or ""), messages
        )

    if "forbidden_prompt" in row:
        return made(row["forbidden_prompt"], True, row.get("category"))
    if "Behavior" in row:
        context = row.get("ContextString")
        text = f"{context}\n\n---\n\n{row['Behavior']}" if context else row["Behavior"]
        return made(text, True, row.get("SemanticCategory"))
    if "question" in row and "risk_area" in row:
        return made(row["question"], True, row["risk_area"])
    if "prompt" in row and "intents" in row:
        return made(
            row["prompt"],
            True,
            Path(re.sub(r":\d+$| row \d+$", "", source)).name.partition(".")[0].replace("_", " "),
        )
    if "response_0" in row and "prompt" in row:
        unsafe = [i for i in (0, 1) if row.get(f"is_response_{i}_safe") in (False, 0)]
        known = any(row.get(f"is_response_{i}_safe") is not None for i in (0, 1))
        return made(
            row["prompt"],
            bool(unsafe) if known else None,
            next((c for i in unsafe if (c := _harm(row, i))), ""),
        )
    text = next(
        (
            row[name]
            for name in ("prompt", "question", "instruction", "text")
            if row.get(name) is not None
        ),
        None,
    )
    if text is None:
        raise UserError(
            f"{source}: no column prompt (or question, instruction, text, forbidden_prompt, Behavior); there are "
            f"{', '.join(sorted(row)) or 'none'}"
        )
    category = next(
        (
            row[name]
            for name in ("category", "type", "subcategory", "kind")
            if isinstance(row.get(name), str)
        ),
        "",
    )
    return made(text, _harmful(row, source), category)


def _harm(row: Row, number: int) -> str:
    categories = row.get(f"response_{number}_harm_category")
    return (
        next((name for name, there in categories.items() if there), "")
        if isinstance(categories, Mapping)
        else ""
    )


def _harmful(row: Row, source: str) -> bool | None:
    for name in ("harmful", "prompt_harm_label", "label", "is_harmful"):
        given = row.get(name)
        if given is None or given == "":
            continue
        known = given if isinstance(given, bool) else HARMFUL.get(str(given).strip().lower())
        if known is None and name != "label":  # any set may have a label of its own
            raise UserError(
                f"{source}: {name} is {str(given)[:40]!r}, allowed are {', '.join(HARMFUL)}"
            )
        if known is not None:
            return known
    kind = row.get("type")
    if isinstance(kind, str) and "focus" in row:  # XSTest without its label column
        return kind.startswith("contrast_")
    return None


def _messages(value: list[Any], source: str) -> tuple[Message, ...]:
    try:
        messages = tuple((str(m["role"]), m["content"]) for m in value)
    except (TypeError, KeyError):
        raise UserError(f"{source}: a message is an object with role and content") from None
    if not messages or messages[-1][0] != "user":
        raise UserError(f"{source}: the last message is to be the user's")
    return messages


def _miniature(name: str) -> list[Prompt]:
    from ..miniature.world import held_out_prompts, make_world

    _, _, seed = name.removeprefix("builtin:").partition(":")
    if not re.fullmatch(r"builtin:miniature(:\d+)?", name):
        raise UserError(f"--sets {name}: {MINIATURE} or {MINIATURE}:SEED is expected")
    number = int(seed or 0)
    rows = [row for row in held_out_prompts(make_world(number), number) if row["split"] == "test"]
    return [
        Prompt(str(i), "miniature", row["prompt"], row["harmful"], row["kind"])
        for i, row in enumerate(rows, 1)
    ]
