"""One pass over the inputs of a weight, in which each one's error is made up for by those after it.

GPTQ's order of work (Frantar et al., arXiv:2210.17323), as SparseGPT uses it (Frantar and Alistarh, arXiv:2301.00774).
For U'U = H^-1, column i of W takes the error e_i = (w_i - q_i) / U_ii, and the columns after it become W - e_i U_i, so
that W - Q = E U and the loss tr((W - Q) H (W - Q)') is the sum of e^2. q_i is 0 where the weight goes, else w_i,
rounded if a scheme is given.

What goes is chosen by w^2 / U_ii^2, the loss of removing it now, when its input is reached: the rest of its row (of the
group for n:m, of the layer for blocks) competes for what is still to go. The original chooses once for 128 inputs, or
a group; later, on more updated weights, loses less. Counts are exact, no share is forced on any 128 inputs, and a
diagonal H gives Wanda's mask.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...rounding import QuantizedWeight, group_codes, group_scale, pack_nibbles
from ...scheme import Scheme
from ...sparsity import Block, NofM, Pattern
from .masks import block_sums, share, smallest, spread_blocks

_COLUMNS = 128


class Chooser(Protocol):
    """Which weights stay.

    every: it is asked once for so many inputs. stride: after so many, a multiple of that, updates reach all the rest.
    """

    every: int
    stride: int

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """Keep, bool (inputs decided, N), for columns (K, N) from i on, given U_ii (K,)."""


def sweep(columns: Tensor, upper: Tensor, chooser: Chooser, rounder: Rounder | None = None) -> tuple[Tensor, Tensor]:
    """Turn columns (K, N) into the pruned ones, in place. Returns keep and errors, (K, N)."""
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


class Rows:
    """Unstructured and n:m: of each row's ``period`` inputs a fixed count goes, decided input by input.

    A weight goes if, of those that compete with it (its row's to the end of the period), fewer cost less than are still
    to go. Nothing then depends on what later updates do, and the count comes out exact.
    """

    every = 1

    def __init__(self, pattern: Pattern, k: int) -> None:
        form = pattern.sparsity
        self._n_of_m = form if isinstance(form, NofM) else None
        self._period = k if self._n_of_m is None else self._n_of_m.m
        self._zeros = pattern.zeros
        self.stride = _COLUMNS if self._n_of_m is None else _COLUMNS // self._period * self._period

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        stop = min(i - i % self._period + self._period, len(columns))
        if i % self._period == 0:
            size = stop - i
            kept = size - share(size, self._zeros) if self._n_of_m is None else self._n_of_m.kept(size)
            self._left = torch.full((columns.shape[1],), size - kept)
        cost = (columns[i:stop] / scale[i:stop, None]).square()
        gone = (cost[1:] < cost[0]).sum(0) < self._left
        self._left -= gone.long()
        return ~gone[None]


class Blocks:
    """Blocks: of all blocks of the layer a fixed count goes, decided a column of blocks at a time."""

    def __init__(self, form: Block, pattern: Pattern, shape: tuple[int, int]) -> None:
        self._form = form
        self.every = form.columns
        self.stride = _COLUMNS // form.columns * form.columns
        self._left = torch.tensor([share(form.count(*shape), pattern.zeros)])

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        sums = block_sums((columns[i:] / scale[i:, None]).square().T, self._form)
        gone = smallest(sums.view(1, -1), self._left).view_as(sums)[:, :1]
        self._left -= gone.sum()
        return ~spread_blocks(gone, self._form, (columns.shape[1], min(self.every, len(columns) - i))).T


class Fixed:
    """A mask that is known: keep, bool (K, N)."""

    every = stride = _COLUMNS

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        return self._keep[i : i + self.every]


def chooser(pattern: Pattern, columns: Tensor) -> Chooser:
    """Who chooses for a pattern in columns (K, N)."""
    k, n = columns.shape
    form = pattern.sparsity
    return Blocks(form, pattern, (n, k)) if isinstance(form, Block) else Rows(pattern, k)


class Rounder:
    """Rounds columns (K, N) as they come; a group's scale is that of its weights as they stand when it is reached."""

    def __init__(self, scheme: Scheme, columns: Tensor) -> None:
        self._scheme, self._columns = scheme, columns
        self._size = scheme.group_size or len(columns)
        self._codes = torch.empty(columns.shape, dtype=torch.int8 if scheme.weight_bits == 8 else torch.uint8)
        self._scales: list[Tensor] = []
        self._zero = 0 if scheme.weight_bits == 8 else 8

    def round(self, i: int) -> Tensor:
        """Column i as its codes say."""
        if i % self._size == 0:
            group = self._columns[i : i + self._size]
            low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
            self._scales.append(group_scale(low, high, self._scheme)[0])
        scale = self._scales[-1].to(self._columns.dtype)
        codes = group_codes(self._columns[i], scale, torch.full_like(scale, self._zero), self._scheme)
        self._codes[i] = codes.to(self._codes.dtype)
        return (codes - self._zero) * scale

    def quantized(self) -> QuantizedWeight:
        """All codes in the portable layout; a weight that went has the code of 0."""
        codes = torch.where(self._columns == 0, self._zero, self._codes).T.contiguous()
        scale = torch.stack(self._scales, dim=1)
        return QuantizedWeight(codes if self._scheme.weight_bits == 8 else pack_nibbles(codes), scale)
