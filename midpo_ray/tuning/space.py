"""A sweep's file: what is varied, what is measured, how it is searched. Checked whole before Ray starts.

A point is {key: value}, with the keys of ``space`` (``experts.*.`` stands for every expert that the sweep trains).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from pydantic import Field, model_validator

from ..config import EXPERTS, Config, Section, Stage, read_mapping, validated, with_overrides
from ..errors import UserError

Point = dict[str, Any]
MEASURED = ("accuracy", "loss", "reward_margin")  # of the held-out pairs, at every rung
DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "randint", "choice")
_VARIED = re.compile(
    r"experts\.(\*|safety|helpfulness)\.(objective|optim)\.|lora\.|router\.(?!group)"
)
_BOUNDED = re.compile(r"(\S+?)\s*(>=|<=)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s+then\s+(\S+)")


class Key(Section):
    """One varied key: what it means, one of Ray Tune's distributions, and when it matters."""

    about: str
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None  # low, high, and what they are multiples of
    randint: tuple[int, int] | None = None  # the upper bound is left out, as Ray Tune does
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    when: dict[str, tuple[Any, ...]] = Field(
        {}
    )  # drawn only where earlier keys have one of these values

    @property
    def drawn(self) -> tuple[str, tuple[Any, ...]]:
        return next((n, getattr(self, n)) for n in DISTRIBUTIONS if getattr(self, n) is not None)

    @model_validator(mode="after")
    def _sound(self) -> Key:
        if sum(getattr(self, n) is not None for n in DISTRIBUTIONS) != 1:
            raise ValueError(f"exactly one distribution is expected: {', '.join(DISTRIBUTIONS)}")
        name, bounds = self.drawn
        if name == "choice":
            return self
        low, high, *step = bounds
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"the range [{low}, {high}] is not finite: give .inf by choice or points"
            )
        if low >= high:
            raise ValueError(
                f"the range [{low}, {high}] is {'empty' if low == high else 'reversed'}"
            )
        if name == "loguniform" and low <= 0:
            raise ValueError(f"a loguniform range begins above 0, this one at {low}")
        if step and not 0 < step[0] <= high - low:
            raise ValueError(f"the step {step[0]} is not in (0, {high - low}]")
        return self

    def ends(self) -> Sequence[Any]:
        """A recipe that takes these values takes them all."""
        name, bounds = self.drawn
        return bounds if name == "choice" else (bounds[0], bounds[1] - (name == "randint"))


class Scheduler(Section):
    """Successive halving in the order of the points; see ``rungs``."""

    name: Literal["asha", "none"] = "asha"
    grace: float = Field(0.25, gt=0, lt=1)  # share of a trial's steps before the first decision
    reduction: int = Field(
        3, gt=1
    )  # one in so many goes on; decisions at grace, grace * reduction, ...

    def rungs(self) -> tuple[float, ...]:
        shares = (
            [round(self.grace * self.reduction**k, 6) for k in range(64)]
            if self.name == "asha"
            else []
        )
        return (*(s for s in shares if s < 1), 1.0)


class Space(Section):
    about: str = ""
    stages: tuple[Stage, ...] = Field(
        min_length=1
    )  # what a trial trains: one or both experts, or the router
    set: dict[str, Any] = Field({})  # recipe keys that all trials share
    space: dict[str, Key] = Field(min_length=1)
    points: tuple[
        Point, ...
    ] = ()  # tried first; the very first is what all others are compared with
    metrics: dict[str, Literal["max", "min"]] = Field(min_length=1)  # two or more: a Pareto front
    search: Literal["random", "grid", "optuna"] = "random"
    samples: int | None = Field(None, gt=0)  # points, those given included; a grid's default is all
    seeds: int = Field(1, gt=0)  # trainings of every point that is not stopped
    scheduler: Scheduler = Scheduler()
    concurrency: int | Literal["auto"] = Field(
        "auto"
    )  # trials at a time; auto: what the cluster holds
    select: str = (
        "knee"  # knee, METRIC, or "METRIC>=X then METRIC"; a stage's name stands for its accuracy
    )

    @model_validator(mode="after")
    def _sound(self) -> Space:
        if "router" in self.stages and len(self.stages) > 1:
            raise ValueError("stages: the router is trained by itself, on the recipe's experts")
        for name in self.metrics:
            if (full := self.metric(name)) != name:
                raise ValueError(f"metrics: {name}: write {full}")
        keys = list(self.space)
        for place, (name, key) in enumerate(self.space.items()):
            if late := key.when.keys() - set(keys[:place]):
                raise ValueError(
                    f"space.{name}.when: {late.pop()} is not a key that stands before it"
                )
            if self.search == "grid" and key.choice is None:
                raise ValueError(f"space.{name}: a grid needs choice, this is {key.drawn[0]}")
        for point in self.points:
            if other := point.keys() - self.space.keys():
                raise ValueError(f"points: {other.pop()} is not a key of space ({', '.join(keys)})")
        if self.search != "grid" and self.samples is None:
            raise ValueError(f"samples is missing, which search: {self.search} needs")
        if isinstance(self.concurrency, int) and self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}, at least 1 is expected")
        if self.search == "optuna" and self.concurrency == "auto":
            raise ValueError(
                "concurrency: optuna needs a number, for its points must not depend on the cluster"
            )
        self.rule()
        return self

    def metric(self, name: str) -> str:
        """The full name of a metric, or of a stage's accuracy."""
        known = [f"{stage}.{m}" for stage in self.stages for m in MEASURED]
        full = f"{name}.accuracy" if name in self.stages else name
        if full not in known:
            near = get_close_matches(full, known, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"metric {name} is unknown{hint} (known: {', '.join(known)})")
        return full

    def rule(self) -> tuple[str, ...]:
        """``select`` in parts: ("knee",), (metric,) or (metric, ">=" or "<=", bound, metric)."""
        if self.select == "knee":
            return ("knee",)
        match = _BOUNDED.fullmatch(self.select.strip())
        names = (match[1], match[4]) if match else (self.select,)
        if match is None and not re.fullmatch(r"[\w.]+", self.select):
            raise ValueError(
                f"select {self.select!r}: knee, METRIC, or 'METRIC>=X then METRIC' is expected"
            )
        full = [self.metric(n) for n in names]
        if other := set(full) - self.metrics.keys():
            raise ValueError(
                f"select: {other.pop()} is not among the sweep's metrics ({', '.join(self.metrics)})"
            )
        return (full[0], match[2], match[3], full[1]) if match else (full[0],)

    def expand(self, key: str) -> list[str]:
        """The recipe's keys that one of the space's stands for."""
        head, tail = key[:10], key[10:]
        return (
            [f"experts.{s}.{tail}" for s in self.stages if s in EXPERTS]
            if head == "experts.*."
            else [key]
        )

    def draw(self, pick: Callable[[str, Key], Any]) -> Point:
        """A point of the keys that matter in it; ``pick`` gives a key's value."""
        point = Point()
        for name, key in self.space.items():
            if all(point.get(other) in values for other, values in key.when.items()):
                point[name] = pick(name, key)
        return point


