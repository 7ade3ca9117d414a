"""Statistics of a layer's inputs for quantization and pruning: norms, Hessian, range, and held-out rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .observe import Observer

# Every eighth row of all batches is held out, up to 256 in all: methods do not see them, and layers are evaluated on them.
_HELD_ONE_IN = 8
_HELD_MOST = 256

NO_DATA = "no calibration data that is finite and not all zero reached the layer"


class Inputs:
    """Statistics of a layer's inputs, rows x (K,), gathered batch by batch.

    A batch with NaN or Inf is left out and counted in ``bad_batches``.

    Args:
        in_features: K.
        hessian: whether to gather the Hessian and, if there is one, the drift too: 4 * K * K bytes each.
        observer: the kind of observer that finds their range, or None.
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
        self._held_rows = self._added = 0
        self._sample = torch.empty(0, in_features)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add rows (T, K) of any float dtype, converted to float32; dense: the same rows in the original model."""
        if not (torch.isfinite(x).all() and (dense is None or torch.isfinite(dense).all())):
            self.bad_batches += 1
            return
        x = x.detach().float()
        # Counted across batches, so that those of fewer than eight rows hold rows out too.
        first = (_HELD_ONE_IN - 1 - self._added) % _HELD_ONE_IN
        held = torch.arange(len(x))[first::_HELD_ONE_IN][: _HELD_MOST - self._held_rows]
        self._added += len(x)
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
        # A running mean of 2 x x' does not grow with the number of rows, so it cannot overflow.
        total = self.rows + len(left)
        mean.mul_(self.rows / total).addmm_(left.T, right, alpha=2 / total)

    @property
    def is_usable(self) -> bool:
        """Whether the norms are finite in float32 and not all zero."""
        return bool(torch.isfinite(self.norms.float()).all()) and bool(self.norms.any())

    def notes(self) -> list[str]:
        """Remarks on the data for the report."""
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
        """Some of the rows (T, K) that the statistics include."""
        return self._sample

    def divide(self, scale: Tensor) -> None:
        """Turn these into the statistics of x / scale, for a positive scale (K,). Drops the observer."""
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
        """(2 / rows) * sum of x x', float32 (K, K); None if not gathered."""
        return self._hessian

    @property
    def drift(self) -> Tensor | None:
        """(2 / rows) * sum of (d - x) x', float32 (K, K), for the rows d of the original model; None without them."""
        return self._drift

    @property
    def held_out(self) -> Tensor:
        """Rows (T, K) that the statistics do not include; ``sample`` if there were fewer than eight rows in all."""
        return torch.cat(self._held) if self._held else self._sample
