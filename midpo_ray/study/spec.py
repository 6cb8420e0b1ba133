"""A study: a recipe, its seeds, and the contenders, each a few overrides and what is served. Checked whole before Ray starts."""

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
    """One point of the picture: what is trained, and what of it answers."""

    name: str = Field(min_length=1)
    serve: Literal[
        "base", "safety", "helpfulness", "added", "routed"
    ]  # added: both experts by constant gates, without a router
    gates: tuple[float, float] | None = None  # of safety and of helpfulness, for added
    family: Literal["base", "expert", "baseline", "routed"] = Field(
        "base"
    )  # default: by what is served
    set: dict[str, Any] = Field({})  # keys of the recipe; experts.*.KEY is of both experts

    @model_validator(mode="before")
    @classmethod
    def _family(cls, raw: Any) -> Any:
        return (
            {"family": FAMILY.get(str(raw.get("serve")), "base"), **raw}
            if isinstance(raw, dict)
            else raw
        )

    @model_validator(mode="after")
    def _sound(self) -> Contender:
        if (self.gates is None) == (self.serve == "added"):
            raise ValueError(
                f"{self.name}: gates: [safety, helpfulness] go with serve: added, and with nothing else"
            )
        for key in self.set:
            if not _VARIED.match(key):
                what = "experts, lora, router and deepspeed"
                raise ValueError(
                    f"{self.name}: set: {key}: frozen signals or the seeds hang on it; contenders vary {what}"
                )
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained for it, in order."""
        return STAGES[self.serve]

    def at(self, config: Config, where: str) -> Config:
        """The recipe with this contender's overrides."""
        return with_overrides(config, self.set, f"{where}: {self.name}: set")


class Comparison(Section):
    """Two contenders on one preference, prompt by prompt; and at the same distance from the base."""

    of: str
    against: str
    by: Literal[
        "reward", "cost"
    ]  # true scores of the answers: the higher reward, the lower cost wins
    grid: tuple[
        str, ...
    ] = ()  # ``against`` at other strengths: the win rate is interpolated in KL to that of ``of``


class Answers(Section):
    """How contenders answer."""

    max_new_tokens: int = Field(48, gt=0)
    temperature: float = Field(
        1.0, ge=0
    )  # at 1 the mean log-ratio of the answers is the KL from the base
    top_p: float = Field(1.0, gt=0, le=1)
    batch: int = Field(200, gt=0)  # prompts at once
    prompts: int | None = Field(None, gt=0)  # of each set; default: all


class Study(Section):
    about: str = ""
    recipe: str
    set: dict[str, Any] = Field({})  # keys of the recipe that all contenders share
    seeds: tuple[int, ...] = Field(min_length=1)
    vary: Literal["seed", "training_seed"] = "seed"  # training_seed: the data and its split stay
    main: str  # the contender whose place on the front is asked
    sets: tuple[
        str, ...
    ] = ()  # of prompts, as for `midpo evaluate`; none: those of each seed's builtin:miniature
    split: Literal["test", "validation"] = (
        "test"  # of that world's held-out prompts; validation is for choosing settings
    )
    judges: tuple[str, ...] = ("builtin:miniature",)  # as for `midpo evaluate`
    answers: Answers = Answers()
    contenders: tuple[Contender, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    fronts: dict[str, tuple[str, ...]] = Field(
        {}
    )  # contenders that are one method at several weights, for example MODPO's

    @model_validator(mode="after")
    def _sound(self) -> Study:
        if bool(self.sets) == ("builtin:miniature" in self.judges):
            raise ValueError(
                "sets and judges: the prompts of builtin:miniature (no sets) go with its judge, all others with their own"
            )
        names = [c.name for c in self.contenders]
        for what, values in (("contender", names), ("seed", self.seeds)):
            if (twice := next((v for v in values if list(values).count(v) > 1), None)) is not None:
                raise ValueError(f"the {what} {twice!r} is there twice")
        compared = [n for c in self.comparisons for n in (c.of, c.against, *c.grid)]
        for name in (self.main, *compared, *(n for front in self.fronts.values() for n in front)):
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise ValueError(
                    f"no contender is named {name!r}{f', did you mean {near[0]!r}?' if near else ''}"
                )
        return self

    def contender(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)


def load_study(
    name_or_path: str, overrides: list[str] | None = None, seeds: list[int] | None = None
) -> tuple[Study, Config]:
    """A shipped study or a YAML file, and its recipe with ``set`` and then ``overrides``; ``seeds`` instead of its own.

    A recipe's path is relative to the study's file.

    Raises:
        UserError: one line that names the key, what is wrong, and what would have been right.
    """
    where, path = f"study {name_or_path}", Path(name_or_path)
    shipped = name_or_path in shipped_studies()
    if not shipped and path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name_or_path, shipped_studies(), 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{where} is not known{hint}; shipped are {', '.join(shipped_studies())}; a file ends in .yaml"
        )
    raw = read_mapping(
        resources.files("midpo_ray.studies") / f"{name_or_path}.yaml" if shipped else path, where
    )
    study = validated(Study, {**raw, "seeds": seeds} if seeds else raw, where)
    beside = path.parent / study.recipe
    recipe = (
        str(beside) if not shipped and study.recipe.endswith((".yaml", ".yml")) else study.recipe
    )
    fixed = [f"{key}={json.dumps(value)}" for key, value in study.set.items()]
    return study, load_config(recipe, [*fixed, *(overrides or [])])
