"""Patterns that a weight has already."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...weights.sparsity import Block, NofM, Pattern, Unstructured
from .masks import block_sums

_GROUPS = (4, 8, 16, 32, 64, 128)
_BLOCKS = ((64, 64), (32, 32), (16, 64), (16, 16), (16, 4))
_LEAST_ZEROS = 0.05
# Of the places that an n:m pattern offers, the share that has to be filled: else the zeros only happen to fit.
_FILLED = 0.95
# Of the zeros of a weight, the share that has to lie in whole blocks.
_IN_BLOCKS = 0.98


def recognize(weight: Tensor) -> Pattern | None:
    """The pattern of the zeros in a weight (N, K): n:m or blocks where it is one, else unstructured.

    The smallest m of which an n:m fits is named: 2:4, not 4:8. None where less than 5 % of the weights are zero.
    """
    filled = weight.detach() != 0
    kept = filled.float().mean().item()
    if 1 - kept < _LEAST_ZEROS or kept == 0:
        return None
    for m in _GROUPS:
        if m > filled.shape[1]:  # padding would count as zeros
            break
        n = _most_in_a_group(filled, m)
        if 0 < n < m and kept >= _FILLED * n / m:
            return Pattern(NofM(n, m), 1 - n / m)
    for rows, columns in _BLOCKS:
        form = Block(rows, columns)
        empty = (block_sums(filled.float(), form) == 0).float().mean().item()
        if empty >= _IN_BLOCKS * (1 - kept):
            return Pattern(form, empty)
    percent = min(99, max(1, round(100 * (1 - kept))))
    free = Unstructured(percent + (percent == 24))
    return Pattern(free, free.zeros)


def satisfies(weight: Tensor, pattern: Pattern) -> bool:
    """Whether the zeros that a weight (N, K) has already are all that the pattern asks for.

    Of the share of zeros that an unstructured or a block pattern asks for, half a percent of all may be missing.
    """
    filled = weight.detach() != 0
    form = pattern.sparsity
    if isinstance(form, NofM):
        return _most_in_a_group(filled, form.m) <= form.n
    units = block_sums(filled.float(), form) if isinstance(form, Block) else filled
    return (units == 0).float().mean().item() >= pattern.zeros - 0.005


def _most_in_a_group(filled: Tensor, m: int) -> int:
    n, k = filled.shape
    padded = pad(filled, (0, -k % m))
    return int(padded.view(n, -1, m).sum(-1, dtype=torch.int32).max())
