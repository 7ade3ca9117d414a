"""One pass over the inputs of a weight, in which each one's error is made up for by those after it.

GPTQ's order of work (Frantar et al., arXiv:2210.17323), as SparseGPT uses it too (Frantar and Alistarh,
arXiv:2301.00774). For U'U = H^-1, column i of W takes the error e_i = (w_i - q_i) / U_ii, and the columns after it become
W - e_i U_i, so that W - Q = E U and the loss tr((W - Q) H (W - Q)') is the sum of e^2. q_i is 0 where the weight goes,
else w_i, rounded if a scheme is given.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...weights.rounding import QuantizedWeight, Ranges, join_codes
from ...weights.scheme import Scheme

COLUMNS = 128


class Chooser(Protocol):
    """Which weights stay.

    every: it is asked once for so many inputs. stride: after so many, a multiple of that, updates reach all the rest.
    """

    every: int
    stride: int

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """Keep, bool (inputs decided, N), for columns (K, N) from i on, given U_ii (K,)."""


def sweep(columns: Tensor, upper: Tensor, chooser: Chooser, rounder: Rounder | None = None) -> tuple[Tensor, Tensor]:
    """Turn columns (K, N) into what is left of them, in place. Returns keep and errors, (K, N)."""
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


class Fixed:
    """A mask that is known: keep, bool (K, N); updates reach all the rest after ``stride`` inputs."""

    def __init__(self, keep: Tensor, stride: int = COLUMNS) -> None:
        self._keep = keep
        self.every = self.stride = stride

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        return self._keep[i : i + self.every]


class Rounder:
    """Rounds columns (K, N) as they come.

    Args:
        scheme: a dense one.
        columns: what is rounded, as it stands when it is reached.
        order: the input that each row of columns is; None: all in their order.
        ranges: scales and zero points of all groups; None: each group's are those of its weights as they stand when it
            is reached, symmetric. Needed where the order is not that of the inputs.
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
        """Row i of the columns as its codes say."""
        group, first = divmod(self._inputs[i], self._size)
        scales, zeros = self._ranges
        if self._moving and first == 0:
            members = self._columns[i : i + self._size]
            low, high = members.amin(0).clamp(max=0), members.amax(0).clamp(min=0)
            scales[:, group], zeros[:, group] = self._scheme.weight_type.scales(low, high, self._scheme.symmetric)
        scale, zero = scales[:, group].to(self._columns.dtype), zeros[:, group].to(self._columns.dtype)
        codes = self._scheme.weight_type.nearest(self._columns[i], scale, zero)
        self._codes[i] = codes
        return (codes - zero) * scale

    def quantized(self) -> QuantizedWeight:
        """All codes in the portable layout and the order of the inputs; a weight that went has the code of 0."""
        places = torch.empty(len(self._inputs), dtype=torch.int64)
        places[self._inputs] = torch.arange(len(places))
        columns, codes = self._columns[places].T, self._codes[places].T
        codes = torch.where(columns == 0, self._ranges.spread_zeros(self._size, len(places)), codes)
        return join_codes(codes, self._ranges, self._scheme)
