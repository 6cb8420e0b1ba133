"""What a command would do: the stages, what each depends on, and which are done already.

No Ray, model or data set is loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
# Versions of what is computed, and of the files that it is written to. A version is increased when
# the same inputs give another result, so that the stage, and what depends on it, is repeated.
VERSIONS = {
    "data": 1,  # reading and tokenising
    "score": 1,  # also of every cached signal
    "dual": 2,
    "expert": 1,
    "router": 1,
    "evaluation": 1,
    "score model": 1,
}


@dataclass(frozen=True)
class Step:
    """One stage of a plan: its fingerprint's named parts, and why it must run (None: done)."""

    stage: str
    parts: dict[str, str]
    reason: str | None

    @property
    def digest(self) -> str:
        return digest(self.parts)


def plan(config: Config, manifest: Manifest, until: str | None = None) -> list[Step]:
    """The stages in order, up to ``until``.

    Raises:
        UserError: the recipe has no stage ``until``.
    """
    parts = fingerprints(config)
    stages = [s for s in FOLDERS if s in parts]
    if until is not None:
        if until not in stages:
            raise UserError(f"--until {until}: no such stage; this recipe has {', '.join(stages)}")
        stages = stages[: stages.index(until) + 1]
    steps: list[Step] = []
    for stage in stages:
        reason = manifest.why(stage, parts[stage])
        for earlier in steps:
            # An expert that is trained again may differ in a bit from what the router was made for.
            if reason is None and earlier.reason and stage == "router" and earlier.stage in EXPERTS:
                reason = f"{earlier.stage} runs again"
        steps.append(Step(stage, parts[stage], reason))
    return steps


def fingerprints(config: Config) -> dict[str, dict[str, str]]:
    """stage -> named parts; a stage is repeated when one of its parts changes.

    Placement, logging and checkpoints are no parts: they change no result.
    """
    tokens = inputs(config)
    scorers = {s: scorer_id(getattr(config.scores, s)) for s in ("reward", "cost")}
    parts = {"score": {**tokens, **scorers, "version": _version("score")}}
    training = {
        "lora": digest(config.lora),
        "deepspeed": digest(config.deepspeed),
        "seed of training": str(config.seed_of_training),
    }
    parts["dual"] = {**tokens, "rule": config.router.rule, "version": _version("dual")}
    if config.router.rule in ("pareto", "ranked") or config.router.prior.kind == "risk":
        parts["dual"] |= scorers
    for expert in EXPERTS:
        section = getattr(config.experts, expert)
        objective: Objective = section.objective
        parts[expert] = {
            **tokens,
            **training,
            "objective": digest(objective),
            "optim": digest(config.optim(expert)),
            "version": _version("expert"),
        }
        own, other = ("cost", "reward") if expert == "safety" else ("reward", "cost")
        if objective.uses_margin:
            parts[expert][own] = scorers[own]
        elif objective.name == "modpo":
            parts[expert][other] = scorers[other]
        if section.pairs == "dual":
            parts[expert]["pairs"] = digest(parts["dual"])
        elif section.pairs != "own":
            parts[expert]["pairs"] = section.pairs
    parts["router"] = {
        **training,
        **{stage: digest(parts[stage]) for stage in (*EXPERTS, "dual")},
        "router": digest(config.router.model_dump(exclude={"group"})),
        "version": _version("router"),
    }
    if config.evaluate:
        parts["evaluation"] = {
            "router": digest(parts["router"]),
            "evaluate": digest(config.evaluate),
            "version": _version("evaluation"),
        }
    return parts


def _version(stage: str) -> str:
    """A stage's own version, and that of the signals that it reads."""
    return f"{VERSIONS[stage]}, scores {VERSIONS['score']}"


def inputs(config: Config) -> dict[str, str]:
    """The parts that every stage depends on: seed, data and model, by content."""
    sets = [(content_id(s.path, s.revision, "dataset"), s) for s in config.data.sets]
    model = content_id(config.model.path, config.model.revision)
    return {
        "seed": str(config.seed),
        "data": digest(VERSIONS["data"], sets, config.data.model_dump(exclude={"sets"})),
        "model": digest(model, config.model),
    }


def content_id(path: str, revision: str | None = None, kind: str = "model") -> str:
    """Identifies the content of a file, a folder, a model folder or a hub repository.

    A hub repository is identified by its commit where that is known (online, or from the hub's
    cache), else by its name and revision.

    Args:
        kind: of a hub repository: model or dataset.
    """
    local = Path(path).expanduser()
    if path.startswith(BUILTIN):
        from ..miniature.base import VERSION  # torch is slow to import

        return f"{path} version {VERSION}"
    if local.is_dir() and (local / "config.json").exists():
        from ..models.base import model_fingerprint  # transformers is slow to import

        return model_fingerprint(path)
    if local.is_dir():
        files = sorted(f for f in local.rglob("*") if f.is_file())
        return digest([(str(f.relative_to(local)), _sha256(f)) for f in files])
    if local.is_file():
        return _sha256(local)
    return f"{path}@{_hub_commit(path, revision, kind) or revision or 'main'}"


@cache
def _hub_commit(name: str, revision: str | None, kind: str) -> str | None:
    """The commit of a hub repository's revision, None where it is not known."""
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):  # the path of a file that is not there yet
        return None
    from huggingface_hub import HfApi, constants  # not needed for local files
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
        return str(info.sha)
    except Exception:  # offline, no network, no access: of several libraries' classes
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
        reference = folder / "refs" / (revision or "main")
        return reference.read_text().strip() if reference.is_file() else None


def scorer_id(scorer: Scorer | None) -> str:
    """Identifies what a scorer computes: its settings and the content of its model or module."""
    if scorer is None:
        return "none"
    what: str | None = scorer.column
    if scorer.model:
        what = content_id(scorer.model, scorer.revision)
    elif scorer.function:
        what = _function_id(scorer.function)
    return digest(scorer, what)


def _function_id(function: str) -> str:
    """The source of the module of a scorer function: a change of it scores anew."""
    file = source_file(function, f"scorer {function}")
    return _sha256(file) if file else function


def _sha256(path: Path) -> str:
    status = path.stat()
    if status.st_size < 1 << 20:  # a small file may change within one tick of the clock
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash_of(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    """Size and time of change are arguments so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_plan(steps: Sequence[Step]) -> str:
    """The plan as text, one line per stage."""
    return "\n".join(f"  {s.stage:12} {'run: ' + s.reason if s.reason else 'done'}" for s in steps)
