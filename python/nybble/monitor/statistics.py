"""What a layer's inputs look like: counted in calibration, counted again in service, and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 64
_PER_OCTAVE = 2
_BELOW = 48  # bins under 2^anchor; the others are above it

# Mean squares: a new outlier channel has grown by more than this, and has at least this share of the least of the largest.
_GROWN, _NEAR_TOP = 9.0, 0.25


class Tally:
    """Counts of rows (T, K) of a layer's inputs; no row is kept.

    histogram: of log2 |x| in half octaves around 2^anchor, the outer bins being open; 0 is in the first. beyond: values
    above ``limit``. All are of finite rows; others are left to the caller.
    """

    def __init__(self, features: int, anchor: int, limit: float = math.inf) -> None:
        self.anchor, self._limit = anchor, limit
        self.rows = self.beyond = 0
        self.amax = 0.0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.sums = torch.zeros(features, dtype=torch.float64)
        self.squares = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, amax: float) -> None:
        """Count finite rows (T, K), float32, of which the largest magnitude is known."""
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
        """Count what another has counted, with the same anchor."""
        self.histogram += other.histogram
        self.sums += other.sums
        self.squares += other.squares
        self.amax = max(self.amax, other.amax)
        self.rows += other.rows

    @property
    def mean_square(self) -> Tensor:
        """Of each channel, float64 (K,)."""
        return self.squares / max(self.rows, 1)


def anchor_of(amax: float) -> int:
    """The power of two at which the histogram of values up to amax is centred."""
    return math.ceil(math.log2(amax)) if 0 < amax < math.inf else 0


@dataclass(frozen=True)
class Statistics:
    """A layer's inputs in calibration.

    amax: the largest magnitude; window_amax: the mean over windows of each one's largest. mean, variance: float64 (K,)
    of each channel. histogram: int64 (BINS,), see Tally.
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
        """The statistics of calibration windows, of which there is at least one with a row."""
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
        """Of each channel, float64 (K,)."""
        return self.variance + self.mean.square()

    def quantile(self, share: float = 0.999) -> float:
        """The magnitude below which this share of all values lies, to half an octave: the upper edge of its bin."""
        reached = self.histogram.cumsum(0) >= share * self.histogram.sum()
        bins = int(reached.int().argmax()) + 1 - _BELOW
        return min(self.amax, math.pow(2, self.anchor + bins / _PER_OCTAVE))

    @staticmethod
    def specs(features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of ``tensors``."""
        return {
            "scalars": ((4,), torch.float64),
            "histogram": ((BINS,), torch.int64),
            "channels": ((2, features), torch.float64),
        }

    def tensors(self) -> dict[str, Tensor]:
        """As tensors, for a file."""
        scalars = torch.tensor([self.anchor, self.rows, self.amax, self.window_amax], dtype=torch.float64)
        return {"scalars": scalars, "histogram": self.histogram, "channels": torch.stack((self.mean, self.variance))}

    @classmethod
    def from_tensors(cls, scalars: Tensor, histogram: Tensor, channels: Tensor) -> Statistics:
        """What ``tensors`` gave. Raises ValueError where that cannot be."""
        anchor, rows, amax, window_amax = scalars.tolist()
        finite = bool(torch.isfinite(scalars).all() and torch.isfinite(channels).all())
        if not (finite and rows >= 1 and amax >= window_amax >= 0 and abs(anchor) <= 1100):
            raise ValueError(f"scalars: {scalars.tolist()} are no statistics")
        if (histogram < 0).any() or not histogram.any() or (channels[1] < 0).any():
            raise ValueError("histogram, channels: have negative counts or variances")
        return cls(int(anchor), int(rows), amax, window_amax, histogram, *channels)


class Reading(NamedTuple):
    """A window of service against calibration.

    saturation: the share of values beyond the calibrated range. amax_ratio: the moving average of the windows' largest
    magnitudes, over that of calibration. scale: the median over channels of their root mean square, over that of
    calibration. psi: the population stability index of the histograms. overlap: the share of calibration's largest
    channels that are among the largest now. new_channels: those that come near the largest of calibration, with at
    least three times their own size there.
    """

    saturation: float
    amax_ratio: float
    scale: float
    psi: float
    overlap: float
    new_channels: tuple[int, ...]


def psi(found: Tensor, wanted: Tensor) -> float:
    """sum (p - q) ln(p / q) of two histograms; empty bins count half a value."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (found.double(), wanted.double()))
    return float(((p - q) * (p / q).log()).sum())


def compare(window: Tally, calibrated: Statistics, amax: float) -> Reading:
    """The reading of a window; amax: the moving average that includes it."""
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
