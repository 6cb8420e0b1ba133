"""A study: a recipe, its seeds, and its systems, which are overrides and what is served of them.

It is checked as a whole before Ray starts.
"""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import (
    EXPERTS,
    Config,
    Section,
    load_config,
    read_mapping,
    shipped_studies,
    validated,
    with_overrides,
)
from ..errors import UserError

STAGES = {
    "base": (),
    "safety": ("safety",),
    "helpfulness": ("helpfulness",),
    "added": EXPERTS,
    "routed": (*EXPERTS, "router"),
}
FAMILY = {
    "base": "base",
    "safety": "expert",
    "helpfulness": "expert",
    "added": "baseline",
    "routed": "routed",
}
_VARIED = re.compile(r"experts\.(\*|safety|helpfulness)\.|lora\.|router\.|deepspeed\.")


class Contender(Section):
    """A system of the study: what is trained, and which part of it answers."""

    name: str = Field(min_length=1)
    # added: both experts by constant gates, without a router
    serve: Literal["base", "safety", "helpfulness", "added", "routed"]
    gates: tuple[float, float] | None = None  # of safety and of helpfulness, for added
    family: Literal["base", "expert", "baseline", "routed"] = "base"  # default: by what is served
    set: dict[str, Any] = Field({})  # keys of the recipe; experts.*.KEY is of both experts

    @model_validator(mode="before")
    @classmethod
    def _default_family(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {"family": FAMILY.get(str(raw.get("serve")), "base"), **raw}

    @model_validator(mode="after")
    def _check(self) -> Contender:
        if (self.gates is None) == (self.serve == "added"):
            raise ValueError(
                f"{self.name}: gates: [safety, helpfulness] belong to serve: added, and only to it"
            )
        for key in self.set:
            if not _VARIED.match(key):
                raise ValueError(
                    f"{self.name}: set: {key}: the frozen signals or the seeds depend on it; a "
                    "system varies keys of experts, lora, router and deepspeed"
                )
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained for it, in order."""
        return STAGES[self.serve]

    def at(self, config: Config, where: str) -> Config:
        """The recipe with this system's overrides."""
        return with_overrides(config, self.set, f"{where}: {self.name}: set")


class Comparison(Section):
    """Two systems by one preference, on the same prompts; and at an equal KL from the base."""

    of: str
    against: str
    by: Literal["reward", "cost"]  # scores of the answers: the higher reward, the lower cost wins
    # ``against`` at other strengths: the win rate is interpolated at the KL of ``of``
    grid: tuple[str, ...] = ()


class Answers(Section):
    """How the systems answer."""

    max_new_tokens: int = Field(48, gt=0)
    # at 1 the mean log-ratio of the answers is the KL from the base
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    batch: int = Field(200, gt=0)  # prompts at once
    prompts: int | None = Field(None, gt=0)  # of each set; default: all


class Study(Section):
    """A study's file."""

    about: str = ""
    recipe: str
    set: dict[str, Any] = Field({})  # keys of the recipe that all systems share
    seeds: tuple[int, ...] = Field(min_length=1)
    vary: Literal["seed", "training_seed"] = "seed"  # training_seed: the data and its split stay
    main: str  # the system that the others are compared with
    # of prompts, as for `midpo evaluate`; none: those of each seed's builtin:miniature
    sets: tuple[str, ...] = ()
    # of builtin:miniature's held-out prompts; validation is for choosing settings
    split: Literal["test", "validation"] = "test"
    judges: tuple[str, ...] = ("builtin:miniature",)  # as for `midpo evaluate`
    answers: Answers = Answers()
    contenders: tuple[Contender, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    fronts: dict[str, tuple[str, ...]] = Field({})  # systems that are one method at several weights

    @model_validator(mode="after")
    def _check(self) -> Study:
        if bool(self.sets) == ("builtin:miniature" in self.judges):
            raise ValueError(
                "sets and judges: builtin:miniature judges its own prompts, without sets, only"
            )
        names = [c.name for c in self.contenders]
        for key, values in (("contenders", names), ("seeds", list(self.seeds))):
            repeated = [value for value in values if list(values).count(value) > 1]
            if repeated:
                raise ValueError(f"{key}: {repeated[0]!r} occurs twice")
        compared = [n for c in self.comparisons for n in (c.of, c.against, *c.grid)]
        compared += [n for front in self.fronts.values() for n in front]
        for name in (self.main, *compared):
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"contenders: none is named {name!r}{hint}")
        return self

    def contender(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)


def load_study(
    name_or_path: str, overrides: list[str] | None = None, seeds: list[int] | None = None
) -> tuple[Study, Config]:
    """A shipped study or a YAML file, and its recipe with ``set`` and then ``overrides``.

    A recipe's path is relative to the study's file.

    Args:
        seeds: instead of the study's own.

    Raises:
        UserError: one line that names the key, what is wrong, and what would have been right.
    """
    where, path = f"study {name_or_path}", Path(name_or_path)
    shipped = name_or_path in shipped_studies()
    if not shipped and path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name_or_path, shipped_studies(), 1)
        hint = f", did you mean {near[0]}?" if near else ""
        names = ", ".join(shipped_studies())
        raise UserError(
            f"{where} is not known{hint}; the studies are {names}; a file ends in .yaml"
        )
    source = resources.files("midpo_ray.studies") / f"{name_or_path}.yaml" if shipped else path
    raw = read_mapping(source, where)
    study = validated(Study, {**raw, "seeds": seeds} if seeds else raw, where)
    recipe = study.recipe
    if not shipped and recipe.endswith((".yaml", ".yml")):
        recipe = str(path.parent / recipe)
    shared = [f"{key}={json.dumps(value)}" for key, value in study.set.items()]
    return study, load_config(recipe, [*shared, *(overrides or [])])
