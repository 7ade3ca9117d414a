"""Hadamard matrices: entries of 1 and -1, and rows that are orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor

# Primes whose quadratic residues make a matrix of Paley's first kind (of order q + 1), or of his second (2 (q + 1)).
_FIRST = {q + 1: q for q in (11, 19, 43, 59, 107, 139)}
_SECOND = {2 * (q + 1): q for q in (13, 17, 37, 53)}
# Orders of the base; with 1, 2, 4, ... times as many rows by Sylvester's doubling.
ORDERS = (1, *sorted({*_FIRST, *_SECOND}))


def base_of(n: int) -> int | None:
    """The order K of a base with n = K * 2^m, or None where there is none."""
    return next((k for k in ORDERS if n % k == 0 and (n // k).bit_count() == 1), None)


def base(order: int) -> Tensor:
    """The Hadamard matrix (K, K) of an order in ``ORDERS``, float64: H H' = K I."""
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
    """Entry (i, j) is 1 where i - j is a square mod q, -1 where it is none, 0 on the diagonal."""
    squares = {x * x % q for x in range(1, q)}
    kinds = torch.tensor([0, *(1 if x in squares else -1 for x in range(1, q))], dtype=torch.float64)
    return kinds[(torch.arange(q)[:, None] - torch.arange(q)) % q]


def transform(x: Tensor) -> Tensor:
    """x H / sqrt(n) over the last dimension (..., n), in float64, by additions but for the base.

    H is Sylvester's doubling, log2(n / K) times, of the base. Raises ValueError where there is no H of order n.
    """
    n = x.shape[-1]
    order = base_of(n)
    if order is None:
        raise ValueError(f"x: no Hadamard matrix of order {n} is known here")
    y = x.double().unflatten(-1, (-1, order)) @ base(order)
    width = 1
    while width < n // order:
        pairs = y.reshape(*x.shape[:-1], -1, 2, width, order)
        y = torch.stack((pairs.select(-3, 0) + pairs.select(-3, 1), pairs.select(-3, 0) - pairs.select(-3, 1)), -3)
        width *= 2
    turned: Tensor = y.reshape(x.shape) / n**0.5
    return turned