def load_space(path: str, changes: dict[str, Any]) -> Space:
    """The space of a YAML file; ``changes`` that are not None replace its top-level keys (the command line's).

    Raises:
        UserError: one line that names the key, what is wrong, and what would have been right.
    """
    raw = read_mapping(Path(path), f"space {path}")
    given = {key: value for key, value in changes.items() if value is not None}
    return validated(Space, {**raw, **given}, f"space {path}")


def fix(config: Config, space: Space, path: str) -> Config:
    """The recipe with the space's ``set``, after every key, range and point was tried on it.

    Raises:
        UserError: a key that the recipe does not have, that no trial trains, or a value that it does not take.
    """
    fixed = at(config, space, space.set, f"space {path}: set")
    for name, key in space.space.items():
        for value in key.ends():
            at(fixed, space, {name: value}, f"space {path}: space.{name}")
        if not _VARIED.match(name):
            what = "experts.*.objective, experts.*.optim, lora and router"
            raise UserError(
                f"space {path}: space.{name}: frozen signals or placement hang on it; a sweep varies {what}"
            )
    for number, point in enumerate(space.points):
        at(fixed, space, point, f"space {path}: points.{number}")
    return fixed


def at(config: Config, space: Space, point: Point, where: str) -> Config:
    """The recipe at a point."""
    overrides = {}
    trained = ", ".join(space.stages)
    for name, value in point.items():
        keys = space.expand(name)
        if not keys:
            raise UserError(f"{where}: {name}: no expert is trained here, only {trained}")
        for key in keys:
            stage = key.removeprefix("experts.").partition(".")[0]
            if stage in (*EXPERTS, "router") and stage not in space.stages:
                raise UserError(f"{where}: {name}: {stage} is not trained here, only {trained}")
            overrides[key] = value
    return with_overrides(config, overrides, where)


def grid(space: Space) -> list[Point]:
    """All points of a grid, those given first."""
    points = [dict(p) for p in space.points]
    for values in itertools.product(*(key.choice or () for key in space.space.values())):
        full = dict(zip(space.space, values, strict=True))
        if (point := space.draw(lambda name, key, full=full: full[name])) not in points:  # type: ignore[misc]
            points.append(point)
    return points


def random(space: Space, seed: int, number: int) -> Point:
    """A point hangs on the seed and its own number alone, so that a longer sweep begins with a shorter one's points."""
    from numpy.random import RandomState
    from ray import tune

    generator = RandomState(crc32(f"{seed}/{number}".encode()))

    def pick(_: str, key: Key) -> Any:
        name, bounds = key.drawn
        if name == "choice":  # by place, for numpy would make all of one type
            return bounds[int(generator.randint(len(bounds)))]
        value = getattr(tune, name)(*bounds).sample(random_state=generator)
        return int(value) if name == "randint" else float(value)

    return space.draw(pick)


class Optuna:
    """Points by Optuna's TPE, multi-objective where the sweep is. ``ask`` and ``tell`` in a fixed order give fixed points."""

    def __init__(self, space: Space, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError(
                "search is optuna, but the package is not installed: pip install 'midpo_ray[tune]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.asked = space, dict[int, Any]()
        directions: list[Any] = [
            "maximize" if d == "max" else "minimize" for d in space.metrics.values()
        ]
        self.study = optuna.create_study(
            directions=directions, sampler=optuna.samplers.TPESampler(seed=seed)
        )

    def ask(self, number: int) -> Point:
        trial = self.asked[number] = self.study.ask()

        def pick(name: str, key: Key) -> Any:
            kind, bounds = key.drawn
            if kind == "choice":  # by place, for Optuna takes no lists
                return bounds[trial.suggest_categorical(name, list(range(len(bounds))))]
            if kind == "randint":
                return trial.suggest_int(name, bounds[0], bounds[1] - 1)
            step = bounds[2] if kind == "quniform" else None
            return trial.suggest_float(
                name, bounds[0], bounds[1], log=kind == "loguniform", step=step
            )

        return self.space.draw(pick)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """A point's metrics in their order, None where it failed; told once, and of points that were given never."""
        from optuna.trial import TrialState

        if number in self.asked:
            self.study.tell(
                self.asked.pop(number),
                values,
                state=TrialState.COMPLETE if values else TrialState.FAIL,
            )
