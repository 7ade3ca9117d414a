"""Tables of embeddings, dense or quantized, whose rows a chain reads by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lookup import Reader
from ..nn.embedding import Embedding

Table = Tensor | Embedding


def table_of(layer: nn.Module) -> Table | None:
    """The table whose rows a module may read, or None."""
    if isinstance(layer, Embedding):
        return layer
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def rows_of_table(table: Table, ids: Tensor) -> Tensor:
    """The rows of some numbers."""
    return F.embedding(ids, table) if isinstance(table, Tensor) else table.forward(ids)


class Rows:
    """Rows of a table for the calls of a chain. Those by position are read once, for the longest call so far."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._reader: Reader | None = None
        self._first: tuple[Reader, int, int, Tensor] | None = None  # of which weight, its version, from where, the rows

    def by_ids(self, ids: Tensor) -> Tensor:
        """The rows of some numbers."""
        if isinstance(self._table, Tensor):
            return F.embedding(ids, self._table)
        usual = ids.dtype is torch.int64 and ids.is_cpu and ids.is_contiguous()
        reader = self._current(self._table) if usual else None
        return self._table.forward(ids) if reader is None else reader(ids)

    def by_position(self, begin: int, end: int) -> Tensor:
        """The rows [begin, end); nothing may write them."""
        if isinstance(self._table, Tensor):
            return self._table[begin:end]
        reader = self._current(self._table)
        if reader is None or reader.packed.is_inference():
            return self._table.forward(torch.arange(begin, end))
        first = self._first  # one reading: other threads may change it
        now = (reader, reader.packed._version, begin)
        if first is None or first[:3] != now or len(first[3]) < end - begin:
            first = self._first = (*now, reader(torch.arange(begin, end)))
        return first[3][: end - begin]

    def _current(self, table: Embedding) -> Reader | None:
        """A reader of the table's weight as it is now, on the CPU."""
        reader, packed = self._reader, table._buffers["packed"]
        if reader is None or reader.packed is not packed or reader.dtype is not table.dtype:
            reader = self._reader = table.reader() if table.device.type == "cpu" else None
        return reader


def looks_up(ids: Tensor, table: Table, out: Tensor) -> bool:
    """Whether a tensor is the rows of some numbers."""
    return torch.equal(rows_of_table(table, ids).reshape(-1), out.reshape(-1))
