"""What was asked of nybble's variants, against what was measured: met or not met, never left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from .measure import Track, accuracy, speedup
from .sparse import name_of
from .variants import BF16, DEFAULT, DYNAMIC, FP32, VARIANTS, W8A8

# Held to the demands: as a user's one call gives it, and with every Linear swapped.
JUDGED = (DEFAULT, W8A8)
_RATIOS = {FP32: 2.5, BF16: 1.0, DYNAMIC: 0.95}
MEAN_COSINE = 0.998
# The best variant of that accuracy, against the best of these; and its linears alone, against those of one of them.
RIVALS = (FP32, BF16, DYNAMIC)
_BEST, _LINEARS = 1.3, 1.5


# Of half of the weights, the best that pruning without recovery gives.
JUDGED_SPARSE = name_of("50%", "sparsegpt")
_SPARSE_COSINE = 0.97


@dataclass(frozen=True)
class Check:
    """One demand. `measured` is None where a side of it could not run; `bound` is a speed ratio with free linears."""

    what: str
    at_least: float
    measured: float | None
    bound: float | None = None
    digits: int = 3

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured >= self.at_least

    def line(self) -> str:
        state = "met" if self.met else "not met" if self.measured is not None else "not run"
        value = "" if self.measured is None else f"{self.measured:.{self.digits}f}"
        text = f"  {state:8} {self.what:45} {value:>8}  (asked for: at least {self.at_least:g})"
        if self.bound is not None and not self.met:
            text += f"; were its linears free: {self.bound:.3g}"
        return text


def checks(tracks: Mapping[str, Track], name: str, linear_share: float) -> list[Check]:
    """Hold contestant `name`, whose linears take `linear_share` of its time, to what was asked."""
    found = []
    for baseline, least in _RATIOS.items():
        measured = speedup(tracks[name], tracks[baseline]) if baseline in tracks else None
        bound = None if measured is None else measured / (1 - linear_share)
        found.append(Check(f"speed against {baseline}", least, measured, bound))
    cosine = accuracy(tracks[name], tracks[FP32]).mean_cosine
    found.append(Check("mean cosine to torch fp32", MEAN_COSINE, cosine, digits=5))
    return found


def sparse_checks(tracks: Mapping[str, Track]) -> list[Check]:
    """Hold half of the weights, pruned by SparseGPT, to what was asked."""
    cosine = accuracy(tracks[JUDGED_SPARSE], tracks[FP32]).mean_cosine
    return [Check("mean cosine to torch fp32", _SPARSE_COSINE, cosine, digits=5)]


def best(tracks: Mapping[str, Track]) -> str | None:
    """The fastest of nybble's variants that are accurate enough; None where none is."""
    ours = [variant.name for variant in VARIANTS if variant.name not in RIVALS and variant.name in tracks]
    accurate = [name for name in ours if accuracy(tracks[name], tracks[FP32]).mean_cosine >= MEAN_COSINE]
    return max(accurate, key=lambda name: speedup(tracks[name], tracks[FP32]), default=None)


def linear_seconds(track: Track, linear_share: float, sentences: int) -> float:
    """What a sentence costs in linear layers: their share of the median time of a round of so many sentences."""
    return linear_share * median(track.batch_s) / sentences


def best_checks(
    tracks: Mapping[str, Track], name: str | None, shares: Mapping[str, Mapping[str, float]], sentences: int
) -> list[Check]:
    """Hold the best variant to the best rival, and its linears to quantize_dynamic's; a round has so many sentences."""
    what, of_linears = "speed against torch's best", "its linears against those of quantize_dynamic"
    if name is None:
        return [Check(what, _BEST, None), Check(of_linears, _LINEARS, None)]
    whole, rival = min((speedup(tracks[name], tracks[rival]), rival) for rival in RIVALS if rival in tracks)
    bound = whole / (1 - shares[name]["linears"])
    linears = None
    if DYNAMIC in tracks:
        ours, theirs = (linear_seconds(tracks[side], shares[side]["linears"], sentences) for side in (name, DYNAMIC))
        linears = theirs / ours
    return [
        Check(f"{what} ({rival.removeprefix('torch ')})", _BEST, whole, bound),
        Check(of_linears, _LINEARS, linears),
    ]
