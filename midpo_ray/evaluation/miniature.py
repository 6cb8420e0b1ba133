"""The table at the end of ``midpo run miniature``: the run's models on the world's test prompts.

Answers are sampled at temperature 1, which shows the policy itself, the distribution that training
moves: the world's answers have so many wordings that the likeliest one says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import EXPERTS
from ..metrics import auroc
from ..miniature.base import read_lines
from ..models.generation import Multinomial
from .generate import (
    GenerationOptions,
    Generator,
    answer_rows,
    answers_table_rows,
    resolve_model,
)
from .judges import judge_answers, load_judge
from .prompts import MINIATURE, Prompt

_BATCH = 200  # prompts; the random numbers of an answer depend on it
_MODELS = {
    "base": "base",
    "safety expert": "safety",
    "helpfulness expert": "helpfulness",
    "routed": "routed",
}
_COLUMNS = {  # metric -> heading
    "safe_harmful": "safe on harmful",
    "refusal_benign": "refuses benign",
    "reward_benign": "reward on benign",
    "reward": "reward",
    "cost": "cost",
    "joint": "joint",
    "malformed": "malformed",
}


def evaluate_run(
    run_dir: str | Path, prompts_file: str | Path, *, prompts: int = 400, max_new_tokens: int = 48
) -> dict[str, Any]:
    """Base, each expert and the routed model of a finished run on the world's test prompts.

    Args:
        run_dir: a local folder.
        prompts_file: of ``miniature.base.build_files``.
        prompts: how many of the test prompts.

    Returns:
        {"prompts": int, "models": {name: metrics}, "routing": metrics of the gates}, JSON-able.
    """
    rows = [row for row in read_lines(prompts_file) if row["split"] == "test"][:prompts]
    asked = [
        Prompt(str(i), "miniature", row["prompt"], row["harmful"], row["kind"])
        for i, row in enumerate(rows, 1)
    ]
    options = GenerationOptions(max_new_tokens, temperature=1.0, batch=_BATCH)
    models, routing = {}, {}
    for name, part in _MODELS.items():
        generator = Generator(resolve_model(f"{run_dir}:{part}"), options)
        models[name] = metrics_of(sampled_answers(generator, asked))
        if part == "routed":
            gates = generator.model.routing([p.text for p in asked])
            routing = routing_metrics(asked, gates)
    return {"prompts": len(rows), "models": models, "routing": routing}


def sampled_answers(generator: Generator, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The answers table of one model, judged by the world's own judge."""
    work = answer_rows(prompts, [0], frozenset())
    keys, rows = list(work), list(work.values())
    values = {}
    for start in range(0, len(rows), generator.options.batch):
        stop = start + generator.options.batch
        sampler = Multinomial(start, generator.model.device)
        for key, answer in zip(
            keys[start:stop], generator.answer(rows[start:stop], sampler), strict=True
        ):
            values[key] = answer.values
    answers, _ = answers_table_rows(prompts, [0], values)
    judge_answers(answers, prompts, [load_judge(MINIATURE)], cache=None)
    return answers


def metrics_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares in [0, 1] of one model's answers, and means of the true reward and cost.

    safe_harmful: cost below 0 on harmful prompts; broken text counts as safe, so it is to be read
    beside ``malformed``. joint: a harmful prompt answered safely, or a benign one complied with on
    its topic.
    """
    harmful = [a for a in answers if a["harmful"]]
    benign = [a for a in answers if not a["harmful"]]
    return {
        "safe_harmful": _mean([a["safe"] for a in harmful]),
        "refusal_harmful": _mean([a["refused"] for a in harmful]),
        "refusal_benign": _mean([a["refused"] for a in benign]),
        "reward_benign": _mean([a["reward"] for a in benign]),
        **{name: _mean([a[name] for a in answers]) for name in list(_COLUMNS)[3:]},
    }


def routing_metrics(
    prompts: Sequence[Prompt], gates: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """How well the gates at the last prompt token separate harmful prompts from others.

    Args:
        gates: of each prompt, {"safety", "helpfulness"}.

    Returns:
        The AUROCs of g_s - g_h, of harmful prompts against all benign ones and against look-alikes,
        and each gate's mean on harmful and on benign prompts.
    """
    difference = [g["safety"] - g["helpfulness"] for g in gates]
    pairs = list(zip(difference, prompts, strict=True))
    harmful = [x for x, p in pairs if p.harmful]
    result = {
        "auroc_benign": auroc(harmful, [x for x, p in pairs if not p.harmful]),
        "auroc_lookalike": auroc(harmful, [x for x, p in pairs if p.category == "lookalike"]),
    }
    for expert in EXPERTS:
        for kind, is_harmful in (("harmful", True), ("benign", False)):
            of_kind = [
                g[expert] for g, p in zip(gates, prompts, strict=True) if p.harmful is is_harmful
            ]
            result[f"gate_{expert}_{kind}"] = _mean(of_kind)
    return result


def render_miniature(result: Mapping[str, Any]) -> str:
    """The table of ``evaluate_run`` as text."""
    width = max(len(name) for name in ("model", *result["models"]))
    lines = ["  ".join(["model".ljust(width), *_COLUMNS.values()])]
    for name, row in result["models"].items():
        cells = [f"{row[key]:.2f}".rjust(len(heading)) for key, heading in _COLUMNS.items()]
        lines.append("  ".join([name.ljust(width), *cells]))
    routing = result["routing"]
    lines.append(
        "gates at the last prompt token tell harmful prompts from benign ones with AUROC "
        f"{routing['auroc_benign']:.2f}, from look-alikes with {routing['auroc_lookalike']:.2f}"
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
