"""Which weights SparseGPT removes: those with the least w^2 / U_ii^2, the loss of removing a weight.

The original method decides once per 128 input channels, or once per n:m group. Here each decision is made when the sweep
reaches the channel, on weights with all updates so far, which has a lower loss. A weight competes with the undecided
rest of its row (of its group for n:m, of the layer for blocks). Counts are exact, the zeros are not spread evenly over
groups of 128 channels, and a diagonal H gives Wanda's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiled.ranking import smallest
from ...weights.sparsity import Block, NofM, Pattern
from ..layerwise.sweep import COLUMNS, Chooser
from .masks import block_sums, share, spread_blocks


class Rows:
    """Unstructured and n:m: removes a fixed number of weights from each row's period, channel by channel.

    A period is a group for n:m, and the whole row for unstructured patterns. A weight is removed if fewer undecided
    weights of its row's period cost less than there are still to remove. So the count is always exact.
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
    """Blocks: removes a fixed number of the layer's blocks, one column of blocks at a time."""

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
    """The chooser of a pattern for columns (K, N)."""
    k, n = columns.shape
    form = pattern.sparsity
    return Blocks(form, pattern, (n, k)) if isinstance(form, Block) else Rows(pattern, k)
