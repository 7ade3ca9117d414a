"""Statistics of a layer's inputs: counted in calibration, counted again in production, and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 64
_PER_OCTAVE = 2
_BELOW = 48  # bins below 2^anchor; the others are above it

# Ratios of mean squares. A channel is a new outlier if it has grown by more than _GROWN and has at least _NEAR_TOP times
# the mean square of the smallest of calibration's largest channels.
_GROWN, _NEAR_TOP = 9.0, 0.25


class Tally:
    """Counts over finite rows (T, K) of a layer's inputs; no row is kept.

    histogram: of log2 |x|, in half-octave bins around 2^anchor; the outer bins are open, and 0 is in the first.
    beyond: the number of values above ``limit``.
    """

    def __init__(self, features: int, anchor: int, limit: float = math.inf) -> None:
        self.anchor, self._limit = anchor, limit
        self.rows = self.beyond = 0
        self.amax = 0.0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.sums = torch.zeros(features, dtype=torch.float64)
        self.squares = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, amax: float) -> None:
        """Count finite rows (T, K), float32; amax: their largest magnitude."""
        magnitude = x.abs()
        if amax > self._limit:
            self.beyond += int((magnitude > self._limit).sum())
        bins = magnitude.log2_().mul_(_PER_OCTAVE).floor_().add_(_BELOW - _PER_OCTAVE * self.anchor).clamp_(0, BINS - 1)
        self.histogram += torch.bincount(bins.flatten().long(), minlength=BINS)
        self.sums += x.sum(0)
        self.squares += x.square().sum(0)
        self.amax = max(self.amax, amax)
        self.rows += len(x)

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally with the same anchor."""
        self.histogram += other.histogram
        self.sums += other.sums
        self.squares += other.squares
        self.amax = max(self.amax, other.amax)
        self.rows += other.rows

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each channel, float64 (K,)."""
        return self.squares / max(self.rows, 1)


def anchor_of(amax: float) -> int:
    """The anchor (an exponent of 2) of a histogram of values up to amax."""
    return math.ceil(math.log2(amax)) if 0 < amax < math.inf else 0


@dataclass(frozen=True)
class Statistics:
    """Statistics of a layer's inputs in calibration.

    amax: the largest magnitude. window_amax: the mean over windows of the largest magnitude of each. mean, variance: of
    each channel, float64 (K,). histogram: int64 (BINS,), see Tally.
    """

    anchor: int
    rows: int
    amax: float
    window_amax: float
    histogram: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, windows: list[Tally]) -> Statistics:
        """The statistics of calibration windows, at least one of which has a row."""
        total = Tally(len(windows[0].sums), windows[0].anchor)
        for window in windows:
            total.merge(window)
        mean = total.sums / total.rows
        return cls(
            anchor=total.anchor,
            rows=total.rows,
            amax=total.amax,
            window_amax=sum(window.amax for window in windows) / len(windows),
            histogram=total.histogram,
            mean=mean,
            variance=(total.mean_square - mean.square()).clamp(min=0),
        )

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each channel, float64 (K,)."""
        return self.variance + self.mean.square()

    def quantile(self, share: float = 0.999) -> float:
        """The quantile of the magnitudes, rounded up to the edge of its half-octave bin."""
        reached = self.histogram.cumsum(0) >= share * self.histogram.sum()
        bins = int(reached.int().argmax()) + 1 - _BELOW
        return min(self.amax, math.pow(2, self.anchor + bins / _PER_OCTAVE))

    @staticmethod
    def specs(features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of ``tensors``."""
        return {
            "scalars": ((4,), torch.float64),
            "histogram": ((BINS,), torch.int64),
            "channels": ((2, features), torch.float64),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The statistics as tensors, for a file."""
        scalars = torch.tensor([self.anchor, self.rows, self.amax, self.window_amax], dtype=torch.float64)
        return {"scalars": scalars, "histogram": self.histogram, "channels": torch.stack((self.mean, self.variance))}

    @classmethod
    def from_tensors(cls, scalars: Tensor, histogram: Tensor, channels: Tensor) -> Statistics:
        """The inverse of ``tensors``. Raises ValueError if the values are not valid statistics."""
        anchor, rows, amax, window_amax = scalars.tolist()
        finite = bool(torch.isfinite(scalars).all() and torch.isfinite(channels).all())
        if not (finite and rows >= 1 and amax >= window_amax >= 0 and abs(anchor) <= 1100):
            raise ValueError(f"scalars: {scalars.tolist()} are not valid statistics")
        if (histogram < 0).any() or not histogram.any() or (channels[1] < 0).any():
            raise ValueError("histogram, channels: counts and variances must not be negative, and some count not zero")
        return cls(int(anchor), int(rows), amax, window_amax, histogram, *channels)


class Reading(NamedTuple):
    """One window compared with calibration.

    saturation: the share of values beyond the calibrated range. amax_ratio: the moving average of the windows' largest
    magnitudes over that of calibration. scale: the median over channels of the ratio of their root mean squares. psi:
    the population stability index of the histograms. overlap: the share of calibration's largest channels that are among
    the largest now. new_channels: new outlier channels, near calibration's largest ones and at least three times their
    own calibrated size.
    """

    saturation: float
    amax_ratio: float
    scale: float
    psi: float
    overlap: float
    new_channels: tuple[int, ...]


def psi(found: Tensor, wanted: Tensor) -> float:
    """Population stability index, sum (p - q) ln(p / q), of two histograms; half a count is added to every bin."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (found.double(), wanted.double()))
    return float(((p - q) * (p / q).log()).sum())


def compare(window: Tally, calibrated: Statistics, amax: float) -> Reading:
    """The reading of a window; amax: the moving average of the windows' largest magnitudes, including this one."""
    now, before = window.mean_square, calibrated.mean_square
    top = max(1, min(8, len(now) // 16))
    largest, largest_before = now.topk(top), before.topk(top)
    kept = torch.isin(largest.indices, largest_before.indices).double().mean().item()
    grown = (now > _GROWN * before) & (now >= _NEAR_TOP * largest_before.values[-1])
    ratio = (now / before)[before > 0]
    reference = calibrated.window_amax
    return Reading(
        saturation=window.beyond / (window.rows * len(now)),
        amax_ratio=amax / reference if reference else (math.inf if amax else 1.0),
        scale=ratio.median().sqrt().item() if len(ratio) else 1.0,
        psi=psi(window.histogram, calibrated.histogram),
        overlap=kept,
        new_channels=tuple(grown.nonzero().flatten().tolist()),
    )
