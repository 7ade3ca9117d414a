"""Statistics of a layer's inputs for quantization and pruning: norms, Hessian, range, and held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from .observe import Observer
from .products import Products

# Every eighth row of all batches is held out, up to 256 in all: methods do not see them, and layers are evaluated on them.
_HELD_ONE_IN = 8
_HELD_MOST = 256
_HELD_WITHIN = _HELD_ONE_IN * _HELD_MOST  # the first rows, among which all those are
_OBSERVED = "observer."

NO_DATA = "no calibration data that is finite and not all zero reached the layer"


class Inputs:
    """Statistics of a layer's inputs, rows x (K,), gathered batch by batch.

    A batch with NaN or Inf is left out and counted in ``bad_batches``.

    Args:
        in_features: K.
        hessian: whether to gather the Hessian and, if there is one, the drift too, see ``Products``.
        observer: the kind of observer that finds their range, or None.
        offset: how many rows other processes have before these. None: not known before ``settle``; until then the rows
            that may be held out are kept.
    """

    def __init__(
        self, in_features: int, hessian: bool = False, observer: str | None = None, offset: int | None = 0
    ) -> None:
        self.observer = None if observer is None else Observer(observer)
        self.rows = self.bad_batches = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64)
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64)
        self._largest = torch.zeros(in_features)
        self._hessian = Products(in_features) if hessian else None
        self._drift: Products | None = None
        self._held: list[Tensor] = []
        self.added, self._offset = 0, offset  # rows of finite batches, held out or not
        self._early: list[tuple[int, Tensor, Tensor | None]] = []
        self._sample = torch.empty(0, in_features)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add rows (T, K) of any float dtype, converted to float32; dense: the same rows in the original model."""
        if not (torch.isfinite(x).all() and (dense is None or torch.isfinite(dense).all())):
            self.bad_batches += 1
            return
        at, x = self.added, x.detach().float()
        self.added += len(x)
        if self._offset is None and at < _HELD_WITHIN:
            self._early.append((at, x, dense))
        else:
            self._count(at + (self._offset or 0), x, dense)

    def settle(self, offset: int) -> None:
        """Count the rows that were kept, now that the number of rows before these is known."""
        early, self._early, self._offset = self._early, [], offset
        if early:
            self._sample = self._sample[:0]  # taken from the first rows
        for at, x, dense in early:
            self._count(at + offset, x, dense)

    def _count(self, at: int, x: Tensor, dense: Tensor | None) -> None:
        """Count rows, the first of which is row ``at`` of all: across batches, so that short ones hold rows out too."""
        place = torch.arange(at, at + len(x))
        is_held = (place % _HELD_ONE_IN == _HELD_ONE_IN - 1) & (place < _HELD_WITHIN)
        if is_held.any():
            self._held.append(x[is_held])
        seen = ~is_held
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
            self._hessian.add(x, x)
            if dense is not None:
                self._drift = Products(x.shape[1]) if self._drift is None else self._drift
                self._drift.add(dense.detach().float()[seen] - x, x)
        self.rows += len(x)

    def tensors(self) -> dict[str, Tensor]:
        """All but the Hessian and the drift, for ``merge``."""
        drift_rows = 0 if self._drift is None else self._drift.rows
        return {
            "numbers": torch.tensor([self.rows, self.bad_batches, self.added, drift_rows]),
            "squares": self._squares,
            "magnitudes": self._magnitudes,
            "largest": self._largest,
            "held": torch.cat([self._sample[:0], *self._held]),
            "sample": self._sample,
            **({} if self.observer is None else {_OBSERVED + k: one for k, one in self.observer.tensors().items()}),
        }

    def merge(self, parts: Sequence[Mapping[str, Tensor]], sums: Callable[[Products | None], Iterable[Tensor]]) -> None:
        """Become the statistics of several processes, given ``tensors()`` of each in the order of their rows.

        sums: gives the ``Products.sum`` of those processes that have one, in their order, given this one's.
        """
        numbers = torch.stack([part["numbers"] for part in parts]).sum(0).tolist()
        self.rows, self.bad_batches, self.added, drift_rows = numbers
        if self._hessian is not None:
            self._hessian.merge(sums(self._hessian), self.rows)
        if drift_rows:
            own, self._drift = self._drift, Products(len(self._squares))
            self._drift.merge(sums(own), drift_rows)
        self._squares, self._magnitudes = (
            reduce(torch.add, [part[name] for part in parts]) for name in ("squares", "magnitudes")
        )
        self._largest = torch.stack([part["largest"] for part in parts]).amax(0)
        self._held = [part["held"] for part in parts if len(part["held"])]
        self._sample = next((part["sample"] for part in parts if len(part["sample"])), self._sample)
        if self.observer is not None:
            self.observer = Observer(self.observer.kind)
            for part in parts:
                seen = {k.removeprefix(_OBSERVED): one for k, one in part.items() if k.startswith(_OBSERVED)}
                self.observer.merge(**seen)

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
                mean.mean.div_(s).div_(s[:, None])

    @property
    def hessian(self) -> Tensor | None:
        """(2 / rows) * sum of x x', float32 (K, K); None if not gathered."""
        return None if self._hessian is None else self._hessian.mean

    @property
    def drift(self) -> Tensor | None:
        """The mean of 2 (d - x) x', float32 (K, K), over rows that have such a d in the original model; None without them."""
        return None if self._drift is None else self._drift.mean

    @property
    def held_out(self) -> Tensor:
        """Rows (T, K) that the statistics do not include; ``sample`` if there were fewer than eight rows in all."""
        return torch.cat(self._held) if self._held else self._sample
