"""Means of products of rows, such as a Hessian: summed so that they hardly depend on how the batches are spread over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_AT_ONCE = 512  # rows of the product, so that what is summed in float32 stays in a cache


class Products:
    """(2 / rows) * sum of l' r over pairs of rows l and r, (K,) each, given batch by batch.

    Products of a batch are summed in float32, and batches in float64: sums over several processes differ from those of one by
    about 1e-16, and so their float32 mean in about one number of 10^8, by its last bit. Takes 8 * K * K bytes, and 4 * K * K
    once the mean has been read.
    """

    def __init__(self, features: int) -> None:
        self.rows, self._features = 0, features
        self._sum: Tensor | None = None
        self._mean: Tensor | None = None  # what was read of the sum, in its place

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add rows (T, K), float32."""
        # A power of two keeps the bits; with it, many rows overflow no sooner than one.
        scale = 2.0 ** -math.ceil(math.log2(max(len(left), 1)))
        right = right * scale
        for total, part in zip(self.sum.split(_AT_ONCE), left.T.split(_AT_ONCE), strict=True):
            total.add_(part @ right, alpha=2 / scale)
        self.rows += len(left)

    def merge(self, sums: Iterable[Tensor], rows: int) -> None:
        """Become the mean over ``rows`` rows of which these are the sums, float64 (K, K), added in their order."""
        total: Tensor | None = None
        for part in sums:
            total = part.clone() if total is None else total.add_(part)
        self._sum, self._mean, self.rows = total, None, rows

    @property
    def sum(self) -> Tensor:
        """2 * sum of l' r, float64 (K, K)."""
        if self._mean is not None:
            self._sum, self._mean = self._mean.double().mul_(self.rows), None
        elif self._sum is None:
            self._sum = torch.zeros(self._features, self._features, dtype=torch.float64)
        return self._sum

    @property
    def mean(self) -> Tensor:
        """float32 (K, K); it may be changed in place."""
        if self._mean is None:
            self._mean, self._sum = self.sum.div_(max(self.rows, 1)).float(), None
        return self._mean
