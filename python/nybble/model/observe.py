"""Observers: the range of a layer's inputs in calibration, for static activations.

* minmax: the extremes, as in Krishnamoorthi, arXiv:1806.08342, 3.1.
* percentile: the range without the outer 0.05 % of values at either end (Wu et al., arXiv:2004.09602, 5.2).
* mse: the range with the least squared rounding error (Nagel et al., arXiv:2106.08295, 3.1). Values inside have a mean
  squared error of step^2 / 12, clipped ones their squared distance to the range; 0 is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PERCENTILE = 99.9
BINS = 8192  # half of them for each sign
_AT_ONCE = 1 << 20  # values per chunk
# Ends tried on each side in a coarse search; around the best one, all bins are tried.
_COARSE = 256


class Histogram:
    """Counts of values in equal bins from -2^exponent to 2^exponent; the exponent grows with the values.

    When it grows by one, pairs of bins merge, so the counts do not depend on the order of the values.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.zeros = 0
        self._exponent: int | None = None

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(2.0, self._exponent or 0) / BINS

    def add(self, x: Tensor) -> None:
        """Count finite values, float32."""
        for part in x.flatten().split(_AT_ONCE):
            largest = part.abs().max().item()
            self.zeros += int((part == 0).sum())
            if largest == 0:
                continue
            self._grow(math.frexp(largest)[1])
            at = (part[part != 0].double() / self.width).floor_().long() + BINS // 2
            self.counts += torch.bincount(at, minlength=BINS)

    def _grow(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent
        for _ in range(min(exponent - self._exponent, BINS.bit_length())):
            middle = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(middle, (BINS // 4, BINS // 4))
        self._exponent = max(exponent, self._exponent)

    def merge(self, other: Histogram) -> None:
        """Count the values of another histogram too, whose bins may merge."""
        if other._exponent is not None:
            self._grow(other._exponent)
            other._grow(self._exponent or 0)
        self.counts += other.counts
        self.zeros += other.zeros

    def tensors(self) -> dict[str, Tensor]:
        """All counts as tensors."""
        return {"counts": self.counts, "zeros": torch.tensor(self.zeros), "exponent": torch.tensor(self._exponent or 0)}

    @classmethod
    def of_tensors(cls, counts: Tensor, zeros: Tensor, exponent: Tensor) -> Histogram:
        """The inverse of ``tensors``."""
        new = cls()
        new.counts, new.zeros = counts, int(zeros)
        new._exponent = int(exponent) if counts.any() else None
        return new

    def tail(self, positive: bool) -> Tensor:
        """The counts of one sign, outwards from 0."""
        return self.counts[BINS // 2 :] if positive else self.counts[: BINS // 2].flip(0)


class Observer:
    """Finds the range of rows (T, K); it always includes 0.

    Args:
        kind: one of OBSERVERS.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self._find = kind, OBSERVERS[kind]
        self.low = self.high = 0.0
        self.histogram = Histogram()

    def add(self, x: Tensor) -> None:
        """Count finite rows, float32."""
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        if self._find is not _extremes:
            self.histogram.add(x)

    def merge(self, ends: Tensor, **histogram: Tensor) -> None:
        """Count the rows that another observer of this kind has seen, given its ``tensors()``."""
        low, high = ends.tolist()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.histogram.merge(Histogram.of_tensors(**histogram))

    def tensors(self) -> dict[str, Tensor]:
        """All that it has counted as tensors."""
        return {"ends": torch.tensor([self.low, self.high], dtype=torch.float64), **self.histogram.tensors()}

    def range(self, steps: int) -> tuple[float, float]:
        """The lower and the upper end, `steps` codes apart; both 0 if all values were 0."""
        return self._find(self, steps)


def _extremes(seen: Observer, steps: int) -> tuple[float, float]:
    return seen.low, seen.high


def _percentile(seen: Observer, steps: int) -> tuple[float, float]:
    """The narrowest range of whole bins with at most 0.05 % of the values outside on each side."""
    histogram = seen.histogram
    total = int(histogram.counts.sum()) + histogram.zeros
    allowed = total * (100 - PERCENTILE) / 200

    def end(positive: bool) -> float:
        outside = histogram.tail(positive).flip(0).cumsum(0).flip(0)  # values in each bin and beyond
        return int((outside > allowed).sum()) * histogram.width

    return max(seen.low, -end(positive=False)), min(seen.high, end(positive=True))


def _least_error(seen: Observer, steps: int) -> tuple[float, float]:
    sides = [_Side(seen.histogram, positive, limit) for positive, limit in ((False, -seen.low), (True, seen.high))]
    chosen = [torch.arange(0, len(side.ends), max(1, len(side.ends) // _COARSE)) for side in sides]
    # The full range is always a candidate.
    chosen = [torch.cat([some, torch.tensor([len(side.ends) - 1])]) for some, side in zip(chosen, sides, strict=True)]
    nonzero = int(seen.histogram.counts.sum())
    best = _best(sides, chosen, nonzero, steps)
    around = [
        torch.arange(max(0, at - reach), min(len(side.ends), at + reach + 1))
        for side, at, reach in ((side, at, 1 + len(side.ends) // _COARSE) for side, at in zip(sides, best, strict=True))
    ]
    low, high = (side.ends[at].item() for side, at in zip(sides, _best(sides, around, nonzero, steps), strict=True))
    return -low, high


class _Side:
    """The candidate ends of one sign, all (E,).

    ends: distances from 0. outside: the number of values beyond each end. excess: the sum of their squared distances to it.
    """

    def __init__(self, histogram: Histogram, positive: bool, limit: float) -> None:
        counts, width = histogram.tail(positive).double(), histogram.width
        middles = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * width

        def beyond(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values.flip(0).cumsum(0).flip(0), (0, 1))

        ends = torch.arange(len(counts) + 1, dtype=torch.float64) * width
        outside, sums, squares = beyond(counts), beyond(counts * middles), beyond(counts * middles.square())
        excess = (squares - 2 * ends * sums + ends.square() * outside).clamp(min=0)
        inner = ends < limit
        self.ends = torch.cat([ends[inner], torch.tensor([limit], dtype=torch.float64)])
        self.outside, self.excess = (torch.nn.functional.pad(values[inner], (0, 1)) for values in (outside, excess))


def _best(sides: list[_Side], chosen: list[Tensor], nonzero: int, steps: int) -> tuple[int, int]:
    """The indices of the lower and upper end, among the chosen candidates, with the least squared error."""
    low, high = (side.ends[some] for side, some in zip(sides, chosen, strict=True))
    out_low, out_high = (side.outside[some] for side, some in zip(sides, chosen, strict=True))
    cut_low, cut_high = (side.excess[some] for side, some in zip(sides, chosen, strict=True))
    step = (low[:, None] + high) / steps
    error = step.square() / 12 * (nonzero - out_low[:, None] - out_high) + cut_low[:, None] + cut_high
    row, column = divmod(int(error.argmin()), len(high))
    return int(chosen[0][row]), int(chosen[1][column])


OBSERVERS = {"minmax": _extremes, "percentile": _percentile, "mse": _least_error}
