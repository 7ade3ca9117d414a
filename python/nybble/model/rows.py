"""The rows that the weight of a layer multiplies, of one call."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.kinds import kind_of


def rows_of(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (T, K) of a layer's input x, see ``ModuleKind.rows``. Of a Linear layer, without padding if the mask fits."""
    kind = kind_of(module)
    if kind.takes_rows and mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return kind.rows(module, x)
