"""The run on the terminal: both experts side by side while they train; plain lines where there is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ..storage import Storage

SHOWN = (
    "loss",
    "accuracy",
    "reward_margin",
    "delta_chosen",
    "delta_rejected",
    "safety_gate",
    "helpfulness_gate",
)
EVERY = 15.0  # seconds between plain lines
REDRAW = 2.0  # seconds between looks at the metrics' files on a terminal


class Live:
    """Follows ``metrics/<stage>.jsonl`` of the stages; ``update`` is called often and does little."""

    def __init__(self, run: Storage, stages: Sequence[str], say: Callable[[str], None]) -> None:
        self.metrics, self.stages, self.say = run / "metrics", list(stages), say
        self.told: dict[str, int] = {}
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
        """The stage's newest training line; empty before the first. A line that is being written is passed over."""
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
            if row and row["step"] != self.told.get(stage):
                self.told[stage] = row["step"]
                shown = ", ".join(
                    f"{k} {row[k]:.3f}" for k in SHOWN if isinstance(row.get(k), float)
                )
                self.say(f"{stage}: step {row['step']}, {shown}")

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
