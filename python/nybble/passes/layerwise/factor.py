"""The factor of an inverse Hessian that GPTQ's updates need, and the damping it takes to get one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_DAMPING = 0.01
# Of the change of the inputs by the layers before, the share that a layer makes up for.
_MADE_UP = 0.25


class Factor(NamedTuple):
    """upper: U (K, K) with U'U = H^-1 of the damped H; how: the damping in words where it was not the usual, or None."""

    upper: Tensor
    hessian: Tensor
    how: str | None


def factorize(hessian: Tensor) -> Factor | None:
    """Factor a Hessian (K, K), float32 or float64, none of whose diagonal is 0; in float64, returned in its dtype.

    Damping, as a share of the mean of the diagonal, starts at 0.01 and rises by as much to 1; then a floor, 1e-6 of the
    largest to 0.1 of it, is added to the diagonal. None where the Hessian is not finite or nothing helped.
    """
    if not torch.isfinite(hessian).all():
        return None
    exact = hessian.double()
    for added, how in _ladder(exact.diagonal()):
        damped = exact + added * torch.eye(len(exact), dtype=exact.dtype)
        upper = _upper(damped)
        if upper is not None:
            return Factor(upper.to(hessian.dtype), damped.to(hessian.dtype), how)
    return None


def _ladder(diagonal: Tensor) -> Iterator[tuple[float, str | None]]:
    mean, largest = diagonal.mean().item(), diagonal.max().item()
    yield _FIRST_DAMPING * mean, None
    for hundredths in range(2, 101):
        yield hundredths / 100 * mean, f"damping {hundredths / 100:.2f} instead of {_FIRST_DAMPING}"
    for power in range(6):
        share = 10.0 ** (power - 6)
        yield share * largest, f"a floor of {share:.0e} of the largest added to the Hessian's diagonal"


def _upper(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed.item() or not torch.isfinite(upper).all() else upper


def without_dead(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian with a mean diagonal where that is 0, and the mask of those inputs."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if not dead.any():
        return hessian, dead
    filler = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    return hessian + torch.diag(dead * filler), dead


def made_up(weight: Tensor, drift: Tensor, upper: Tensor) -> Tensor:
    """What a weight (N, K) is to change by to make up for a quarter of what its inputs have changed by.

    drift: (2 / rows) * sum of (d - x) x' (K, K), where d is what x was before any change; upper: of the Hessian of x.
    All of it, W drift H^-1, overfits (cf. GPTAQ, arXiv:2504.02692).
    """
    return _MADE_UP * (weight @ drift.to(weight.dtype)) @ (upper.T @ upper)
