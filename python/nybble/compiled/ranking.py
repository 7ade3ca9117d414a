"""Which scores of a row are the smallest, and weights without those, by the compiled library where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def smallest(scores: Tensor, counts: Tensor) -> Tensor:
    """The mask, bool (N, K), of the counts[row] smallest scores, not negative, in each row; of equal ones, the first."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numel():
        return native.choose_smallest(scores.contiguous(), counts)
    return by_sorting(scores, counts)


def keep_only(weight: Tensor, keep: Tensor) -> Tensor:
    """A weight (N, K) with 0 where the mask keep, bool (N, K), is false."""
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.element_size() in (2, 4) and weight.numel() and not weight.is_neg():
        return native.keep_only(weight.contiguous(), keep.contiguous())
    return torch.where(keep, weight, 0)


def by_sorting(scores: Tensor, counts: Tensor) -> Tensor:
    """The definition of ``smallest``."""
    order = scores.argsort(dim=1, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen)
