"""The report: one HTML file that needs no network; its numbers beside it as JSON, CSV, Parquet and SVG (PNG by matplotlib).

Whatever comes from data or models is text. In SVG it is escaped. In HTML it travels as JSON in which no "<" is left, and is shown
by text nodes alone; a content policy lets no script run but the report's own, and no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from ..metrics import auroc
from ..pipeline.signals import write_table
from ..storage import Storage
from .charts import BENIGN, HARMFUL, Point, colours, histogram, line_chart, picture, text_of
from .figures import FIGURES

__all__ = ["Point", "answers_table", "write_report"]

ROOM = 3_000_000  # characters of prompts and answers in the HTML (ours): it stays below 5 MB; all of them are in answers.csv
COLUMNS = {
    "model": pa.string(), "family": pa.string(), "seed": pa.int64(), "set": pa.string(), "id": pa.string(), "prompt": pa.string(),
    "harmful": pa.bool_(), "category": pa.string(), "response": pa.string(), "tokens": pa.int64(), "truncated": pa.bool_(),
    "refused": pa.bool_(), "reward": pa.float64(), "cost": pa.float64(), "safe": pa.bool_(), "joint": pa.bool_(),
    "malformed": pa.bool_(), "degenerate": pa.bool_(), "gate_safety": pa.float64(), "gate_helpfulness": pa.float64(),
}  # fmt: skip
SHOWN = (
    "refused",
    "reward",
    "cost",
    "safe",
    "joint",
    "malformed",
    "degenerate",
    "truncated",
    "tokens",
    "gate_safety",
    "gate_helpfulness",
)


def write_report(
    folder: Storage,
    *,
    title: str,
    x_name: str,
    y_name: str,
    summary: Sequence[Mapping[str, Any]],
    points: Sequence[Point],
    comparisons: Sequence[Mapping[str, Any]],
    routing: Mapping[str, Any] | None,
    answers: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    about: Mapping[str, str],
    capability: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write report.html, report.json, summary.csv, answers.csv, answers.parquet and charts/*.svg (.png) into ``folder``.

    Args:
        x_name, y_name: what the points' axes show.
        summary: as ``figures.summarise`` gives it, by model and set, and by model, set and category.
        points: of the picture; one picture for each of their sets.
        comparisons: dicts of name, value, low, high, n, over (what the interval is over), reference (0 where it is left out;
            0.5 for a win rate).
        routing: model -> {"rows": [{"harmful", "safety" [L], "helpfulness" [L]}], one a prompt: the gates at its last token;
            "examples": [{"title", "harmful", "tokens" [T] texts, "prompt_tokens", "safety" [L][T], "helpfulness" [L][T]}]}.
        answers: rows of the answers table; columns that a row lacks are null.
        curves: "GROUP: METRIC" -> (step, value); the lines of one GROUP's METRIC are one chart.
        about: what to know to make it again: name -> text.
        capability: as ``capability.measure`` gives it; where there is any, capability.csv is written too.
    """
    routing = routing or {}
    families = {str(r["model"]): str(r.get("family", "")) for r in answers} | {
        p.label: p.family for p in points
    }
    colour = colours([*families.values()])
    charts = {
        f"picture-{s}": picture([p for p in points if p.set == s], x_name, y_name, s)
        for s in _sets(points)
    }
    routed = {
        f"routing-{m}-{name}": svg
        for m, given in routing.items()
        for name, svg in _routing_charts(m, given["rows"])
    }
    trained = _training_charts(curves)
    data = {
        "figures": {
            name: {"title": f.title, "share": f.share, "better": f.better}
            for name, f in FIGURES.items()
        },
        "models": [
            {"name": m, "family": f, "colour": colour.get(f, "#94a3b8")}
            for m, f in families.items()
        ],
        "summary": summary,
        "comparisons": [{"reference": 0, **c} for c in comparisons],
        "routing": [
            {"model": m, **_decisions(given["rows"])}
            for m, given in routing.items()
            if given["rows"]
        ],
        "capability": capability,
        "about": about,
    }
    examples = [
        {"model": m, **e} for m, given in routing.items() for e in given.get("examples", [])
    ]
    page = {
        **data,
        "examples": [_coarse(e) for e in examples],
        "answers": _side_by_side(answers, ROOM),
    }
    svgs = {"pictures": charts, "routing": routed, "training": trained}
    table = answers_table(answers)
    write_table(folder, "answers.parquet", table)
    folder.write("answers.csv", _csv(table))
    folder.write("summary.csv", _csv(_table(summary)))
    if capability:
        folder.write("capability.csv", _csv(_table(capability)))
    folder.write(
        "report.json",
        json.dumps(_plain({**data, "examples": examples, "curves": curves}), indent=1).encode(),
    )
    for name, svg in {**charts, **routed, **trained}.items():
        folder.write(f"charts/{_file_name(name)}.svg", svg.encode("utf-8", "replace"))
    if importlib.util.find_spec("matplotlib"):
        for s in _sets(points):
            png = _png([p for p in points if p.set == s], x_name, y_name, s)
            folder.write(f"charts/{_file_name(f'picture-{s}')}.png", png)
    folder.write(
        "report.html", _html(title, page, {k: "".join(v.values()) for k, v in svgs.items()})
    )


