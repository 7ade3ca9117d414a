"""One pass over the input channels of a weight, in which later channels compensate the error of earlier ones.

The loop of GPTQ (Frantar et al., arXiv:2210.17323) and SparseGPT (Frantar and Alistarh, arXiv:2301.00774). With
U'U = H^-1, column i of W has the error e_i = (w_i - q_i) / U_ii, and the columns after it become W - e_i U_i. Then
W - Q = E U, and the loss tr((W - Q) H (W - Q)') is the sum of e^2. q_i is 0 for pruned weights, else w_i, rounded if a
scheme is given.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...weights.rounding import QuantizedWeight, Ranges, join_codes
from ...weights.scheme import Scheme

COLUMNS = 128


class Chooser(Protocol):
    """Decides which weights are kept.

    every: input channels decided by one call. stride: after this many channels, a multiple of ``every``, the pending
    updates are applied to all later channels.
    """

    every: int
    stride: int

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """The keep mask, bool (channels decided, N), of the channels from i on; columns (K, N), scale: all U_ii (K,)."""


def sweep(columns: Tensor, upper: Tensor, chooser: Chooser, rounder: Rounder | None = None) -> tuple[Tensor, Tensor]:
    """Prune and round columns (K, N), the transposed weight, in place. Returns the keep mask and the errors e, (K, N)."""
    k = len(columns)
    keep = torch.ones_like(columns, dtype=torch.bool)
    errors = torch.zeros_like(columns)
    scale = upper.diagonal()
    for start in range(0, k, chooser.stride):
        stop = min(start + chooser.stride, k)
        for i in range(start, stop):
            if i % chooser.every == 0:
                keep[i : i + chooser.every] = chooser.choose(i, columns, scale)
            column = columns[i]
            rounded = column if rounder is None else rounder.round(i)
            rounded = torch.where(keep[i], rounded, 0)
            errors[i] = (column - rounded) / scale[i]
            columns[i] = rounded
            columns[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return keep, errors


class FixedMask:
    """A chooser with a given mask: keep, bool (K, N)."""

    def __init__(self, keep: Tensor, stride: int = COLUMNS) -> None:
        self._keep = keep
        self.every = self.stride = stride

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        return self._keep[i : i + self.every]


class Rounder:
    """Rounds the rows of columns (K, N) one by one during a sweep, with the updates so far.

    Args:
        scheme: a dense scheme.
        columns: the transposed weight, updated by the sweep.
        order: the input channel of each row of columns; None: the natural order.
        ranges: scales and zero points of all groups. None: each group gets symmetric ones from its updated weights when
            the sweep reaches it; only possible in the natural order.
    """

    def __init__(
        self, scheme: Scheme, columns: Tensor, order: Tensor | None = None, ranges: Ranges | None = None
    ) -> None:
        self._scheme, self._columns = scheme, columns
        k, n = columns.shape
        self._size = scheme.group_size or k
        self._inputs = list(range(k)) if order is None else order.tolist()
        self._moving = ranges is None
        self._ranges = Ranges.empty(n, k, scheme) if ranges is None else ranges
        self._codes = torch.empty_like(columns)

    def round(self, i: int) -> Tensor:
        """Row i of the columns, rounded and dequantized."""
        group, first = divmod(self._inputs[i], self._size)
        scales, zeros, _ = self._ranges
        if self._moving and first == 0:
            members = self._columns[i : i + self._size]
            low, high = members.amin(0).clamp(max=0), members.amax(0).clamp(min=0)
            scales[:, group], zeros[:, group] = self._scheme.weight_type.scales(low, high, self._scheme.symmetric)
        scale, zero = scales[:, group].to(self._columns.dtype), zeros[:, group].to(self._columns.dtype)
        codes = self._scheme.weight_type.nearest(self._columns[i], scale, zero)
        self._codes[i] = codes
        return self._scheme.weight_type.steps(codes, zero) * scale

    def quantized(self) -> QuantizedWeight:
        """All codes in the portable layout and the natural order; pruned weights get the code that stands for 0."""
        places = torch.empty(len(self._inputs), dtype=torch.int64)
        places[self._inputs] = torch.arange(len(places))
        columns, codes = self._columns[places].T, self._codes[places].T
        codes = torch.where(columns == 0, self._ranges.spread_zeros(self._size, len(places)), codes)
        return join_codes(codes, self._ranges, self._scheme)
