"""Tables of embeddings, dense or quantized, whose rows a chain reads by their numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lookup import Reader
from ..nn.embedding import Embedding
from .versions import version_of

Table = Tensor | Embedding

# Rows of a table that is read whole, and once: types of tokens, for one.
_FEW = 16


def table_of(layer: nn.Module) -> Table | None:
    """The table whose rows a module may read, or None."""
    if isinstance(layer, Embedding):
        return layer
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def rows_of_table(table: Table, ids: Tensor) -> Tensor:
    """The rows of some numbers."""
    return F.embedding(ids, table) if isinstance(table, Tensor) else table.forward(ids)


class _First(NamedTuple):
    """Rows that were read once: of which weight and version of it, from which on, and how many."""

    reader: Reader
    version: int
    begin: int
    length: int
    rows: Tensor


class Rows:
    """Rows of a table for the calls of a chain. Those by position are read once, for the longest call so far; so are all
    rows of a small table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._reader: Reader | None = None
        self._first: _First | None = None

    def by_ids(self, ids: Tensor) -> Tensor:
        """The rows of some numbers."""
        table = self._table
        if isinstance(table, Tensor):
            return torch.embedding(table, ids)
        usual = ids.dtype is torch.int64 and ids.is_cpu and ids.is_contiguous()
        reader = self._current(table) if usual else None
        if reader is None:
            return table.forward(ids)
        version = version_of(reader.packed) if table.num_embeddings <= _FEW else None
        if version is None:
            return reader(ids)
        return torch.embedding(self._from(reader, version, 0, table.num_embeddings), ids)

    def by_position(self, begin: int, end: int) -> Tensor:
        """The rows [begin, end); nothing may write them."""
        if isinstance(self._table, Tensor):
            return self._table[begin:end]
        reader = self._current(self._table)
        version = None if reader is None else version_of(reader.packed)
        if reader is None or version is None:
            return self._table.forward(torch.arange(begin, end))
        return self._from(reader, version, begin, end - begin)

    def _from(self, reader: Reader, version: int, begin: int, count: int) -> Tensor:
        first = self._first  # one reading: other threads may change it
        if (
            first is None
            or first.reader is not reader
            or first.version != version
            or first.begin != begin
            or first.length < count
        ):
            rows = reader(torch.arange(begin, begin + count))
            first = self._first = _First(reader, version, begin, count, rows)
        return first.rows if first.length == count else first.rows[:count]

    def _current(self, table: Embedding) -> Reader | None:
        """A reader of the table's weight as it is now, on the CPU."""
        reader, packed = self._reader, table._buffers["packed"]
        if reader is None or reader.packed is not packed or reader.dtype is not table.dtype:
            reader = self._reader = table.reader() if table.device.type == "cpu" else None
        return reader


def looks_up(ids: Tensor, table: Table, out: Tensor) -> bool:
    """Whether a tensor is the rows of some numbers."""
    return torch.equal(rows_of_table(table, ids).reshape(-1), out.reshape(-1))
