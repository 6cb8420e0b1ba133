"""The one report page: a file that needs no network, shown in light and dark.

Whatever comes from data or models is text: jinja2 escapes it, and answers travel as JSON without
"<", which the page's script shows by text nodes. The content policy lets no other script run and no
request leave. Text that may be harmful is not shown until it is clicked on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar

import jinja2
import pandas as pd
from markupsafe import Markup

from ..metrics import Estimate
from ..storage import Storage
from .plots import Plot

_ROOM = 3_000_000  # characters of prompts and answers (ours): the page stays below 5 MB
_SCORES = ("reward", "cost", "tokens", "gate_safety", "gate_helpfulness")
_FLAGS = ("refused", "safe", "joint", "malformed", "degenerate", "truncated")


@dataclass(frozen=True)
class PageTable:
    """One line per row of ``frame``; its headings sort. A cell is a text, a number, or an
    ``Estimate``, shown with its interval.

    Args:
        better: heading -> "high" or "low", where one is better: the heading says so, and the best
            cell is bold.
        shares: headings of the columns that are shown in percent.
        folded: shown only when its title is clicked.
    """

    frame: pd.DataFrame
    title: str = ""
    note: str = ""
    better: Mapping[str, str] = field(default_factory=dict)
    shares: Collection[str] = ()
    folded: bool = False
    kind: ClassVar[str] = "table"

    def heads(self) -> list[dict[str, str]]:
        arrows = {"high": "↑", "low": "↓"}
        hints = {"high": "higher is better", "low": "lower is better"}
        return [
            {
                "text": str(c),
                "arrow": arrows.get(self.better.get(c, ""), ""),
                "hint": hints.get(self.better.get(c, ""), ""),
            }
            for c in self.frame.columns
        ]

    def lines(self) -> list[list[dict[str, Any]]]:
        columns = [self._cells(str(c)) for c in self.frame.columns]
        return [list(line) for line in zip(*columns, strict=True)]

    def _cells(self, column: str) -> list[dict[str, Any]]:
        show = _percent if column in self.shares else _number
        values = list(self.frame[column])
        numbers = [_value(v) for v in values]
        finite = [n for n in numbers if math.isfinite(n)]
        pick = {"high": max, "low": min}.get(self.better.get(column, ""))
        best = pick(finite) if pick and len(set(finite)) > 1 else math.nan
        cells = []
        for value, number in zip(values, numbers, strict=True):
            interval = isinstance(value, Estimate) and not math.isnan(value.low)
            cells.append({
                "text": value if isinstance(value, str) else show(number),
                "interval": f"{show(value.low)} to {show(value.high)}" if interval else "",
                "sort": value if isinstance(value, str) else number,
                "number": not isinstance(value, str),
                "best": number == best,
            })  # fmt: skip
        return cells


@dataclass(frozen=True)
class PageText:
    """Plain text, shown as it is; ``title`` names it."""

    text: str
    title: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class TokenMap:
    """A text whose tokens are coloured by weights in [0, 1], one row of weights per name."""

    title: str
    tokens: Sequence[str]
    weights: Mapping[str, Sequence[float]]
    prompt_tokens: int
    hidden: bool  # the text is or may be harmful
    kind: ClassVar[str] = "tokens"


@dataclass(frozen=True)
class AnswerBrowser:
    """Every prompt with each system's answer (of its first seed), to be searched, filtered and
    sorted.

    Args:
        answers: an answers table, as ``metrics`` describes it, with the prompt and the response.
        first: systems that are shown at the start; the others can be ticked.
    """

    answers: pd.DataFrame
    first: Collection[str] = ()
    room: int = _ROOM
    kind: ClassVar[str] = "answers"

    def data(self) -> dict[str, Any]:
        """What the page's script reads; ``notes`` name what does not fit into ``room``."""
        answers, notes = self.answers, []
        kept = answers[answers["seed"] == answers.groupby("model")["seed"].transform("min")]
        if len(kept) < len(answers):
            notes.append(
                f"Answers of each model's first seed; all {len(answers)} are in answers.csv."
            )
        prompts = kept.drop_duplicates(["set", "id"])
        length = int(
            kept["response"].str.len().clip(upper=8000).sum() + prompts["prompt"].str.len().sum()
        )
        longest = 8000 if length <= self.room else max(500, self.room // len(kept))
        most = max(1, self.room // (longest * max(1, kept["model"].nunique())))
        if length > self.room and longest * len(kept) > self.room:
            notes.append(
                f"Some {most} of {len(prompts)} prompts are shown; all are in answers.csv."
            )
            prompts = prompts.iloc[:: math.ceil(len(prompts) / most)]
        if (kept["response"].str.len() > longest).any():
            notes.append(
                f"Answers longer than {longest} characters are cut here, not in answers.csv."
            )
        models = list(dict.fromkeys(kept["model"]))
        by_prompt = dict(list(kept.groupby(["set", "id"], sort=False)))
        rows = []
        for prompt in prompts.to_dict("records"):
            given = by_prompt[prompt["set"], prompt["id"]].set_index("model").to_dict("index")
            row = {key: prompt[key] for key in ("set", "id", "harmful", "category")}
            row["prompt"] = prompt["prompt"][:8000]
            row["answers"] = [_answer(given[m], longest) if m in given else None for m in models]
            rows.append(row)
        first = [models.index(m) for m in self.first if m in models] or [
            *range(min(3, len(models)))
        ]
        return {"models": models, "first": first, "prompts": rows, "notes": notes}


PagePart = PageTable | PageText | TokenMap | AnswerBrowser | Plot


@dataclass(frozen=True)
class PageSection:
    """A heading, a note below it, and what follows in order."""

    title: str
    parts: Sequence[PagePart]
    note: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[PageSection]
    summary: Sequence[str] = ()


def write_page(folder: Storage, page: Page) -> None:
    """Write report.html and charts/NAME.svg, .png of every plot; empty sections are left out."""
    sections = [s for s in page.sections if s.parts]
    for section in sections:
        for part in section.parts:
            if isinstance(part, Plot):
                folder.write(f"charts/{part.name}.svg", part.svg)
                folder.write(f"charts/{part.name}.png", part.png)
    script = (resources.files("midpo_ray.report") / "page.js").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("midpo_ray", "report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    html = environment.get_template("page.html.j2").render(
        page=page,
        sections=sections,
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        as_json=_as_json,
        as_uri=lambda plot: f"data:image/svg+xml;base64,{base64.b64encode(plot.svg).decode()}",
    )
    folder.write("report.html", html.encode("utf-8", "replace"))


def jsonable(value: Any) -> Any:
    """For JSON: an estimate as a mapping, and nothing of NaN, infinity and numpy's types."""
    if isinstance(value, Estimate):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_json(data: Any) -> Markup:
    text = json.dumps(jsonable(data), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _answer(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    text = row["response"]
    scores = {k: round(float(row[k]), 4) for k in _SCORES if not _null(row.get(k))}
    flags = {k: bool(row[k]) for k in _FLAGS if not _null(row.get(k))}
    return {
        "response": text if len(text) <= longest else f"{text[:longest]} [...]",
        **scores,
        **flags,
    }


def _null(value: Any) -> bool:
    return value is None or value != value


def _value(cell: Any) -> float:
    """The number of a cell; NaN of a text or of nothing."""
    if cell is None or isinstance(cell, str):
        return math.nan
    return float(cell.value if isinstance(cell, Estimate) else cell)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    whole = value.is_integer() and abs(value) < 1e9
    return f"{value:.0f}" if whole else f"{value:#.3g}".rstrip(".")


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"
