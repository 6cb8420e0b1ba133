"""Ray Tune's searchers and schedulers for a space, by their names."""

from __future__ import annotations

import inspect
import logging
import math
import pickle
from collections.abc import Sequence
from typing import Any

from ray import cloudpickle, tune
from ray.tune.schedulers import SCHEDULER_IMPORT, ASHAScheduler
from ray.tune.search import SEARCH_ALG_IMPORT, ConcurrencyLimiter, Searcher

from ..errors import UserError
from .space import Point, Space
from .trial import OBJECTIVE, PERCENT

log = logging.getLogger(__name__)


def make_scheduler(space: Space) -> Any:
    """The space's scheduler, which never stops the first given point.

    Raises:
        UserError: Tune has no such scheduler, or it does not take the arguments.
    """
    section = space.scheduler
    metric = space.metric(section.metric) if section.metric else OBJECTIVE
    falls = space.metrics.get(metric) == "min" or metric.endswith(".loss")
    options: dict[str, Any] = {
        "time_attr": PERCENT,
        "metric": metric,
        "mode": "min" if falls else "max",
        "max_t": 100,
    }
    kind: Any = ASHAScheduler
    if section.name == "none":
        return tune.schedulers.FIFOScheduler()
    if section.name == "asha":
        options |= {"grace_period": 100 * section.grace, "reduction_factor": section.reduction}
    else:
        kind = _lookup("scheduler", section.name, SCHEDULER_IMPORT)
        domains = {name: key.domain() for name, key in space.space.items() if not key.when}
        options |= {
            "hyperparam_mutations": {"trial": {"point": domains}},
            "perturbation_interval": 100 / section.measurements,
        }
    return _make("scheduler", _keeping_first(kind, space.points), options, section.arguments)


def _keeping_first(kind: Any, points: Sequence[Point]) -> Any:
    """The scheduler's class, with the one rule that the first given point is trained to its end."""

    class KeepingFirst(kind):  # type: ignore[misc]
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(controller, trial, result)
            is_first = bool(points) and trial.config["trial"]["point"] == points[0]
            if is_first and decision == self.STOP and result[PERCENT] < 100:
                return self.CONTINUE
            return decision

    KeepingFirst.__init__.__signature__ = inspect.signature(kind.__init__)  # type: ignore
    return KeepingFirst


def make_searcher(space: Space, seed: int) -> Any:
    """The space's searcher; None for a grid and a random search, whose points are known.

    Raises:
        UserError: Tune has no such searcher, its package is not installed, or bad arguments.
    """
    if space.search in ("grid", "random"):
        return None
    options: dict[str, Any] = {"metric": OBJECTIVE, "mode": "max", "seed": seed}
    if space.search == "optuna":  # which takes several
        options |= {"metric": list(space.metrics), "mode": list(space.metrics.values())}
    try:
        kind = _lookup("search", space.search, SEARCH_ALG_IMPORT)
        searcher = _make("search", kind, options, space.search_arguments)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"search is {space.search}, but its package is not installed ({error}): "
            "pip install 'midpo_ray[tune]' for optuna"
        ) from None
    searcher = GivenFirst(searcher, space.points)
    if isinstance(space.concurrency, int):
        searcher = ConcurrencyLimiter(searcher, max_concurrent=space.concurrency)
    return searcher


def _lookup(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(f"{what} {name} is unknown to Ray Tune, which has {', '.join(known)}")
    kind = known[name]
    return kind() if inspect.isfunction(kind) else kind


def _make(what: str, kind: Any, options: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """An instance; ``options`` that the class does not have are left out, ``arguments`` are not."""
    taken = inspect.signature(kind.__init__).parameters
    fitting = {name: value for name, value in options.items() if name in taken}
    unknown = set(arguments) - set(taken)
    if unknown:
        raise UserError(f"{what}: {kind.__name__} has no argument {unknown.pop()}")
    try:
        return kind(**{**fitting, **arguments})
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


class GivenFirst(Searcher):
    """A searcher after the given points, which may be outside of its ranges (infinite)."""

    def __init__(self, searcher: Searcher, points: Sequence[Point]) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        self.searcher, self.waiting, self.given = searcher, list(points), set[str]()

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return self.searcher.set_search_properties(metric, mode, config, **spec)

    def suggest(self, trial_id: str) -> Any:
        if not self.waiting:
            drawn = self.searcher.suggest(trial_id)
            if isinstance(drawn, dict):
                drawn["trial"]["seed"] = 0
            return drawn
        self.given.add(trial_id)
        return {"trial": {"point": self.waiting.pop(0), "seed": 0}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self.given:
            self.searcher.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        if trial_id not in self.given:
            self.searcher.on_trial_complete(trial_id, result, error)

    def get_state(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def set_state(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            cloudpickle.dump(self.get_state(), file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.set_state(pickle.load(file))


class Progress(tune.Callback):
    """One line per trial that has ended."""

    def __init__(self, metrics: Sequence[str], count: int) -> None:
        self.metrics, self.count, self.ended = metrics, count, set[str]()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._log(trial)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._log(trial)

    def _log(self, trial: Any) -> None:
        self.ended.add(trial.trial_id)
        values = trial.last_result or {}
        numbers = [f"{name} {values.get(name, math.nan):.4g}" for name in self.metrics]
        log.info(
            "sweep: %d of %d trials ended; at %g %% of its steps %s",
            len(self.ended), self.count, values.get(PERCENT, 0), ", ".join(numbers),
        )  # fmt: skip
