"""The weights that stay, as well as they can make up for all that went."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 10


def refit(pruned: Tensor, keep: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """Lower tr((P - W) H (P - W)') over the kept weights of P (N, K), by conjugate gradients from ``pruned``.

    SparseGPT's sweep corrects only inputs that come after the one it removes; this corrects all, once the mask is
    known. keep: bool (N, K); weight W (N, K) and hessian (K, K), damped, in the dtype of pruned. Each row is its own
    problem, preconditioned by the diagonal; 10 steps.
    """
    diagonal = hessian.diagonal()
    found = pruned.clone()
    residual = torch.where(keep, (weight - pruned) @ hessian, 0)
    step = residual / diagonal
    size = (residual * step).sum(1, keepdim=True)
    for _ in range(_STEPS):
        pushed = torch.where(keep, step @ hessian, 0)
        length = _ratio(size, (step * pushed).sum(1, keepdim=True))
        found += length * step
        residual -= length * pushed
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        step = scaled + _ratio(size, before) * step
    return found


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under, 0 for a row that is solved."""
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(under.dtype).tiny), 0)
