"""Least-squares update of the kept weights for a fixed mask."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 10


def refit(pruned: Tensor, keep: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """Lower tr((P - W) H (P - W)') over the kept weights of P (N, K), by conjugate gradients from ``pruned``.

    SparseGPT's sweep updates only inputs after the removed one; this updates all kept weights, given the mask. Each row
    is a separate problem, preconditioned by the diagonal of H; 10 steps.

    Args:
        pruned: P at the start, (N, K).
        keep: the mask, bool (N, K).
        weight: W (N, K), in the dtype of ``pruned``.
        hessian: the damped H (K, K), in the dtype of ``pruned``.
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
    """over / under; 0 where under is 0, as in a row that is solved."""
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(under.dtype).tiny), 0)
