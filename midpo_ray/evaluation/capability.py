"""General capability: tasks of EleutherAI's lm-evaluation-harness, on the same models that answer prompts.

What a model says to a request is cached by the contents of both; metrics are computed anew from that, by the harness.
"""

from __future__ import annotations

import difflib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..config import digest
from ..errors import UserError
from ..storage import Storage
from .cached import Job, Row, compute
from .generate import Contender, Options
from .respond import Responder

VERSION = 1  # raise it when what a model says to a request changes
SHARD = 128  # requests that are written together
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def check_installed() -> None:
    """Raises UserError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: EleutherAI's lm-evaluation-harness is not installed here: pip install 'lm-eval>=0.4.12'"
        )


def load_tasks(specs: Sequence[str]) -> Any:
    """The harness' TaskDict of names (tasks, groups, tags) and of paths (a YAML file, a folder of them); data sets are loaded.

    Raises:
        UserError: no such task or file, or one that cannot be loaded, or that asks for more than text.
    """
    from lm_eval.tasks import TaskManager

    paths = {
        spec: Path(spec).expanduser()
        for spec in specs
        if "/" in spec or spec.endswith((".yaml", ".yml"))
    }
    folders = {spec: str(path) for spec, path in paths.items() if path.is_dir()}
    manager = TaskManager(
        include_path=list(folders.values()), include_defaults=len(paths) < len(specs)
    )
    wanted: list[str] = []
    for spec in specs:
        if spec in folders:
            own = TaskManager(include_path=folders[spec], include_defaults=False).all_subtasks
            if not own:
                raise UserError(f"--tasks {spec}: no YAML file of a task is in this folder")
            wanted += own
        elif spec in paths and not paths[spec].is_file():
            raise UserError(f"--tasks {spec}: no such file or folder")
        elif spec not in paths and spec not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(spec, manager.all_tasks))
            raise UserError(
                f"--tasks {spec}: the harness has no such task"
                + (f"; near to it: {near}" if near else "")
            )
        else:
            wanted.append(spec)
    try:
        loaded = manager.load(list(dict.fromkeys(wanted)))
    except Exception as error:  # whatever a file or a data set can be short of
        raise UserError(
            f"--tasks {','.join(specs)}: not loaded ({type(error).__name__}: {error})"
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"--tasks: {name} runs code of the model's or shows it more than text, which is not done here"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def measure(
    tasks: Any,
    contenders: Sequence[Contender],
    options: Options,
    cache: Storage,
    limit: int | None,
    say: Callable[[str], None],
) -> list[Row]:
    """model, task, metric, value, low, high, stderr, n, shots; low and high are value ± 1.96 stderr, the harness' own.

    Everything runs here. ``limit``: the first so many examples of each task.
    """
    from lm_eval.evaluator import evaluate

    rows: list[Row] = []
    for c in contenders:
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(
                seed=1234
            )  # this seed and the next are those of the harness' command
        random.seed(0)
        np.random.seed(1234)
        found: Any = evaluate(_model(c, options, cache, say), tasks, limit=limit, log_samples=False)
        for name, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, comma, kind = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = metrics.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, int | float) else None
                low, high = (
                    (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
                )
                row = {
                    "model": c.name,
                    "task": name,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                }
                row |= {"value": float(value), "low": low, "high": high, "stderr": error}
                rows.append(
                    {**row, "n": metrics.get("sample_len"), "shots": found["n-shot"].get(name)}
                )
    return rows


def _model(
    contender: Contender, options: Options, cache: Storage, say: Callable[[str], None]
) -> Any:
    """The harness' LM, whose every kind of request is answered by ``Asked``."""
    from lm_eval.api.model import LM

    asked = Asked(contender, options, cache, say)
    return type(
        "Model", (LM,), {k: lambda self, requests, k=k: asked(k, requests) for k in KINDS}
    )()


class Asked:
    """(kind, requests with ``args``) -> what the model says to each; it is loaded only where something is not cached."""

    def __init__(
        self, contender: Contender, options: Options, folder: Storage, say: Callable[[str], None]
    ) -> None:
        self.folder, self.say = folder / f"capability-{digest(VERSION, contender.fingerprint)}", say
        self.name, self.load = (
            contender.name,
            cache(lambda: Responder(asdict(contender), asdict(options))),
        )

    def __call__(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        rows = [{"key": digest(kind, r.args), "kind": kind, "args": r.args} for r in requests]
        job = Job(f"{kind} of {self.name}", self.load, {}, SHARD, heavy=False)
        said = compute(job, rows, self.folder, address=None, workers=0, say=self.say)
        return [said[row["key"]] for row in rows]
