"""Metrics between two logs: sums on the device, read once; and which rows a non-finite number came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .engine import Group
from .steps import PER_TOKEN

Sums = dict[str, float]


class Window:
    """A rank's sums since the last log, in float64: a resumed run adds the same numbers in the same order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._sums: dict[str, Tensor] = {}
        self._seen: list[
            tuple[int, list[int], Tensor]
        ] = []  # (step, rows, loss or norm) since the last read

    def add(
        self,
        step: int,
        rows: Sequence[int],
        values: Mapping[str, Tensor | float],
        watch: Tensor | float,
    ) -> None:
        """Adds to the sums; ``watch`` (a loss, a norm) must be finite, or ``rows`` of ``step`` are named at the next ``read``."""
        for name, value in values.items():
            value = torch.as_tensor(value, device=self.group.device).double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._seen.append(
            (step, list(rows), torch.as_tensor(watch, device=self.group.device).detach().double())
        )

    def read(self, name_rows: Callable[[list[int]], list[str]]) -> list[Sums]:
        """Every rank's sums, on all ranks, which all call it; the one place that waits for the device.

        Raises:
            UserError: on all ranks, where a loss or a gradient since the last read is not finite; it names the rows.
        """
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        watched = (
            torch.stack([watch for _, _, watch in self._seen]).isfinite().tolist()
            if self._seen
            else []
        )
        bad = next(
            (
                (s, name_rows(rows))
                for (s, rows, _), fine in zip(self._seen, watched, strict=True)
                if not fine
            ),
            None,
        )
        self._seen.clear()
        found = self.group.gather((dict(zip(self._sums, values, strict=True)), bad))
        faults = [fault for _, fault in found if fault]
        if faults:
            step = min(s for s, _ in faults)
            rows = list(dict.fromkeys(row for s, names in faults if s == step for row in names))
            raise UserError(
                f"step {step}: the loss or its gradient is not finite, rows {', '.join(rows[:8])}"
                f"{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}: look at these rows, or lower the learning rate"
            )
        return [sums for sums, _ in found]

    def reset(self) -> None:
        self._sums.clear()

    def restore(self, ranks: Sequence[Sums]) -> None:
        """Goes on from what ``read`` gave: a rank from its own, or rank 0 from all where the world has another size."""
        if len(ranks) == self.group.world:
            mine = ranks[self.group.rank]
        else:
            mine = total(ranks) if self.group.rank == 0 else dict.fromkeys(total(ranks), 0.0)
        self._sums = {
            k: torch.tensor(v, dtype=torch.float64, device=self.group.device)
            for k, v in mine.items()
        }


def total(ranks: Sequence[Sums]) -> Sums:
    return (
        {name: math.fsum(sums.get(name, 0.0) for sums in ranks) for name in ranks[0]}
        if ranks
        else {}
    )


def means(sums: Sums) -> dict[str, float]:
    """What is logged, from sums over ranks: a mean a pair, a token or a step; counts as they are; padding as a share."""
    pairs, tokens, steps = sums["pairs"], sums["tokens"], sums.get("steps", 0.0)
    result: dict[str, float] = {}
    for name, value in sums.items():
        if name in ("pairs", "tokens"):
            result[name] = int(value)
        elif name == "padding":
            result[name] = value / (value + tokens)
        elif name == "grad_norm":
            result[name] = value / steps
        elif name != "steps":
            result[name] = value / (tokens if name in PER_TOKEN else pairs)
    return result
