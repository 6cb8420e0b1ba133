"""From the table of frozen signals to what a stage trains on.

``scored/pairs.parquet`` holds the preference rows, ``scored/responses.parquet`` one row per
distinct (prompt, response) with its tokens and every frozen signal. A stage's table joins them:
chosen and rejected tokens, reference log-probabilities, and the constants that make
preference_loss this stage's objective (margin, weights, scale). No model runs here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..config import Config, Objective
from ..data.schema import Pair
from ..data.selection import Selected, is_validation, require, risk_of_prompts, select
from ..errors import UserError
from ..objectives import (
    balance_weights,
    gradient_scale,
    homogeneous_margin,
    modpo_margin,
    pointwise_mutual_information,
)
from ..storage import Storage

SIGNALS = ("reference_logp", "unconditional_logp", "reward", "cost")


@dataclass
class Scored:
    """The scored table in memory.

    Args:
        responses: one row per distinct (prompt, response): key (``response_key``), prompt_ids,
            response_ids, and ``SIGNALS`` (float64, null where a recipe has no such scorer).
    """

    pairs: list[Pair]
    responses: pa.Table

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.responses["key"].to_pylist())}

    @cached_property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """key -> reward and cost, as ``data.selection.select`` reads them."""
        values = self.responses.select(["reward", "cost"]).to_pylist()
        return dict(zip(self._row_of, values, strict=True))

    def rows(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> pa.Table:
        """The row of response ``number`` of each pair."""
        keys = [pair.keys[number] for pair, number in zip(pairs, numbers, strict=True)]
        return self.responses.take([self._row_of[key] for key in keys])

    def save(self, folder: Storage) -> None:
        pairs = {
            "prompt": [json.dumps(p.prompt) for p in self.pairs],
            "response_0": [p.responses[0] for p in self.pairs],
            "response_1": [p.responses[1] for p in self.pairs],
            "is_response_0_safe": pa.array([p.safe[0] for p in self.pairs], pa.bool_()),
            "is_response_1_safe": pa.array([p.safe[1] for p in self.pairs], pa.bool_()),
            "better_response_id": pa.array([p.better for p in self.pairs], pa.int8()),
            "safer_response_id": pa.array([p.safer for p in self.pairs], pa.int8()),
            "margin": pa.array([p.margin for p in self.pairs], pa.float64()),
            "source": [p.source for p in self.pairs],
        }
        write_table(folder, "pairs.parquet", pa.table(pairs))
        write_table(folder, "responses.parquet", self.responses)

    @classmethod
    def load(cls, folder: Storage) -> Scored:
        pairs = [
            Pair(
                prompt=tuple((role, content) for role, content in json.loads(r["prompt"])),
                responses=(r["response_0"], r["response_1"]),
                safe=(r["is_response_0_safe"], r["is_response_1_safe"]),
                better=r["better_response_id"],
                safer=r["safer_response_id"],
                margin=r["margin"],
                source=r["source"],
                extra={},
            )
            for r in read_table(folder, "pairs.parquet").to_pylist()
        ]
        return cls(pairs, read_table(folder, "responses.parquet"))


def write_table(folder: Storage, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    folder.write(name, sink.getvalue().to_pybytes())


def read_table(folder: Storage, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(folder.read(name)))


def pairs_of(config: Config, stage: str) -> str:
    """own, mixed or dual."""
    return "dual" if stage == "router" else getattr(config.experts, stage).pairs


def view_of(config: Config, stage: str) -> str:
    """The view of the data (``data.selection``) that a stage trains on."""
    return {"own": stage, "mixed": "mixed", "dual": config.router.rule}[pairs_of(config, stage)]


def stage_table(config: Config, stage: str, scored: Scored) -> tuple[pa.Table, dict[str, Any]]:
    """What ``stage`` trains on, one row per pair, and a summary to log.

    Raises:
        UserError: no row is left for the stage (with the counts by reason).
    """
    choices, dropped = select(scored.pairs, view_of(config, stage), scored.scores)
    require(choices, dropped, stage)
    pairs = [scored.pairs[index] for index, _ in choices]
    chosen = scored.rows(pairs, [number for _, number in choices])
    rejected = scored.rows(pairs, [1 - number for _, number in choices])
    objective = (
        Objective(name="dpo") if stage == "router" else getattr(config.experts, stage).objective
    )
    constants = _constants(objective, stage, scored, pairs, chosen, rejected)
    validation = [is_validation(p.prompt, config.data.validation, config.seed) for p in pairs]
    table = pa.table(
        {
            "id": [p.source for p in pairs],
            "prompt": chosen["prompt_ids"],
            "chosen": chosen["response_ids"],
            "rejected": rejected["response_ids"],
            "reference_chosen": chosen["reference_logp"],
            "reference_rejected": rejected["reference_logp"],
            **{name: values.numpy() for name, values in constants.items()},
            "validation": validation,
        }
    )
    summary = _summary(choices, dropped, validation, chosen, rejected, constants)
    if stage == "router":
        risk = _risk(scored, pairs)
        table = table.append_column("risk", pa.array(risk, pa.float64()))
        known = dict(zip((p.prompt for p in pairs), risk, strict=True))
        for value, name in ((1, "of risk 1"), (0, "of risk 0"), (-1, "of unknown risk")):
            summary[f"prompts {name}"] = sum(r == value for r in known.values())
    return table, summary


def _risk(scored: Scored, pairs: Sequence[Pair]) -> list[int]:
    """The risk of each pair's prompt from all pairs of the set; -1 where it is not known."""
    costs = {key: values["cost"] for key, values in scored.scores.items()}
    risk = risk_of_prompts(scored.pairs, costs)
    return [risk.get(pair.prompt, -1) for pair in pairs]


