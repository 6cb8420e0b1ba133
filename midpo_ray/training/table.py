"""What a stage trains on: tokens and frozen signals of every pair, one Parquet file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..data.batching import Document
from ..storage import Storage

TOKENS = ("prompt", "chosen", "rejected")
SIGNALS = (
    "reference_chosen",
    "reference_rejected",
    "margin",
    "weight_chosen",
    "weight_rejected",
    "scale",
)


def schema(signals: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [pa.field("id", pa.string())]  # FILE:LINE, for messages
        + [pa.field(name, pa.list_(pa.int32())) for name in TOKENS]
        + [pa.field(name, pa.float64()) for name in signals]
        + [pa.field("validation", pa.bool_())]
    )


class StageTable:
    """One row a pair (B of them): its tokens, and what frozen models say of it; see ``schema``.

    The columns stay in Arrow's memory; Python lists are made for the rows of one batch at a time.
    """

    names: tuple[str, ...] = (
        SIGNALS  # margin: lambda applied, 0 where none; weights and scale: 1 where none
    )

    def __init__(self, table: pa.Table) -> None:
        wanted = schema(self.names)
        missing = [name for name in wanted.names if name not in table.column_names]
        if missing:
            raise ValueError(f"stage table: columns {', '.join(missing)} are missing")
        self.arrow = table.select(wanted.names).cast(wanted).combine_chunks()
        self._tokens = {name: _lists(self.arrow[name]) for name in TOKENS}
        columns = [self.arrow[name].to_numpy() for name in self.names]
        self._signals = torch.from_numpy(np.stack(columns)).to(torch.float32)  # [signal, B]
        if not bool(torch.isfinite(self._signals).all()):
            row = int((~torch.isfinite(self._signals)).any(dim=0).nonzero()[0])
            raise ValueError(
                f"stage table: {self.arrow['id'][row].as_py()}: a signal is not finite"
            )

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    @classmethod
    def load(cls, storage: Storage, name: str) -> StageTable:
        return cls.from_bytes(storage.read(name))

    @classmethod
    def from_bytes(cls, data: bytes) -> StageTable:
        return cls(pq.read_table(pa.BufferReader(data)))

    def to_bytes(self) -> bytes:
        """Parquet; the same rows give the same bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.arrow, sink, compression="zstd")
        return sink.getvalue().to_pybytes()

    def split(self) -> tuple[StageTable, StageTable]:
        """(training rows, validation rows)."""
        held_out = self.arrow["validation"]
        return type(self)(self.arrow.filter(pa.compute.invert(held_out))), type(self)(
            self.arrow.filter(held_out)
        )

    def ids(self, indices: Sequence[int]) -> list[str]:
        """FILE:LINE of some rows."""
        return [self.arrow["id"][i].as_py() for i in indices]

    def documents(self, indices: Sequence[int]) -> list[Document]:
        """The pairs' tokens: prompt, then chosen and rejected as the two continuations."""
        prompt, chosen, rejected = (self._tokens[name] for name in TOKENS)
        return [Document(prompt.row(i), [chosen.row(i), rejected.row(i)]) for i in indices]

    def signals(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Every signal of some rows, each [B] float32."""
        return dict(
            zip(
                self.names,
                self._signals[:, torch.as_tensor(list(indices), dtype=torch.long)],
                strict=True,
            )
        )

    def lengths(self, layout: str) -> list[int]:
        """Tokens of every pair as it stands in a batch: the prompt counts once, or twice where each response has its own row."""
        prompt, chosen, rejected = (self._tokens[name].lengths for name in TOKENS)
        return ((2 if layout == "padded" else 1) * prompt + chosen + rejected).tolist()


class ScoreTable(StageTable):
    """What a score model trains on: chosen is the better or the safer response."""

    names = (
        "sign_chosen",
        "sign_rejected",
    )  # +1 the response is unsafe, -1 it is safe, 0 nobody said


class _lists:
    """A list column as flat values and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        if isinstance(array, pa.ChunkedArray):
            array = pa.array([], column.type)
        self.offsets = array.offsets.to_numpy().astype(np.int64)
        self.values = array.values.to_numpy()
        self.lengths = np.diff(self.offsets)

    def row(self, i: int) -> list[int]:
        return self.values[self.offsets[i] : self.offsets[i + 1]].tolist()
