"""What a method needs to know of a layer's inputs: their norms, their Hessian, and some that are kept for judging."""

from __future__ import annotations

import torch
from torch import Tensor

from .observe import Observer

# One row in so many is held out, to judge the layer by inputs that its method did not see; so many in all.
_HELD_ONE_IN = 8
_HELD_MOST = 256

NO_DATA = "no calibration data that is finite and not 0 reached it"


class Inputs:
    """Statistics of the rows x (K,) that a layer multiplies, a batch at a time.

    Args:
        in_features: K.
        hessian: whether to gather the Hessian, and the drift where there is one, as well: 4 * K * K bytes each.
        observer: the kind of observer that looks for their range, or None.

    A batch with NaN or Inf is left out and counted in ``bad_batches``.
    """

    def __init__(self, in_features: int, hessian: bool = False, observer: str | None = None) -> None:
        self.observer = None if observer is None else Observer(observer)
        self.rows = self.bad_batches = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64)
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64)
        self._largest = torch.zeros(in_features)
        self._hessian = torch.zeros(in_features, in_features) if hessian else None
        self._drift: Tensor | None = None
        self._held: list[Tensor] = []
        self._held_rows = 0
        self._sample = torch.empty(0, in_features)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Count rows (T, K) of any float dtype, in float32; dense: the same rows in the model before any change."""
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
        if self.observer is not None:
            self.observer.add(x)
        if not len(self._sample):
            self._sample = x[:_HELD_MOST].clone()
        self._squares += x.double().square().sum(0)
        self._magnitudes += x.abs().sum(0, dtype=torch.float64)
        self._largest = torch.maximum(self._largest, x.abs().amax(0))
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
    def is_usable(self) -> bool:
        """Whether there are rows, finite in float32, and not all 0."""
        return bool(torch.isfinite(self.norms.float()).all()) and bool(self.norms.any())

    def notes(self) -> list[str]:
        """What of the data the report should say."""
        return [f"{self.bad_batches} batches with NaN or Inf left out"] if self.bad_batches else []

    @property
    def norms(self) -> Tensor:
        """The 2-norm of each input over all rows, float64 (K,)."""
        return self._squares.sqrt()

    @property
    def mean_magnitudes(self) -> Tensor:
        """The mean of the absolute value of each input, float64 (K,)."""
        return self._magnitudes / max(self.rows, 1)

    @property
    def largest(self) -> Tensor:
        """The largest absolute value of each input, float32 (K,)."""
        return self._largest

    @property
    def sample(self) -> Tensor:
        """Some of the rows (T, K) that are in the statistics."""
        return self._sample

    def divide(self, scale: Tensor) -> None:
        """Make these the statistics of inputs that are divided by a positive scale (K,), but for the observer's: dropped."""
        s = scale.float()
        self.observer = None
        self._squares /= s.double().square()
        self._magnitudes /= s.double()
        self._largest = self._largest / s
        self._held = [x / s for x in self._held]
        self._sample = self._sample / s
        for mean in (self._hessian, self._drift):
            if mean is not None:
                mean.div_(s).div_(s[:, None])

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
