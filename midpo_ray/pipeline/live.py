"""Progress of the training stages: a table on a terminal, log messages elsewhere."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.live import Live as Screen
from rich.table import Table

from ..storage import Storage

log = logging.getLogger(__name__)

_SHOWN = (
    "loss",
    "accuracy",
    "reward_margin",
    "delta_chosen",
    "delta_rejected",
    "safety_gate",
    "helpfulness_gate",
)
_LOG = 15.0  # seconds between log messages
_REDRAW = 2.0  # seconds between two readings of the metrics files for a terminal


class Live:
    """Follows ``metrics/<stage>.jsonl`` of the stages; ``update`` may be called often."""

    def __init__(self, run: Storage, stages: Sequence[str]) -> None:
        self._metrics, self._stages = run / "metrics", list(stages)
        self._logged: dict[str, int] = {}  # stage -> step
        self._screen = Screen(refresh_per_second=2, transient=True) if sys.stdout.isatty() else None
        self._next = time.monotonic() + (_REDRAW if self._screen else _LOG)

    def __enter__(self) -> Live:
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen:
            self._screen.stop()
        else:
            self._log()

    def update(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (_REDRAW if self._screen else _LOG)
        if self._screen:
            self._screen.update(self._table())
        else:
            self._log()

    def _newest(self, stage: str) -> dict[str, Any]:
        """The stage's newest complete training line; empty before the first."""
        name = f"{stage}.jsonl"
        lines = self._metrics.read(name).splitlines() if self._metrics.exists(name) else []
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:  # it is being written
                continue
            if row.get("split", "train") == "train":
                return row
        return {}

    def _log(self) -> None:
        for stage in self._stages:
            row = self._newest(stage)
            if row and row["step"] != self._logged.get(stage):
                self._logged[stage] = row["step"]
                values = [f"{k} {row[k]:.3f}" for k in _SHOWN if isinstance(row.get(k), float)]
                log.info("%s: step %d, %s", stage, row["step"], ", ".join(values))

    def _table(self) -> Table:
        rows = [self._newest(stage) for stage in self._stages]
        table = Table("", *self._stages, title="training")
        table.add_row("step", *(str(row.get("step", "starting")) for row in rows))
        for name in _SHOWN:
            if any(name in row for row in rows):
                cells = [f"{row[name]:.3f}" if name in row else "" for row in rows]
                table.add_row(name.replace("_", " "), *cells)
        return table
