"""What pruning needs to know of a layer's inputs: their norms, their Hessian, and some that are kept for judging."""

from __future__ import annotations

import torch
from torch import Tensor

# One row in so many is held out, to judge the layer by inputs that its pruning did not see; so many in all.
_HELD_ONE_IN = 8
_HELD_MOST = 256


class Inputs:
    """Statistics of the rows x (K,) that a layer multiplies, a batch at a time.

    Args:
        in_features: K.
        hessian: whether to gather the Hessian, and the drift where there is one, as well: 4 * K * K bytes each.

    A batch with NaN or Inf is left out and counted in ``bad_batches``.
    """

    def __init__(self, in_features: int, hessian: bool = False) -> None:
        self.rows = self.bad_batches = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64)
        self._hessian = torch.zeros(in_features, in_features) if hessian else None
        self._drift: Tensor | None = None
        self._held: list[Tensor] = []
        self._held_rows = 0
        self._sample = torch.empty(0, in_features)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Count rows (T, K) of any float dtype, in float32; dense: the same rows in the model before it was pruned."""
        if not (torch.isfinite(x).all() and (dense is None or torch.isfinite(dense).all())):
            self.bad_batches += 1
            return
        x = x.detach().float()
        held = torch.arange(len(x))[_HELD_ONE_IN - 1 :: _HELD_ONE_IN][: _HELD_MOST - self._held_rows]
        if len(held):
            self._held.append(x[held])
            self._held_rows += len(held)
        seen = torch.ones(len(x), dtype=torch.bool).index_fill_(0, held, False)
        x = x[seen]
        if not len(x):
            return
        if not len(self._sample):
            self._sample = x[:_HELD_MOST].clone()
        self._squares += x.double().square().sum(0)
        if self._hessian is not None:
            self._mean_in(self._hessian, x, x)
            if dense is not None:
                self._drift = torch.zeros_like(self._hessian) if self._drift is None else self._drift
                self._mean_in(self._drift, dense.detach().float()[seen] - x, x)
        self.rows += len(x)

    def _mean_in(self, mean: Tensor, left: Tensor, right: Tensor) -> None:
        # The running mean of 2 x x' never grows with the number of rows, so that no sum can overflow.
        total = self.rows + len(left)
        mean.mul_(self.rows / total).addmm_(left.T, right, alpha=2 / total)

    @property
    def norms(self) -> Tensor:
        """The 2-norm of each input over all rows, float64 (K,)."""
        return self._squares.sqrt()

    @property
    def hessian(self) -> Tensor | None:
        """(2 / rows) * sum of x x', float32 (K, K); None where it was not asked for."""
        return self._hessian

    @property
    def drift(self) -> Tensor | None:
        """(2 / rows) * sum of (d - x) x', float32 (K, K), for the rows d of the dense model; None without them."""
        return self._drift

    @property
    def held_out(self) -> Tensor:
        """Rows (T, K) that are in none of the statistics; rows that are in them where there were too few."""
        return torch.cat(self._held) if self._held else self._sample
