"""What a command would do: the stages, what each depends on, and which are done already. No Ray, no model, no data is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import EXPERTS, Config, Objective, Scorer, digest
from ..errors import UserError
from ..user_code import source_file
from .manifest import Manifest

FOLDERS = {
    "score": "scored",
    "safety": "experts/safety",
    "helpfulness": "experts/helpfulness",
    "dual": "dual",
    "router": "router",
    "evaluation": "evaluation",
    "reward": "reward/reward",
    "cost": "reward/cost",
}
BUILTIN = "builtin:"


@dataclass(frozen=True)
class Step:
    """One stage of a plan: the named parts of its fingerprint, and why it must run (None: it is done)."""

    stage: str
    parts: dict[str, str]
    reason: str | None

    @property
    def digest(self) -> str:
        return digest(self.parts)


def plan(config: Config, manifest: Manifest, until: str | None = None) -> list[Step]:
    """The stages in order, up to ``until``."""
    parts = fingerprints(config)
    stages = [s for s in FOLDERS if s in parts]
    if until is not None:
        if until not in stages:
            raise UserError(f"--until {until}: no such stage; this recipe has {', '.join(stages)}")
        stages = stages[: stages.index(until) + 1]
    steps: list[Step] = []
    for s in stages:  # a router's parts name its experts by what they were made of: made again they may differ in a bit
        again = next(
            (t.stage for t in steps if t.reason and t.stage in EXPERTS and t.stage in parts[s]),
            None,
        )
        steps.append(
            Step(
                s, parts[s], manifest.why(s, parts[s]) or (f"{again} runs again" if again else None)
            )
        )
    return steps


def fingerprints(config: Config) -> dict[str, dict[str, str]]:
    """stage -> named parts. A stage repeats when one of its parts changes; placement, logging and checkpoints are no parts."""
    tokens = inputs(config)
    scorers = {s: scorer_id(getattr(config.scores, s)) for s in ("reward", "cost")}
    parts = {"score": {**tokens, **scorers}}
    seed = str(config.seed_of_training)
    training = {
        "lora": digest(config.lora),
        "deepspeed": digest(config.deepspeed),
        "seed of training": seed,
    }
    scored_rule = config.router.rule in ("pareto", "ranked")
    parts["dual"] = {**tokens, **(scorers if scored_rule else {}), "rule": config.router.rule}
    for expert in EXPERTS:
        objective: Objective = getattr(config.experts, expert).objective
        pairs = getattr(config.experts, expert).pairs
        own, other = ("cost", "reward") if expert == "safety" else ("reward", "cost")
        used = own if objective.uses_margin else other if objective.name == "modpo" else None
        parts[expert] = {
            **tokens,
            **training,
            **({used: scorers[used]} if used else {}),
            **(
                {}
                if pairs == "own"
                else {"pairs": digest(parts["dual"]) if pairs == "dual" else pairs}
            ),
            "objective": digest(objective),
            "optim": digest(config.optim(expert)),
        }
    parts["router"] = {
        **training,
        **{stage: digest(parts[stage]) for stage in (*EXPERTS, "dual")},
        "router": digest(config.router.model_dump(exclude={"group"})),
    }
    if config.evaluate:
        parts["evaluation"] = {
            "router": digest(parts["router"]),
            "evaluate": digest(config.evaluate),
        }
    return parts


def inputs(config: Config) -> dict[str, str]:
    """The parts that every stage hangs on: version, seed, data and model, by content."""
    return {
        "version": __version__,
        "seed": str(config.seed),
        "data": digest(
            [(content_id(s.path), s) for s in config.data.sets],
            config.data.model_dump(exclude={"sets"}),
        ),
        "model": digest(content_id(config.model.path), config.model),
    }


def content_id(path: str) -> str:
    """What stands for a file's, a model folder's or a hub name's content."""
    from ..models.base import model_fingerprint

    local = Path(path).expanduser()
    if path.startswith(BUILTIN):
        from ..miniature.base import VERSION

        return f"{path} version {VERSION}"
    if local.is_dir() and (local / "config.json").exists():
        return model_fingerprint(path)
    if local.is_dir():
        return digest(
            [
                (str(f.relative_to(local)), _sha256(f))
                for f in sorted(local.rglob("*"))
                if f.is_file()
            ]
        )
    if local.is_file():
        return _sha256(local)
    return path


def scorer_id(scorer: Scorer | None) -> str:
    if scorer is None:
        return "none"
    what: Any = scorer.column
    if scorer.model:
        what = content_id(scorer.model)
    elif scorer.function:
        what = _function_id(scorer.function)
    return digest(scorer, what)


def _function_id(function: str) -> str:
    """The source of the module that holds a scorer function, so that editing it scores anew."""
    file = source_file(function, f"scorer {function}")
    return _sha256(file) if file else function


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(steps: Sequence[Step]) -> str:
    """The plan as text, a line a stage."""
    return "\n".join(f"  {s.stage:12} {'run: ' + s.reason if s.reason else 'done'}" for s in steps)
