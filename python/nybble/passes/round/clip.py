"""AWQ's clipping search: the range of each group with the least output error (Lin et al., arXiv:2306.00978)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...weights.rounding import QuantizedWeight, Ranges, dequantize_weight, group_ranges, round_to
from ...weights.scheme import Scheme

_STEPS = 10  # ranges tried: 100 %, 95 %, ... 55 % of the full range


def clip(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round a weight (N, K), with the range of each group clipped to minimize its loss.

    A group's loss is d H d', for its part d of W - Q and its diagonal block of the Hessian (K, K). The full range is one
    of the candidates, so no group has a higher loss than by rounding to nearest.
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
        ranges = Ranges(torch.where(better, tried.scale, ranges.scale), torch.where(better, tried.zero, ranges.zero))
    return round_to(target, ranges, scheme)
