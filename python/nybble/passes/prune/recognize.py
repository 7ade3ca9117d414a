"""Recognize the sparsity pattern that a weight already has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...weights.sparsity import Block, NofM, Pattern, Unstructured
from .masks import block_sums

_GROUPS = (4, 8, 16, 32, 64, 128)
_BLOCKS = ((64, 64), (32, 32), (16, 64), (16, 16), (16, 4))
_LEAST_ZEROS = 0.05
# An n:m pattern counts only if at least this share of the n values per group are not zero; otherwise it fits by chance.
_FILLED = 0.95
# A block pattern counts only if at least this share of the zeros lies in blocks that are all zero.
_IN_BLOCKS = 0.98


def recognize(weight: Tensor) -> Pattern | None:
    """The sparsity pattern of a weight (N, K): n:m or blocks if one fits, else unstructured.

    Of several n:m that fit, the one with the smallest m: 2:4, not 4:8. None if less than 5 % of the weights are zero.
    """
    filled = weight.detach() != 0
    kept = filled.count_nonzero().item() / filled.numel()
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
        sums = block_sums(filled.float(), form)
        empty = 1 - sums.count_nonzero().item() / sums.numel()
        if empty >= _IN_BLOCKS * (1 - kept):
            return Pattern(form, empty)
    percent = min(99, max(1, round(100 * (1 - kept))))
    free = Unstructured(percent + (percent == 24))
    return Pattern(free, free.zeros)


def satisfies(weight: Tensor, pattern: Pattern) -> bool:
    """Whether a weight (N, K) already has the zeros that the pattern requires.

    For unstructured and block patterns, the share of zeros may be up to half a percentage point too low.
    """
    dense, form = weight.detach(), pattern.sparsity
    if isinstance(form, NofM):
        return _most_in_a_group(dense != 0, form.m) <= form.n
    units = block_sums((dense != 0).float(), form) if isinstance(form, Block) else dense
    return 1 - units.count_nonzero().item() / units.numel() >= pattern.zeros - 0.005


def _most_in_a_group(filled: Tensor, m: int) -> int:
    n, k = filled.shape
    padded = pad(filled, (0, -k % m))
    return int(padded.view(n, -1, m).sum(-1, dtype=torch.int32).max())
