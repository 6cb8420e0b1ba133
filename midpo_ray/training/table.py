"""What a stage trains on: tokens and frozen signals of every pair, in one Parquet file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..data.batching import Document
from ..storage import Storage

TOKENS = ("prompt", "chosen", "rejected")
# margin: multiplied by lambda, 0 where there is none; weights and scale: 1 where there are none
SIGNALS = (
    "reference_chosen", "reference_rejected", "margin", "weight_chosen", "weight_rejected", "scale",
)  # fmt: skip


def schema(signals: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [pa.field("id", pa.string())]  # FILE:LINE, for messages
        + [pa.field(name, pa.list_(pa.int32())) for name in TOKENS]
        + [pa.field(name, pa.float64()) for name in signals]
        + [pa.field("validation", pa.bool_())]
    )


class StageTable:
    """One row per pair (B rows): its tokens and the outputs of frozen models; see ``schema``.

    The columns stay in Arrow's memory; Python lists are made only for the rows of a batch.
    """

    names: tuple[str, ...] = SIGNALS

    def __init__(self, table: pa.Table) -> None:
        wanted = schema(self.names)
        missing = [name for name in wanted.names if name not in table.column_names]
        if missing:
            raise ValueError(f"stage table: columns {', '.join(missing)} are missing")
        self.arrow = table.select(wanted.names).cast(wanted).combine_chunks()
        self._tokens = {name: _ListColumn(self.arrow[name]) for name in TOKENS}
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
        held_out, kind = self.arrow["validation"], type(self)
        return kind(self.arrow.filter(pc.invert(held_out))), kind(self.arrow.filter(held_out))

    def ids(self, indices: Sequence[int]) -> list[str]:
        """FILE:LINE of some rows."""
        return [self.arrow["id"][i].as_py() for i in indices]

    def documents(self, indices: Sequence[int]) -> list[Document]:
        """The pairs' tokens: prompt, then chosen and rejected as the two continuations."""
        prompt, chosen, rejected = (self._tokens[name] for name in TOKENS)
        return [Document(prompt.row(i), [chosen.row(i), rejected.row(i)]) for i in indices]

    def signals(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Every signal of some rows, each [B] float32."""
        columns = self._signals[:, torch.as_tensor(list(indices), dtype=torch.long)]
        return dict(zip(self.names, columns, strict=True))

    def rows_of_known_risk(self, indices: Sequence[int]) -> list[int]:
        """Those of some rows whose prompt's risk is known; none where the table has no risk."""
        if "risk" not in self.names:
            return []
        risk = self._signals[self.names.index("risk")]
        return [i for i in indices if risk[i] >= 0]

    def lengths(self, layout: str) -> list[int]:
        """Tokens of every pair in a batch; with ``padded`` the prompt counts for each response."""
        prompt, chosen, rejected = (self._tokens[name].lengths for name in TOKENS)
        return ((2 if layout == "padded" else 1) * prompt + chosen + rejected).tolist()


class RouterTable(StageTable):
    """What a router trains on: as an expert's, with the risk of each pair's prompt."""

    names = (*SIGNALS, "risk")  # 1: a response to the prompt is unsafe, 0: none is, -1: not known


class ScoreTable(StageTable):
    """What a score model trains on: chosen is the better or the safer response."""

    names = ("sign_chosen", "sign_rejected")  # +1: unsafe, -1: safe, 0: not labelled


class _ListColumn:
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