def answers_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The answers as a table: the known columns with their types, then whatever else the judges gave."""
    others = [name for name in dict.fromkeys(k for row in rows for k in row) if name not in COLUMNS]
    rows = [
        {
            k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v
            for k, v in row.items()
        }
        for row in rows
    ]
    columns = {
        name: pa.array([row.get(name) for row in rows], kind) for name, kind in COLUMNS.items()
    }
    return pa.table(
        {**columns, **{name: pa.array([row.get(name) for row in rows]) for name in others}}
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows])
            for name in dict.fromkeys(k for row in rows for k in row)
        }
    )


def _csv(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pacsv.write_csv(table, sink)
    return sink.getvalue().to_pybytes()


def _sets(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.set for p in points))


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:100]


# --- routing and training ---------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _of(rows: Sequence[Mapping[str, Any]], expert: str, harmful: bool | None) -> list[float]:
    return [_mean(r[expert]) for r in rows if r["harmful"] is harmful]


def _decisions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean decisions on harmful and on benign prompts, and how well they tell them apart."""
    found: dict[str, Any] = {"prompts": len(rows)}
    for expert in ("safety", "helpfulness"):
        for name, harmful in (("harmful", True), ("benign", False)):
            found[f"{expert}_{name}"] = _mean(_of(rows, expert, harmful))
    safety, helpfulness = (
        {h: _of(rows, expert, h) for h in (True, False)} for expert in ("safety", "helpfulness")
    )
    lean = {h: [s - g for s, g in zip(safety[h], helpfulness[h], strict=True)] for h in safety}
    return {
        **found,
        "auroc": auroc(lean[True], lean[False]),
        "auroc_safety": auroc(safety[True], safety[False]),
    }


