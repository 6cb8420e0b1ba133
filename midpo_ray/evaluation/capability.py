"""General capability: tasks of EleutherAI's lm-evaluation-harness on the evaluated models.

A model's responses to requests are cached by the contents of both; the harness computes metrics
from them anew.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import digest
from ..errors import UserError
from ..pipeline.cached_map import IN_PROCESS, CacheRow, MapJob, Values, cached_map
from ..storage import Storage
from .generate import GenerationOptions, Generator, ModelSpec

VERSION = 2  # raise it when a model's response to a request changes
SHARD = 128  # requests that are cached together


def check_installed() -> None:
    """Raises UserError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: EleutherAI's lm-evaluation-harness is not installed: "
            "pip install 'lm-eval>=0.4.12'"
        )


def load_tasks(specs: Sequence[str]) -> Any:
    """The harness' TaskDict of names (tasks, groups, tags) and paths (a YAML file, a folder).

    Raises:
        UserError: a task or file that does not exist, cannot be loaded, or needs more than text.
    """
    from lm_eval.tasks import TaskManager  # an extra

    paths = {s: Path(s).expanduser() for s in specs if "/" in s or s.endswith((".yaml", ".yml"))}
    folders = {spec: str(path) for spec, path in paths.items() if path.is_dir()}
    manager = TaskManager(
        include_path=list(folders.values()), include_defaults=len(paths) < len(specs)
    )
    wanted: list[str] = []
    for spec in specs:
        if spec in folders:
            own = TaskManager(include_path=folders[spec], include_defaults=False).all_subtasks
            if not own:
                raise UserError(f"--tasks {spec}: the folder holds no YAML file of a task")
            wanted += own
        elif spec in paths and not paths[spec].is_file():
            raise UserError(f"--tasks {spec}: no such file or folder")
        elif spec not in paths and spec not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(spec, manager.all_tasks))
            hint = f"; near to it: {near}" if near else ""
            raise UserError(f"--tasks {spec}: the harness has no such task{hint}")
        else:
            wanted.append(spec)
    try:
        loaded = manager.load(list(dict.fromkeys(wanted)))
    except Exception as error:  # a task's file and data set can fail in any way
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"--tasks {','.join(specs)}: not loaded ({cause})") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"--tasks: {name} runs code of the model or needs more than text, which is not "
                "supported"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def measure(
    tasks: Any,
    models: Sequence[ModelSpec],
    options: GenerationOptions,
    cache: Storage,
    limit: int | None,
) -> list[dict[str, Any]]:
    """Rows of model, task, metric, value, low, high, stderr, n, shots, computed in this process.

    ``low`` and ``high`` are value ± 1.96 of the harness' own standard errors.

    Args:
        limit: the first so many examples of each task.
    """
    from lm_eval.evaluator import evaluate  # an extra

    rows: list[dict[str, Any]] = []
    for spec in models:
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=1234)  # these seeds are the harness' own
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        model = _harness_model(CachedResponder(spec, options, cache))
        found: Any = evaluate(model, tasks, limit=limit, log_samples=False)
        for name, metrics in found["results"].items():
            shots = found["n-shot"].get(name)
            rows += _metric_rows(metrics, {"model": spec.name, "task": name}, shots)
    return rows


def _metric_rows(metrics: dict[str, Any], names: dict[str, Any], shots: Any) -> list[Any]:
    rows = []
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kind}")
        row = {**names, "metric": metric if kind == "none" else f"{metric} ({kind})"}
        row |= {"value": float(value), "low": None, "high": None, "stderr": None}
        if isinstance(error, int | float):
            half = 1.96 * float(error)
            row |= {"low": value - half, "high": value + half, "stderr": float(error)}
        rows.append({**row, "n": metrics.get("sample_len"), "shots": shots})
    return rows


class CachedResponder:
    """Requests -> the model's responses; the model is loaded when one of them is not cached."""

    def __init__(self, spec: ModelSpec, options: GenerationOptions, cache: Storage) -> None:
        self._spec, self._options = spec, options
        self._folder = cache / f"capability-{digest(VERSION, spec.fingerprint)}"
        self.model: Any = None

    def __call__(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """The responses of one kind of request to their ``args``."""
        rows = []
        for request in requests:
            args = json.dumps(request.args)
            rows.append({"key": digest(kind, request.args), "kind": kind, "args": args})
        job = MapJob(f"{kind} of {self._spec.name}", lambda: self._respond, {}, SHARD)
        folders = {"response": self._folder}
        found = cached_map(job, rows, folders, IN_PROCESS)["response"]
        return [json.loads(found[row["key"]]["response"]) for row in rows]

    def _respond(self, rows: Sequence[CacheRow]) -> list[dict[str, Values]]:
        from lm_eval.api.instance import Instance  # an extra

        from .respond import HarnessModel

        if self.model is None:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            options = replace(self._options, max_new_tokens=1)
            self.model = HarnessModel(Generator(self._spec, options))
        kind = rows[0]["kind"]
        instances = [
            Instance(kind, {}, tuple(json.loads(row["args"])), i) for i, row in enumerate(rows)
        ]
        try:
            responses = getattr(self.model, kind)(instances, disable_tqdm=True)
        except AssertionError as error:  # how the harness refuses settings
            raise UserError(f"--tasks: {kind} of {self._spec.name}: {error}") from None
        return [{"response": {"response": json.dumps(response)}} for response in responses]


def _harness_model(responder: CachedResponder) -> Any:
    """The harness' LM, which answers each of its three kinds of request."""
    from lm_eval.api.model import LM  # an extra

    class CachedModel(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return responder("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return responder("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any) -> Any:
            return responder("generate_until", requests)

    return CachedModel()
