"""Comparing the tensors that were seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a[0], b[0]) and torch.equal(a, b)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def same_flat(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.dtype == b.dtype and torch.equal(a.reshape(-1), b.reshape(-1))


def integers(tensor: Tensor) -> bool:
    """Whether it may hold a number for each token (batch, length)."""
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.numel() > 0


def constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def attended(padding: Tensor) -> Tensor:
    """The mask (batch, 1, 1, length) of attention, true where to attend, of a padding mask (batch, length)."""
    return padding.logical_not()[:, None, None]


def attending(kept: Tensor) -> Tensor:
    """The mask (batch, 1, 1, length) of attention, true where to attend, of one (batch, length) that is 0 at padding."""
    return kept.bool()[:, None, None]


def attends(kept: Tensor, mask: Tensor) -> bool:
    """Whether a mask is that of attention to what is kept. If everything is, that cannot be told."""
    full = attending(kept)
    fits = mask.shape[0] == full.shape[0] and mask.shape[-1] == full.shape[-1]
    return fits and not bool(full.all()) and torch.equal(full.expand_as(mask), mask)


def grouped(tensor: Tensor, heads: int, grouped: bool) -> Tensor:
    """Keys or values (batch, heads, length, width) without the heads that were repeated for the queries."""
    if grouped or tensor.shape[1] != heads:
        return tensor
    for count in range(1, heads):
        if heads % count == 0:
            each = tensor.unflatten(1, (count, heads // count))
            if bool((each == each[:, :, :1]).all()):
                found: Tensor = each[:, :, 0]
                return found
    return tensor
