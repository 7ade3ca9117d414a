"""SparseGPT: remove weights one input at a time, and let those that stay make up for it.

Frantar and Alistarh, arXiv:2301.00774, with GPTQ's order of work (arXiv:2210.17323). For U'U = H^-1, column i of W takes
the error e_i = (w_i - q_i) / U_ii, and the columns after it become W - e_i U_i, so that W - Q = E U and the loss
tr((W - Q) H (W - Q)') is the sum of e^2. q_i is 0 where the weight goes, else w_i, rounded if a scheme is given.

What goes is chosen by w^2 / U_ii^2, the loss of removing it now, when its input is reached: the rest of its row (of the
group for n:m, of the layer for blocks) competes for what is still to go. The original chooses once for 128 inputs, or
a group; later, on more updated weights, loses less. Counts are exact, no share is forced on any 128 inputs, and a
diagonal H gives Wanda's mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...rounding import QuantizedWeight, group_codes, group_scale, pack_nibbles
from ...scheme import Scheme
from ...sparsity import Block, NofM, Pattern
from .factor import Factor, factorize
from .masks import block_sums, share, smallest, spread_blocks

_COLUMNS = 128


@dataclass(frozen=True)
class Solved:
    """A pruned weight.

    weight: (N, K), as the codes say where it was rounded. keep: bool (N, K). errors: E (N, K). quantized: the codes, or
    None. factor: what the Hessian became.
    """

    weight: Tensor
    keep: Tensor
    errors: Tensor
    quantized: QuantizedWeight | None
    factor: Factor


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, scheme: Scheme | None = None) -> Solved | None:
    """Prune a weight (N, K), and round what stays to a dense symmetric scheme if one is given.

    Works in the wider of the dtypes of weight and hessian (K, K), at least float32. An input that was always 0 has its
    weights set to 0. None where the Hessian is not finite or cannot be factored, or the result is not finite.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian, dead = _without_dead(hessian.to(dtype))
    factor = factorize(hessian)
    if factor is None:
        return None
    # Inputs along the first axis: what is worked on lies together.
    columns = weight.detach().to(dtype).T.clone(memory_format=torch.contiguous_format)
    columns[dead] = 0
    rounder = None if scheme is None else _Rounder(scheme, columns)
    keep, errors = _sweep(columns, factor.upper, _chooser(pattern, columns), rounder)
    if not (torch.isfinite(columns).all() and torch.isfinite(errors).all()):
        return None
    quantized = None if rounder is None else rounder.quantized()
    return Solved(columns.T.contiguous(), keep.T.contiguous(), errors.T, quantized, factor)


def _without_dead(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian with a mean diagonal where that is 0, and the mask of those inputs."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if not dead.any():
        return hessian, dead
    filler = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    return hessian + torch.diag(dead * filler), dead


def _sweep(columns: Tensor, upper: Tensor, chooser: _Rows | _Blocks, rounder: _Rounder | None) -> tuple[Tensor, Tensor]:
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


class _Rows:
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
        """Keep, bool (inputs decided, N), for columns (K, N) from i on, given U_ii (K,)."""
        stop = min(i - i % self._period + self._period, len(columns))
        if i % self._period == 0:
            size = stop - i
            kept = size - share(size, self._zeros) if self._n_of_m is None else self._n_of_m.kept(size)
            self._left = torch.full((columns.shape[1],), size - kept)
        cost = (columns[i:stop] / scale[i:stop, None]).square()
        gone = (cost[1:] < cost[0]).sum(0) < self._left
        self._left -= gone.long()
        return ~gone[None]


class _Blocks:
    """Blocks: of all blocks of the layer a fixed count goes, decided a column of blocks at a time."""

    def __init__(self, form: Block, pattern: Pattern, shape: tuple[int, int]) -> None:
        self._form = form
        self.every = form.columns
        self.stride = _COLUMNS // form.columns * form.columns
        self._left = torch.tensor([share(form.count(*shape), pattern.zeros)])

    def choose(self, i: int, columns: Tensor, scale: Tensor) -> Tensor:
        """As _Rows.choose."""
        sums = block_sums((columns[i:] / scale[i:, None]).square().T, self._form)
        gone = smallest(sums.view(1, -1), self._left).view_as(sums)[:, :1]
        self._left -= gone.sum()
        return ~spread_blocks(gone, self._form, (columns.shape[1], min(self.every, len(columns) - i))).T


def _chooser(pattern: Pattern, columns: Tensor) -> _Rows | _Blocks:
    k, n = columns.shape
    form = pattern.sparsity
    return _Blocks(form, pattern, (n, k)) if isinstance(form, Block) else _Rows(pattern, k)


class _Rounder:
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
