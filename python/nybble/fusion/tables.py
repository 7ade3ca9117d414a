"""Tables of embeddings, dense or quantized, whose rows a chain reads by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def looks_up(ids: Tensor, table: Table, out: Tensor) -> bool:
    """Whether a tensor is the rows of some numbers."""
    return torch.equal(rows_of_table(table, ids).reshape(-1), out.reshape(-1))
