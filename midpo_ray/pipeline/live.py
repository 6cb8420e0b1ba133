"""Progress of the training stages: a table on a terminal, log messages elsewhere."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..storage import Storage

log = logging.getLogger(__name__)

SHOWN = (
    "loss",
    "accuracy",
    "reward_margin",
    "delta_chosen",
    "delta_rejected",
    "safety_gate",
    "helpfulness_gate",
)
EVERY = 15.0  # seconds between log messages
REDRAW = 2.0  # seconds between two readings of the metrics files for a terminal


class Live:
    """Follows ``metrics/<stage>.jsonl`` of the stages; ``update`` may be called often."""

    def __init__(self, run: Storage, stages: Sequence[str]) -> None:
        self.metrics, self.stages = run / "metrics", list(stages)
        self.logged: dict[str, int] = {}  # stage -> step
        self.next = time.monotonic() + EVERY
        self.screen: Any = None

    def __enter__(self) -> Live:
        if sys.stdout.isatty():
            from rich.live import Live as Screen

            self.screen = Screen(self._table(), refresh_per_second=2, transient=True)
            self.screen.start()
            self.next = 0.0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.screen is not None:
            self.screen.stop()
        else:
            self._lines()

    def update(self) -> None:
        if time.monotonic() < self.next:
            return
        if self.screen is not None:
            self.next = time.monotonic() + REDRAW
            self.screen.update(self._table())
        else:
            self.next = time.monotonic() + EVERY
            self._lines()

    def newest(self, stage: str) -> dict[str, Any]:
        """The stage's newest complete training line; empty before the first."""
        name = f"{stage}.jsonl"
        if not self.metrics.exists(name):
            return {}
        for line in reversed(self.metrics.read(name).splitlines()):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("split", "train") == "train":
                return row
        return {}

    def _lines(self) -> None:
        for stage in self.stages:
            row = self.newest(stage)
            if row and row["step"] != self.logged.get(stage):
                self.logged[stage] = row["step"]
                shown = ", ".join(
                    f"{k} {row[k]:.3f}" for k in SHOWN if isinstance(row.get(k), float)
                )
                log.info("%s: step %d, %s", stage, row["step"], shown)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title="training")
        table.add_column("")
        rows = {stage: self.newest(stage) for stage in self.stages}
        for stage in self.stages:
            table.add_column(stage, justify="right")
        table.add_row("step", *(str(r["step"]) if r else "starting" for r in rows.values()))
        for name in SHOWN:
            if any(name in r for r in rows.values()):
                table.add_row(
                    name.replace("_", " "),
                    *(f"{r[name]:.3f}" if name in r else "" for r in rows.values()),
                )
        return table
