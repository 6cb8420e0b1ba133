"""The report of evaluate and study: a page, and its numbers as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv

from ..config import EXPERTS
from ..metrics import METRICS, Estimate, auroc, tpr_at_fpr
from ..pipeline.signals import write_table
from ..report import plots
from ..report.page import (
    AnswerBrowser,
    Page,
    PageSection,
    PageTable,
    PageText,
    TokenMap,
    jsonable,
    write_page,
)
from ..storage import Storage
from .results import Results

_COLUMNS = {
    "model": pa.string(), "family": pa.string(), "seed": pa.int64(), "set": pa.string(),
    "id": pa.string(), "prompt": pa.string(), "harmful": pa.bool_(), "category": pa.string(),
    "response": pa.string(), "tokens": pa.int64(), "truncated": pa.bool_(), "refused": pa.bool_(),
    "reward": pa.float64(), "cost": pa.float64(), "safe": pa.bool_(), "joint": pa.bool_(),
    "malformed": pa.bool_(), "degenerate": pa.bool_(), "gate_safety": pa.float64(),
    "gate_helpfulness": pa.float64(),
}  # fmt: skip


def write_report(
    folder: Storage,
    title: str,
    results: Results,
    answers: pd.DataFrame,
    *,
    routing: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    about: Mapping[str, str] | None = None,
    capability: pd.DataFrame | None = None,
    sections: Sequence[PageSection] = (),
) -> None:
    """Write report.html, report.json, summary.csv, answers.csv, answers.parquet and charts/* (.svg,
    .png) into ``folder``.

    Args:
        answers: an answers table (``metrics``) with family, prompt and response.
        routing: model -> {"rows": one dict per prompt, harmful and each expert's gates [L] at its
            last token; "examples": dicts of title, harmful, tokens [T], prompt_tokens and each
            expert's gates [L][T]}.
        curves: "GROUP: METRIC" -> (step, value); the lines of one METRIC are one plot.
        about: name -> text: how to make this report again.
        capability: as ``capability.measure`` gives it; capability.csv is written too.
        sections: what else the page shows, after the trade-off plots.
    """
    routing, curves, about = (
        routing or {},
        curves or {},
        {**(about or {}), "intervals": results.intervals},
    )
    gates = {
        model: _gate_arrays(given["rows"]) for model, given in routing.items() if given["rows"]
    }
    separation = pd.DataFrame(
        [{"model": m, **_separation(*of_model)} for m, of_model in gates.items()]
    )
    examples = [
        {"model": m, **e} for m, given in routing.items() for e in given.get("examples", [])
    ]
    table = answers_table(answers.to_dict("records"))
    write_table(folder, "answers.parquet", table)
    folder.write("answers.csv", _csv(table))
    folder.write("summary.csv", results.summary.to_csv(index=False).encode())
    data = {"summary": results.summary, "comparisons": results.comparisons, "routing": separation}
    if capability is not None:
        folder.write("capability.csv", capability.to_csv(index=False).encode())
        data["capability"] = capability
    records = {name: frame.to_dict("records") for name, frame in data.items()}
    numbers = jsonable({**records, "about": about, "examples": examples, "curves": curves})
    folder.write("report.json", json.dumps(numbers, indent=1).encode())
    parts = [
        PageSection("Trade-off", _tradeoffs(results), _TRADEOFF_NOTE),
        *sections,
        PageSection("Metrics", _metric_tables(results.summary), _METRICS_NOTE),
        PageSection("Comparisons", _comparison_parts(results.comparisons), _COMPARISONS_NOTE),
        PageSection("General capability", _capability_table(capability), _CAPABILITY_NOTE),
        PageSection(
            "Routing",
            [*_gate_plots(gates), *_gate_table(separation), *_token_maps(examples)],
            _ROUTING_NOTE,
        ),
        PageSection("Training", _training_plots(curves)),
        PageSection(
            "Answers", [AnswerBrowser(answers, _shown_first(answers))] if len(answers) else []
        ),
        PageSection("About", [PageText(value, name) for name, value in about.items() if value]),
    ]
    write_page(folder, Page(title, parts))


_TRADEOFF_NOTE = (
    "Up and to the right is better. A cross is a 95% interval. The dotted line joins the systems "
    "that no other one dominates."
)
_METRICS_NOTE = (
    "Below each value is its 95% interval. Truncated and malformed text often counts as safe: read "
    "these columns together."
)
_COMPARISONS_NOTE = (
    "An interval that crosses the line (0.5 for win rates, 0 for differences) shows no difference."
)
_CAPABILITY_NOTE = (
    "Tasks of the lm-evaluation-harness, with 1.96 of its standard errors on either side."
)
_ROUTING_NOTE = (
    "A gate is how much of an expert the router lets in, at the prompt's last token, as a mean "
    "over layers."
)


def answers_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The known columns with their types, then the columns that only judges gave."""
    others = [
        name for name in dict.fromkeys(k for row in rows for k in row) if name not in _COLUMNS
    ]
    columns: dict[str, pa.Array] = {}
    for name in [*_COLUMNS, *others]:
        values = [_whole(row.get(name)) for row in rows]
        columns[name] = pa.array(values, _COLUMNS.get(name), from_pandas=True)
    return pa.table(columns)


def _csv(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pacsv.write_csv(table, sink)
    return bytes(sink.getvalue())


def _whole(value: Any) -> Any:
    """Text without half characters (surrogates), which no file can hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _shown_first(answers: pd.DataFrame) -> list[str]:
    models = answers.drop_duplicates("model")
    order = [*models.loc[models["family"].isin(["base", "routed"]), "model"], *models["model"]]
    return list(dict.fromkeys(order))[:3]


# --- the page's parts -----------------------------------------------------------------------------


def _tradeoffs(results: Results) -> list[plots.Plot]:
    groups = results.points.groupby("set", sort=False)
    return [
        plots.tradeoff(f"tradeoff-{name}", rows, *results.axes, str(name)) for name, rows in groups
    ]


def _metric_tables(summary: pd.DataFrame) -> list[PageTable]:
    """One table per set, then one per category, folded."""
    groups = [
        (name, rows, False)
        for name, rows in summary[summary["category"].isna()].groupby("set", sort=False)
    ]
    parts = summary[summary["category"].notna()].groupby(["set", "category"], sort=True)
    groups += [(f"{of_set}: {category}", rows, True) for (of_set, category), rows in parts]
    better = {m.title: m.better for m in METRICS.values()}
    shares = [m.title for m in METRICS.values() if m.share]
    tables = []
    for title, rows, folded in groups:
        lines = []
        for model, of_model in rows.groupby("model", sort=False):
            cells = of_model.set_index("metric")[["value", "low", "high", "prompts"]]
            estimates = {
                METRICS[str(m)].title: Estimate(*cell)
                for m, cell in zip(cells.index, cells.to_numpy(), strict=True)
            }
            lines.append({"model": model, **estimates})
        nulls = rows[rows["nulls"] > 0]
        counted = [
            f"{m} of {METRICS[k].title}: {n}"
            for m, k, n in zip(nulls["model"], nulls["metric"], nulls["nulls"], strict=True)
        ]
        note = (
            f"Answers without a verdict, which are not counted: {'; '.join(counted)}."
            if counted
            else ""
        )
        tables.append(PageTable(pd.DataFrame(lines), str(title), note, better, shares, folded))
    return tables


def _comparison_parts(comparisons: pd.DataFrame) -> list[Any]:
    parts: list[Any] = []
    for reference, rows in comparisons.groupby("reference", sort=False):
        title = "win rates" if reference else "differences"
        parts.append(plots.forest(f"comparisons-{title}", rows, float(str(reference)), title))
    if parts:
        estimates = [
            Estimate(*line) for line in comparisons[["value", "low", "high", "n"]].to_numpy()
        ]
        frame = comparisons[["name", "over"]].assign(value=estimates, n=comparisons["n"])
        parts.append(PageTable(frame.rename(columns={"name": "comparison"})))
    return parts


def _capability_table(capability: pd.DataFrame | None) -> list[PageTable]:
    if capability is None or capability.empty:
        return []
    numbers = capability[["value", "low", "high", "n"]].astype(float).to_numpy()
    frame = capability[["model", "task", "metric"]].assign(
        value=[Estimate(*line) for line in numbers]
    )
    return [PageTable(frame.assign(examples=capability["n"], shots=capability["shots"]))]


def _gate_arrays(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(expert -> gates [P, L], kind of prompt -> which of the P)."""
    harmful = np.array([row["harmful"] for row in rows], dtype=object)
    kinds = {"harmful": harmful == True, "benign": harmful == False}  # noqa: E712  (of objects)
    return {expert: np.array([row[expert] for row in rows], float) for expert in EXPERTS}, kinds


def _separation(gates: dict[str, np.ndarray], kinds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean gates by kind of prompt, and how well they separate harmful prompts from benign ones."""
    means = {expert: values.mean(axis=1) for expert, values in gates.items()}
    safety, helpfulness = (means[expert] for expert in EXPERTS)
    line: dict[str, Any] = {"prompts": len(safety)}
    for expert, values in means.items():
        for kind, which in kinds.items():
            line[f"{expert}_{kind}"] = float(values[which].mean()) if which.any() else math.nan
    harmful, benign = ((safety - helpfulness)[which] for which in kinds.values())
    line["auroc"] = auroc(harmful, benign)
    line["auroc_safety"] = auroc(*(safety[which] for which in kinds.values()))
    line["tpr_at_5_fpr"] = tpr_at_fpr(harmful, benign, 0.05)
    return line


def _gate_table(separation: pd.DataFrame) -> list[PageTable]:
    names = {
        "auroc": "AUROC of their difference",
        "auroc_safety": "AUROC of the safety gate",
        "tpr_at_5_fpr": "TPR at 5% FPR",
    }
    frame = separation.rename(columns=names).rename(
        columns=lambda name: str(name).replace("_", " gate, ")
    )
    return [PageTable(frame, better=dict.fromkeys(names.values(), "high"))] if len(frame) else []


def _gate_plots(
    arrays: Mapping[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
) -> list[plots.Plot]:
    """Each expert's gates over prompts; their mean and the AUROC of their difference by layer."""
    shown = []
    for model, (gates, kinds) in arrays.items():
        present = {kind: which for kind, which in kinds.items() if which.any()}
        layers = np.arange(gates[EXPERTS[0]].shape[1])
        for expert, values in gates.items():
            groups = {kind: values[which].mean(axis=1) for kind, which in present.items()}
            shown.append(
                plots.histogram(
                    f"routing-{model}-{expert}", groups, "gate", f"{model}: {expert} gate"
                )
            )
            if len(layers) > 1:
                by_layer = {
                    kind: (layers, values[which].mean(axis=0)) for kind, which in present.items()
                }
                name, title = f"routing-{model}-{expert}-layers", f"{model}: {expert} gate by layer"
                shown.append(plots.lines(name, by_layer, "layer", "gate", title, integers=True))
        if len(layers) > 1 and len(present) == 2:
            safety, helpfulness = (gates[expert] for expert in EXPERTS)
            values = safety - helpfulness
            curve = [auroc(values[kinds["harmful"], l], values[kinds["benign"], l]) for l in layers]
            name, title = (
                f"routing-{model}-auroc-layers",
                f"{model}: harmful against benign by layer",
            )
            shown.append(
                plots.lines(
                    name, {"AUROC": (layers, curve)}, "layer", "AUROC", title, integers=True
                )
            )
    return shown


def _token_maps(examples: Sequence[Mapping[str, Any]]) -> list[TokenMap]:
    return [
        TokenMap(
            f"{e['model']}: {e['title']}",
            e["tokens"],
            {
                f"{expert} gate, mean over layers": np.mean(e[expert], axis=0).tolist()
                for expert in EXPERTS
            },
            e["prompt_tokens"],
            hidden=e["harmful"] is not False,
        )
        for e in examples
    ]


def _training_plots(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[plots.Plot]:
    by_metric: dict[str, dict[str, Any]] = {}
    for name, points in curves.items():
        group, _, metric = name.rpartition(": ")
        by_metric.setdefault(metric, {})[group] = np.array(points).T
    return [
        plots.lines(f"training-{m}", series, "step", m, m, integers=True)
        for m, series in by_metric.items()
    ]
