"""A sweep's file: what is varied, what is measured, how it is searched. Checked before Ray starts.

A point is {key: value}, with the keys of ``space``; ``experts.*.`` means every trained expert.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from pydantic import Field, model_validator

from ..config import EXPERTS, Config, Section, Stage, read_mapping, validated, with_overrides
from ..errors import UserError

Point = dict[str, Any]
MEASURED = ("accuracy", "loss", "reward_margin")  # of the held-out pairs
DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "randint", "choice")
_VARIED = re.compile(
    r"experts\.(\*|safety|helpfulness)\.(objective|optim)\.|lora\.|router\.(?!group)"
)
_BOUNDED = re.compile(r"(\S+?)\s*(>=|<=)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s+then\s+(\S+)")


class Key(Section):
    """One varied key: what it means, one of Ray Tune's distributions, and when it applies."""

    about: str
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = Field(None, description="low, high, step")
    randint: tuple[int, int] | None = Field(None, description="low, and high, which is excluded")
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    when: dict[str, tuple[Any, ...]] = Field(
        {}, description="applies only where earlier keys have one of these values"
    )

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
            raise ValueError(f"the range [{low}, {high}] is not finite: use choice or points")
        if low >= high:
            raise ValueError(f"the range [{low}, {high}] is empty")
        if name == "loguniform" and low <= 0:
            raise ValueError(f"a loguniform range begins above 0, this one at {low}")
        if step and not 0 < step[0] <= high - low:
            raise ValueError(f"the step {step[0]} is not in (0, {high - low}]")
        return self

    def ends(self) -> Sequence[Any]:
        """A recipe that takes these values takes all values of the key."""
        name, bounds = self.drawn
        return bounds if name == "choice" else (bounds[0], bounds[1] - (name == "randint"))

    def domain(self) -> Any:
        """The key as a distribution of Ray Tune."""
        from ray import tune  # only where a sweep runs

        name, bounds = self.drawn
        return tune.choice(list(bounds)) if name == "choice" else getattr(tune, name)(*bounds)


class Scheduler(Section):
    """What stops trials early: ``asha``, ``none``, or another scheduler of Ray Tune by its name."""

    name: str = "asha"
    grace: float = Field(0.25, gt=0, lt=1, description="ASHA: share of the steps that all train")
    reduction: int = Field(3, gt=1, description="ASHA: one trial of so many is continued")
    metric: str | None = Field(None, description="what is compared; default: the metrics' sum")
    measurements: int = Field(
        4, gt=0, description="other schedulers: measurements of a trial, at equal shares of it"
    )
    arguments: dict[str, Any] = Field({}, description="of Ray Tune's class")

    def shares(self) -> tuple[float, ...]:
        """The shares of its steps after which a trial is measured; the last is 1."""
        if self.name == "none":
            return (1.0,)
        if self.name != "asha":
            return tuple((i + 1) / self.measurements for i in range(self.measurements))
        powers = [round(self.grace * self.reduction**k, 6) for k in range(64)]
        return (*(share for share in powers if share < 1), 1.0)