def _constants(
    objective: Objective,
    stage: str,
    scored: Scored,
    pairs: Sequence[Pair],
    chosen: pa.Table,
    rejected: pa.Table,
) -> dict[str, torch.Tensor]:
    """margin, weight_chosen, weight_rejected, scale of each pair, [B] float64."""
    ones = torch.ones(len(pairs), dtype=torch.float64)
    constants = {"margin": 0 * ones, "weight_chosen": ones, "weight_rejected": ones, "scale": ones}
    own, other = ("cost", "reward") if stage == "safety" else ("reward", "cost")
    if objective.uses_margin:
        constants["margin"] = objective.margin_scale * _margin(
            objective, own, scored, pairs, chosen, rejected
        )
    if objective.name == "modpo" and objective.modpo_weight < 1:
        sign = -1.0 if other == "cost" else 1.0
        factor, constants["margin"] = modpo_margin(
            sign * _column(chosen, other),
            sign * _column(rejected, other),
            weight=objective.modpo_weight,
        )
        constants["weight_chosen"] = constants["weight_rejected"] = factor * ones
    if objective.uses_information:
        per_token = objective.information == "token"
        weights = balance_weights(
            _information(chosen, per_token),
            _information(rejected, per_token),
            temperature=objective.temperature,
        )
        if objective.balance:
            constants["weight_chosen"], constants["weight_rejected"] = weights
        # gradient_norm keeps the gradient of weighted pairs steady: without weights it is 1.
        # imbalance reads the weights also where the loss does not.
        scaled_by = (
            weights if objective.balance or objective.scaling == "imbalance" else (ones, ones)
        )
        constants["scale"] = gradient_scale(*scaled_by, rule=objective.scaling)
    return constants


def _margin(
    objective: Objective,
    own: str,
    scored: Scored,
    pairs: Sequence[Pair],
    chosen: pa.Table,
    rejected: pa.Table,
) -> torch.Tensor:
    """The margin before λ, [B]: of the stage's own scorer, or of the data's margin column."""
    if objective.margin_from == "column":
        without = next((p.source for p in pairs if p.margin is None), None)
        if without:
            raise UserError(
                f"{without}: no margin, which objective.margin_from: column needs in every row"
            )
        margin = torch.tensor([p.margin for p in pairs], dtype=torch.float64).clamp_min(0.0)
        deviation = margin.std()
    else:
        margin = homogeneous_margin(
            _column(chosen, own), _column(rejected, own), lower_is_better=own == "cost"
        )
        deviation = _column(scored.responses, own).std()
    if objective.margin_unit == "raw":
        return margin
    if not deviation > 0:
        raise UserError(
            f"objective.margin_unit is std, but all values of {own} are the same; use raw"
        )
    return margin / deviation


def _lengths(rows: pa.Table) -> torch.Tensor:
    lengths = pc.list_value_length(rows["response_ids"]).to_numpy()
    return torch.tensor(lengths, dtype=torch.float64)


def _information(rows: pa.Table, per_token: bool) -> torch.Tensor:
    """Mutual information of each response and its prompt, in nats: in total or per token, [B]."""
    return pointwise_mutual_information(
        _column(rows, "reference_logp"),
        _column(rows, "unconditional_logp"),
        _lengths(rows) if per_token else None,
    )


def _column(rows: pa.Table, name: str) -> torch.Tensor:
    return torch.tensor(rows[name].to_numpy(), dtype=torch.float64)


def _summary(
    choices: Sequence[Selected],
    dropped: Counter[str],
    validation: Sequence[bool],
    chosen: pa.Table,
    rejected: pa.Table,
    constants: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Figures to read before training; B-DPO's weights depend on the mutual information."""
    both = pa.concat_tables([chosen, rejected])
    lengths = _lengths(both)
    information = _information(both, True)
    spread = bool(information.std() > 0 and lengths.std() > 0) if len(both) > 1 else False
    correlation = (
        float(torch.corrcoef(torch.stack([information, lengths]))[0, 1]) if spread else 0.0
    )
    return {
        "pairs": len(choices),
        "validation pairs": sum(validation),
        "dropped": dict(dropped),
        "information per token, chosen": round(float(_information(chosen, True).mean()), 4),
        "information per token, rejected": round(float(_information(rejected, True).mean()), 4),
        "information in total, chosen": round(float(_information(chosen, False).mean()), 4),
        "information in total, rejected": round(float(_information(rejected, False).mean()), 4),
        "correlation of information per token with length": round(correlation, 4),
        "mean margin": round(float(constants["margin"].mean()), 4),
        "share of pairs without margin": round(
            float((constants["margin"] == 0).double().mean()), 4
        ),
        "mean weight of chosen": round(float(constants["weight_chosen"].mean()), 4),
        "mean scale": round(float(constants["scale"].mean()), 4),
    }
