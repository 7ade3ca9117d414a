"""Rows of a weight by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..weights.form import split_layout
from ..weights.scheme import Scheme
from .base import DTYPES, memory
from .weights import TILED, weight_shape

# The layouts whose rows a Lookup reads, and whether they are in tiles.
LOOKUP_LAYOUTS = {"plain": False} | {name: True for name, row in TILED.items() if row.bits != 3}
_ID_BYTES = {torch.int32: 4, torch.int64: 8}


class Lookup:
    """A compiled kernel that reads rows of a dense weight with 8 or 4 bits by their numbers.

    kernel: of the op rows. Calls raise IndexError for an id that is no row, ValueError for a tensor that is too small.
    """

    def __init__(self, kernel: str, scheme: Scheme, out_features: int, in_features: int, layout: str) -> None:
        base, form = split_layout(layout)
        shape = weight_shape(scheme, out_features, in_features, base if LOOKUP_LAYOUTS[base] else "", form)
        self._compiled = _C.Lookup(kernel, shape, LOOKUP_LAYOUTS[base])
        self._run = self._compiled.run

    def __call__(self, packed: Tensor, ids: Tensor, out: Tensor) -> None:
        """out (..., K) = the rows of ids (...), int32 or int64; all are contiguous."""
        self._run(
            packed.data_ptr(),
            packed.numel(),
            ids.data_ptr(),
            8 if ids.dtype is torch.int64 else 4,
            ids.numel(),
            out.data_ptr(),
            out.nbytes,
            DTYPES[out.dtype],
            torch.get_num_threads(),
        )

    def bags(
        self,
        packed: Tensor,
        ids: Tensor,
        start: Tensor,
        weights: Tensor | None,
        out: Tensor,
        mode: str,
        left_out: int,
    ) -> None:
        """out (bags, K) = the sum, mean or maximum of the rows ids[start[i]:start[i + 1]] of bag i.

        start: int64 (bags + 1,). weights: float32, of each id, for sums. left_out: an id that is skipped, or -1.
        """
        spans = memory(start), len(start) - 1, memory(weights)
        held = memory(packed), memory(ids), _ID_BYTES[ids.dtype], ids.numel(), memory(out), DTYPES[out.dtype]
        self._compiled.bag(*held, mode, *spans, left_out, torch.get_num_threads())