class Space(Section):
    about: str = ""
    stages: tuple[Stage, ...] = Field(
        min_length=1, description="what a trial trains: one or both experts, or the router"
    )
    set: dict[str, Any] = Field({}, description="recipe keys that all trials share")
    space: dict[str, Key] = Field(min_length=1)
    points: tuple[Point, ...] = Field(
        (), description="tried first; the first one is what all others are compared with"
    )
    metrics: dict[str, Literal["max", "min"]] = Field(
        min_length=1, description="with two or more the report has a Pareto front"
    )
    search: str = Field(
        "random", description="random, grid, optuna, or another searcher of Ray Tune by its name"
    )
    search_arguments: dict[str, Any] = Field({}, description="of the searcher's class")
    samples: int | None = Field(
        None, gt=0, description="points, including the given ones; a grid's default is all"
    )
    seeds: int = Field(1, gt=0, description="trainings of every point that is not stopped")
    scheduler: Scheduler = Scheduler()
    concurrency: int | Literal["auto"] = Field(
        "auto", description="trials at a time; auto: as many as the cluster holds"
    )
    select: str = Field(
        "knee", description='knee, METRIC, or "METRIC>=X then METRIC"; a stage means its accuracy'
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
                raise ValueError(f"space.{name}.when: {late.pop()} is not an earlier key of space")
            if self.search == "grid" and key.choice is None:
                raise ValueError(f"space.{name}: a grid needs choice, this is {key.drawn[0]}")
        for point in self.points:
            if other := point.keys() - self.space.keys():
                raise ValueError(f"points: {other.pop()} is not a key of space ({', '.join(keys)})")
        if self.search != "grid" and self.samples is None:
            raise ValueError(f"samples is missing, which search: {self.search} needs")
        if isinstance(self.concurrency, int) and self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}, at least 1 is expected")
        if self.scheduler.metric is not None:
            self.metric(self.scheduler.metric)
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
            raise ValueError(f"select: {other.pop()} is not among {', '.join(self.metrics)}")
        return (full[0], match[2], match[3], full[1]) if match else (full[0],)

    def expand(self, key: str) -> list[str]:
        """The recipe's keys that a key of the space means."""
        if not key.startswith("experts.*."):
            return [key]
        tail = key.removeprefix("experts.*.")
        return [f"experts.{stage}.{tail}" for stage in self.stages if stage in EXPERTS]

    def active(self, values: Mapping[str, Any]) -> Point:
        """The keys of a point that apply in it."""
        point = Point()
        for name, key in self.space.items():
            applies = all(point.get(other) in allowed for other, allowed in key.when.items())
            if applies and name in values:
                point[name] = values[name]
        return point


def load_space(path: str, changes: dict[str, Any]) -> Space:
    """The space of a YAML file, with those ``changes`` of its keys that are not None.

    Raises:
        UserError: one line that names the key, what is wrong, and what would have been right.
    """
    raw = read_mapping(Path(path), f"space {path}")
    given = {key: value for key, value in changes.items() if value is not None}
    return validated(Space, {**raw, **given}, f"space {path}")


def fix(config: Config, space: Space, path: str) -> Config:
    """The recipe with the space's ``set``, after every key, range and point was tried on it.

    Raises:
        UserError: a key that the recipe lacks or that no trial trains, or a value it refuses.
    """
    fixed = at(config, space, space.set, f"space {path}: set")
    for name, key in space.space.items():
        for value in key.ends():
            at(fixed, space, {name: value}, f"space {path}: space.{name}")
        if not _VARIED.match(name):
            raise UserError(
                f"space {path}: space.{name}: the frozen signals or the placement depend on it; a "
                "sweep varies experts.*.objective, experts.*.optim, lora and router"
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


def known_points(space: Space, samples: int | None, seed: int) -> list[Point] | None:
    """The points of a grid or a random search, the given ones first; None for other searches."""
    points = [dict(point) for point in space.points]
    if space.search == "grid":
        for values in itertools.product(*(key.choice or () for key in space.space.values())):
            point = space.active(dict(zip(space.space, values, strict=True)))
            if point not in points:
                points.append(point)
        return points[:samples]
    if space.search != "random":
        return None
    points += [random_point(space, seed, n) for n in range(len(points), samples or 0)]
    return points[:samples]


def random_point(space: Space, seed: int, number: int) -> Point:
    """A function of seed and number alone: a longer sweep begins with a shorter one's points."""
    from numpy.random import RandomState

    generator, values = RandomState(crc32(f"{seed}/{number}".encode())), Point()
    for name, key in space.space.items():
        if all(values.get(other) in allowed for other, allowed in key.when.items()):
            value = key.domain().sample(random_state=generator)
            if key.choice is None:
                value = int(value) if key.randint else float(value)
            values[name] = value
    return values
