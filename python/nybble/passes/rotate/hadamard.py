"""Hadamard matrices, with entries 1 and -1 and orthogonal rows, and the fast transform by them."""

from __future__ import annotations

import torch
from torch import Tensor

# Order -> prime q of Paley's construction I (order q + 1) and II (order 2 (q + 1)), from quadratic residues mod q.
_FIRST = {q + 1: q for q in (11, 19, 43, 59, 107, 139)}
_SECOND = {2 * (q + 1): q for q in (13, 17, 37, 53)}
# Orders of the base matrices; Sylvester's construction doubles them any number of times.
ORDERS = (1, *sorted({*_FIRST, *_SECOND}))


def base_of(n: int) -> int | None:
    """The order K of a base matrix with n = K * 2^m, or None if there is none."""
    return next((k for k in ORDERS if n % k == 0 and (n // k).bit_count() == 1), None)


def base(order: int) -> Tensor:
    """The base Hadamard matrix H (K, K) of an order in ``ORDERS``, float64: H H' = K I."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order in _FIRST:
        q = _FIRST[order]
        skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
        return skew + torch.eye(q + 1, dtype=torch.float64)
    q = _SECOND[order]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    one = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    other = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)


def _jacobsthal(q: int) -> Tensor:
    """The Jacobsthal matrix (q, q): 1 where i - j is a square mod q, -1 where it is not, 0 on the diagonal."""
    squares = {x * x % q for x in range(1, q)}
    kinds = torch.tensor([0, *(1 if x in squares else -1 for x in range(1, q))], dtype=torch.float64)
    return kinds[(torch.arange(q)[:, None] - torch.arange(q)) % q]


def transform(x: Tensor) -> Tensor:
    """x H / sqrt(n) over the last dimension of x (..., n), in float64, by a fast Hadamard transform.

    H is the base matrix of order K, doubled log2(n / K) times. Raises ValueError if no H of order n is known.
    """
    n = x.shape[-1]
    order = base_of(n)
    if order is None:
        raise ValueError(f"x has a last dimension of {n}: no Hadamard matrix of this order is implemented")
    y = x.double().unflatten(-1, (-1, order)) @ base(order)
    width = 1
    while width < n // order:
        pairs = y.reshape(*x.shape[:-1], -1, 2, width, order)
        y = torch.stack((pairs.select(-3, 0) + pairs.select(-3, 1), pairs.select(-3, 0) - pairs.select(-3, 1)), -3)
        width *= 2
    turned: Tensor = y.reshape(x.shape) / n**0.5
    return turned
