"""The Cholesky factor of the inverse Hessian that GPTQ and SparseGPT need, and the damping that makes it exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_DAMPING = 0.01
# The share of the drift of its inputs that a layer compensates.
_DRIFT_SHARE = 0.25


class Factor(NamedTuple):
    """upper: U (K, K) with U'U = H^-1. hessian: the damped H. note: the damping, in words, if 0.01 was not enough."""

    upper: Tensor
    hessian: Tensor
    note: str | None


def factorize(hessian: Tensor) -> Factor | None:
    """Factor a Hessian (K, K), float32 or float64, with a diagonal that is not zero.

    Computes in float64 and returns the Hessian's dtype. Adds damping to the diagonal: first 0.01, 0.02, ... 1 times its
    mean, then 1e-6, 1e-5, ... 0.1 times its maximum, until the factorization succeeds. Returns None if the Hessian is
    not finite or no damping suffices.
    """
    if not torch.isfinite(hessian).all():
        return None
    exact = hessian.double()
    for added, note in _dampings(exact.diagonal()):
        damped = exact + added * torch.eye(len(exact), dtype=exact.dtype)
        upper = _upper(damped)
        if upper is not None:
            return Factor(upper.to(hessian.dtype), damped.to(hessian.dtype), note)
    return None


def _dampings(diagonal: Tensor) -> Iterator[tuple[float, str | None]]:
    mean, largest = diagonal.mean().item(), diagonal.max().item()
    yield _FIRST_DAMPING * mean, None
    for hundredths in range(2, 101):
        yield hundredths / 100 * mean, f"damping {hundredths / 100:.2f} instead of {_FIRST_DAMPING}"
    for power in range(6):
        share = 10.0 ** (power - 6)
        yield share * largest, f"damping {share:.0e} of the largest diagonal element of the Hessian"


def _upper(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed.item() or not torch.isfinite(upper).all() else upper


def fill_dead(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian with zeros on its diagonal replaced by the diagonal's mean, and the mask of these dead inputs."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if not dead.any():
        return hessian, dead
    filler = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    return hessian + torch.diag(dead * filler), dead


def drift_correction(weight: Tensor, drift: Tensor, upper: Tensor) -> Tensor:
    """The change of a weight (N, K) that compensates a quarter of the drift of its inputs: W drift H^-1 / 4.

    drift: (2 / rows) * sum of (d - x) x' (K, K), for inputs x and the inputs d of the original model. upper: the factor
    of the Hessian of x. The full correction overfits (cf. GPTAQ, arXiv:2504.02692).
    """
    return _DRIFT_SHARE * (weight @ drift.to(weight.dtype)) @ (upper.T @ upper)