def _routing_charts(model: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Distribution of each expert's gate, then its mean and its AUROC by layer."""
    if not rows:
        return []
    charts = []
    kinds = (("harmful", True, HARMFUL), ("benign", False, BENIGN), ("unknown", None, "#94a3b8"))
    layers = range(len(rows[0]["safety"]))
    for expert in ("safety", "helpfulness"):
        groups = [(name, _of(rows, expert, harmful), colour) for name, harmful, colour in kinds]
        charts.append(
            (expert, histogram([g for g in groups if g[1]], "gate", f"{model}: {expert} gate"))
        )
        by_layer = {
            name: [
                (float(l), _mean([r[expert][l] for r in rows if r["harmful"] is harmful]))
                for l in layers
            ]
            for name, harmful, _ in kinds[:2]
        }
        if len(layers) > 1:
            title = f"{model}: {expert} by layer"
            charts.append(
                (f"{expert}-layers", line_chart(list(by_layer.items()), "layer", "gate", title))
            )
    if len(layers) > 1 and {True, False} <= {r["harmful"] for r in rows}:
        told = []
        for l in layers:
            lean = {
                h: [r["safety"][l] - r["helpfulness"][l] for r in rows if r["harmful"] is h]
                for h in (True, False)
            }
            told.append((float(l), auroc(lean[True], lean[False])))
        title = f"{model}: harmful from benign, by layer"
        charts.append(("auroc-layers", line_chart([("AUROC", told)], "layer", "AUROC", title)))
    return charts


def _training_charts(given: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, str]:
    groups: dict[str, list[tuple[str, Sequence[tuple[float, float]]]]] = {}
    for name, points in given.items():
        group, _, metric = name.rpartition(": ")
        groups.setdefault(metric, []).append((group, points))
    return {
        f"training-{metric}": line_chart(lines, "step", metric, metric)
        for metric, lines in groups.items()
    }


# --- the page ---------------------------------------------------------------------------------------------------------------


def _coarse(example: Mapping[str, Any]) -> dict[str, Any]:
    """Two digits are enough for a colour."""
    rounded = {
        e: [[round(v, 2) for v in layer] for layer in example[e]] for e in ("safety", "helpfulness")
    }
    return {**example, **rounded}


def _side_by_side(answers: Sequence[Mapping[str, Any]], room: int) -> dict[str, Any]:
    """A row a prompt with each model's answer (of its first seed), cut to what fits; what was left out is said."""
    first: dict[str, Any] = {}
    for row in answers:
        first[row["model"]] = min(first.get(row["model"], row["seed"]), row["seed"])
    kept = [row for row in answers if row["seed"] == first[row["model"]]]
    notes = (
        [f"Answers of each model's first seed; all {len(answers)} are in answers.csv."]
        if len(kept) < len(answers)
        else []
    )
    longest = 8000
    while (
        longest > 500
        and sum(
            min(longest, len(row["response"])) + len(row["prompt"]) / len(first) for row in kept
        )
        > room
    ):
        longest //= 2
    models = list(first)
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    cut = 0
    for row in kept:
        known = {
            **{k: row[k] for k in ("set", "id", "harmful", "category")},
            "prompt": row["prompt"][:8000],
        }
        prompt = prompts.setdefault(
            (row["set"], row["id"]), {**known, "answers": [None] * len(models)}
        )
        response = row["response"]
        cut += len(response) > longest
        scores = {
            k: round(v, 4) if isinstance(v, float) else v
            for k in SHOWN
            if (v := row.get(k)) is not None
        }
        shown = response if len(response) <= longest else f"{response[:longest]} [...]"
        prompt["answers"][models.index(row["model"])] = {"response": shown, **scores}
    rows = list(prompts.values())
    size = sum(
        len(p["prompt"]) + 200 + sum(len(a["response"]) + 150 for a in p["answers"] if a)
        for p in rows
    )
    if size > 1.3 * room:
        rows = rows[:: math.ceil(size / (1.3 * room))]
        notes.append(
            f"{len(rows)} of {len(prompts)} prompts are shown, evenly over the sets; all are in answers.csv."
        )
    if cut:
        notes.append(f"Answers longer than {longest} characters are cut here, not in answers.csv.")
    return {"models": models, "prompts": rows, "notes": notes}


def _html(title: str, data: Mapping[str, Any], charts: Mapping[str, str]) -> bytes:
    home = resources.files("midpo_ray.evaluation")
    template, css, js = (
        (home / f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    content = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    parts = {
        "title": text_of(title),
        "css": css,
        "js": js,
        "hash": digest,
        "data": content,
        **charts,
    }
    # One pass over the template: a {{...}} in the data is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template).encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """For JSON: no NaN, no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _png(points: Sequence[Point], x_name: str, y_name: str, title: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    colour = colours([p.family for p in points])
    for p in points:
        spread = [[[max(0.0, v - lo)], [max(0.0, hi - v)]] if math.isfinite(lo) else None
                  for v, lo, hi in ((p.x, p.x_low, p.x_high), (p.y, p.y_low, p.y_high))]  # fmt: skip
        axes.errorbar([p.x], [p.y], xerr=spread[0], yerr=spread[1], fmt="o", color=colour[p.family])
        axes.annotate(
            p.label,
            (p.x, p.y),
            (6, 6),
            textcoords="offset points",
            color=colour[p.family],
            parse_math=False,
        )
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    sink = BytesIO()
    figure.savefig(sink, format="png", dpi=150)
    return sink.getvalue()
