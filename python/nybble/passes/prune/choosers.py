"""Which weights SparseGPT removes: by w^2 / U_ii^2, the loss of removing one now, when its input is reached.

The rest of its row (of the group for n:m, of the layer for blocks) competes for what is still to go. The original
chooses once for 128 inputs, or a group; later, on more updated weights, loses less. Counts are exact, no share is
forced on any 128 inputs, and a diagonal H gives Wanda's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...weights.sparsity import Block, NofM, Pattern
from ..layerwise.sweep import COLUMNS, Chooser
from .masks import block_sums, share, smallest, spread_blocks


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
        self.stride = COLUMNS if self._n_of_m is None else COLUMNS // self._period * self._period

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
        self.stride = COLUMNS // form.columns * form.columns
        self._left = torch.tensor([share(form.count(*shape), pattern.zeros)])

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As Chooser.choose."""
        sums = block_sums((columns[i:] / scale[i:, None]).square().T, self._form)
        gone = smallest(sums.view(1, -1), self._left).view_as(sums)[:, :1]
        self._left -= gone.sum()
        return ~spread_blocks(gone, self._form, (columns.shape[1], min(self.every, len(columns) - i))).T


def chooser(pattern: Pattern, columns: Tensor) -> Chooser:
    """Who chooses for a pattern in columns (K, N)."""
    k, n = columns.shape
    form = pattern.sparsity
    return Blocks(form, pattern, (n, k)) if isinstance(form, Block) else Rows(pattern, k)
