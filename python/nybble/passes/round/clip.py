"""AWQ's search for the range of each group, by what the layer's output loses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...weights.rounding import QuantizedWeight, Ranges, dequantize_weight, group_ranges, round_to
from ...weights.scheme import Scheme

_STEPS = 10  # of a twentieth of the range


def clip(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round a weight (N, K), giving up the share of each group's range that loses least.

    A group's loss is d H d' for its part d of W - Q and the block of the Hessian (K, K) that belongs to it. What is not
    better than the whole range is not taken, so that no group loses more than by rounding to nearest.
    """
    n, k = weight.shape
    size, groups = scheme.group_size or k, scheme.groups(k)
    target = weight.detach().float()
    room = groups * size - k
    blocks = pad(hessian, (0, room, 0, room)).view(groups, size, groups, size)
    blocks = torch.stack([blocks[g, :, g] for g in range(groups)])
    best, ranges = torch.full((n, groups), torch.inf), Ranges.empty(n, k, scheme)
    for step in range(_STEPS):
        tried = group_ranges(target, scheme, 1 - step / 20)
        change = dequantize_weight(round_to(target, tried, scheme), scheme, k) - target
        parts = pad(change, (0, room)).view(n, groups, size).transpose(0, 1)
        loss = ((parts @ blocks) * parts).sum(-1).T
        better = loss < best
        best = torch.where(better, loss, best)
        ranges = Ranges(*(torch.where(better, new, old) for new, old in zip(tried, ranges, strict=True)))
    return round_to(target, ranges, scheme)
