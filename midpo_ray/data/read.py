"""Preference sets from files or the hub as ``Pair`` objects, checked row by row.

Dropped rows are counted: identical responses, repeated rows, and hh-rlhf dialogues without a usable
last answer (ours). The report has how each set was read, with an example.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import DataSet
from .files import read_rows
from .formats import LABELS, LabelColumns, Origin, Unusable, pair_of
from .messages import printable
from .schema import Pair, Prompt


@dataclass
class ReadAs:
    """One way in which rows of a set were read."""

    path: str
    origin: Origin
    example: Pair  # the first one
    pairs: int = 1

    def lines(self) -> list[str]:
        pair, system = self.example, "no system message"
        if self.origin.system:
            system = f"system message from {self.origin.system}"
        turns = ", ".join(f"{role} {printable(text, 80)!r}" for role, text in pair.prompt)
        responses = " | ".join(repr(printable(text, 60)) for text in pair.responses)
        return [
            f"{self.path}: {self.pairs} pairs read as {self.origin.format}, prompt from "
            f"{self.origin.prompt}, {system}",
            f"  for example {pair.source}: {turns} -> {responses}",
        ]


@dataclass
class ReadReport:
    """What reading found; ``rows`` and ``kept`` have one entry per set, in order."""

    rows: list[tuple[str, int]] = field(default_factory=list)  # (path, rows in it)
    kept: list[tuple[str, int]] = field(default_factory=list)  # (path, pairs in the mixture)
    files: dict[str, list[str]] = field(default_factory=dict)  # the files of each folder
    read_as: list[ReadAs] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason
    conflicts: list[str] = field(default_factory=list)  # the later row's, which is dropped
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """How the sets were read, with an example each, for a log."""
        lines = list(itertools.chain.from_iterable(way.lines() for way in self.read_as))
        for path, files in self.files.items():
            lines.append(f"{path}: files read: {', '.join(files) or 'none, from the hub'}")
        return lines + [f"note: {text}" for text in self.notes]

    def as_dict(self) -> dict[str, Any]:
        """For a run's JSON files."""
        ways = [
            {"path": way.path, "pairs": way.pairs, **way.origin._asdict()}
            | {"example": way.example.source}
            for way in self.read_as
        ]
        return {
            "rows": self.rows,
            "kept": self.kept,
            "files": self.files,
            "read_as": ways,
            "dropped": dict(self.dropped),
            "conflicts": self.conflicts,
            "notes": self.notes,
        }


def read_pairs(sets: Sequence[DataSet], *, seed: int) -> tuple[list[Pair], ReadReport]:
    """All pairs of the sets, mixed as configured, in the order of the sets and files.

    Of a set with ``rows`` that many are drawn by ``seed``. Sets with a ``weight`` are drawn in
    proportion to it, as many as the scarcest of them allows; a set without is taken whole.

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
                    f"{data_set.path}: {data_set.rows} rows are asked for, it has {len(pairs)}: "
                    "all are taken"
                )
            pairs = _draw(pairs, data_set.rows, f"{seed}:rows:{number}")
        drawn.append(pairs)
    shares = {n: s.weight for n, s in enumerate(sets) if s.weight is not None}
    if shares:
        total = min(len(drawn[number]) / weight for number, weight in shares.items())
        for number, weight in shares.items():
            count = math.floor(total * weight + 1e-9)
            drawn[number] = _draw(drawn[number], count, f"{seed}:weight:{number}")
    report.kept = [(data_set.path, len(pairs)) for data_set, pairs in zip(sets, drawn, strict=True)]
    mixed = list(itertools.chain.from_iterable(drawn))
    return (_without_repeats(mixed, report) if len(sets) > 1 else mixed), report


def _draw(pairs: list[Pair], count: int, seed: str) -> list[Pair]:
    if count >= len(pairs):
        return pairs
    chosen = random.Random(seed).sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(chosen)]


def _read_set(data_set: DataSet, report: ReadReport) -> Iterator[Pair]:
    rows = read_rows(data_set.path, data_set.split, data_set.revision)
    if [Path(data_set.path).expanduser()] != rows.files:
        report.files[data_set.path] = [str(file) for file in rows.files]
    report.notes += rows.notes
    labels = LabelColumns()
    ways: dict[Origin, ReadAs] = {}
    count = 0
    for source, row in rows:
        count += 1
        try:
            pair, origin = pair_of(row, source, data_set.labels, labels)
        except Unusable as reason:
            report.dropped[str(reason)] += 1
            continue
        if origin in ways:
            ways[origin].pairs += 1
        else:
            ways[origin] = ReadAs(data_set.path, origin, pair)
        if pair.responses[0] == pair.responses[1]:
            report.dropped["identical responses"] += 1
        else:
            yield pair
    report.read_as += ways.values()
    report.notes += labels.notes()
    report.rows.append((data_set.path, count))


def _without_repeats(pairs: Iterable[Pair], report: ReadReport) -> list[Pair]:
    """The first of rows with the same prompt and responses, in either order.

    Labels that the first row lacks come from the later ones. A later row whose label contradicts
    the first is a conflict: it is reported and dropped.
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
