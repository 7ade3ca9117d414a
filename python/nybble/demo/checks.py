"""Targets for nybble's variants, and whether the measurements meet them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from .measure import Track, accuracy, speedup
from .sparse import name_of
from .variants import BF16, DEFAULT, DYNAMIC, FP32, VARIANTS, W8A8

# The variants with targets: a plain call of nybble.quantize, and every Linear replaced.
CHECKED = (DEFAULT, W8A8)
_RATIOS = {FP32: 2.5, BF16: 1.0, DYNAMIC: 0.95}
MEAN_COSINE = 0.998
# The fastest variant of that accuracy is compared with the fastest of these, and its linear layers with those of DYNAMIC.
PEERS = (FP32, BF16, DYNAMIC)
_BEST, _LINEARS = 1.3, 1.5


# The most accurate way of pruning half of the weights without recovery.
CHECKED_SPARSE = name_of("50%", "sparsegpt")
_SPARSE_COSINE = 0.97


@dataclass(frozen=True)
class Check:
    """One target. `measured`: None if it could not be measured. `bound`: the speed ratio if linear layers took no time."""

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
        text = f"  {state:8} {self.what:45} {value:>8}  (target: at least {self.at_least:g})"
        if self.bound is not None and not self.met:
            text += f"; without its linears: {self.bound:.3g}"
        return text


def checks(tracks: Mapping[str, Track], name: str, linear_share: float) -> list[Check]:
    """The checks of contestant `name`, whose linear layers take `linear_share` of its time."""
    found = []
    for baseline, least in _RATIOS.items():
        measured = speedup(tracks[name], tracks[baseline]) if baseline in tracks else None
        bound = None if measured is None else measured / (1 - linear_share)
        found.append(Check(f"speed against {baseline}", least, measured, bound))
    cosine = accuracy(tracks[name], tracks[FP32]).mean_cosine
    found.append(Check("mean cosine to torch fp32", MEAN_COSINE, cosine, digits=5))
    return found


def sparse_checks(tracks: Mapping[str, Track]) -> list[Check]:
    """The check of the model with half of the weights pruned by SparseGPT."""
    cosine = accuracy(tracks[CHECKED_SPARSE], tracks[FP32]).mean_cosine
    return [Check("mean cosine to torch fp32", _SPARSE_COSINE, cosine, digits=5)]


def best(tracks: Mapping[str, Track]) -> str | None:
    """The fastest of nybble's variants with a mean cosine of at least MEAN_COSINE; None if there is none."""
    ours = [variant.name for variant in VARIANTS if variant.name.startswith("nybble") and variant.name in tracks]
    accurate = [name for name in ours if accuracy(tracks[name], tracks[FP32]).mean_cosine >= MEAN_COSINE]
    return max(accurate, key=lambda name: speedup(tracks[name], tracks[FP32]), default=None)


def linear_seconds(track: Track, linear_share: float, sentences: int) -> float:
    """Seconds per sentence in linear layers: their share of the median time of a round with this many sentences."""
    return linear_share * median(track.batch_s) / sentences


def best_checks(
    tracks: Mapping[str, Track], name: str | None, shares: Mapping[str, Mapping[str, float]], sentences: int
) -> list[Check]:
    """The checks of the best variant against the fastest peer, and of its linear layers against quantize_dynamic's.

    sentences: in one round.
    """
    what, of_linears = "speed against torch's best", "its linears against those of quantize_dynamic"
    if name is None:
        return [Check(what, _BEST, None), Check(of_linears, _LINEARS, None)]
    whole, peer = min((speedup(tracks[name], tracks[peer]), peer) for peer in PEERS if peer in tracks)
    bound = whole / (1 - shares[name]["linears"])
    linears = None
    if DYNAMIC in tracks:
        ours, theirs = (linear_seconds(tracks[side], shares[side]["linears"], sentences) for side in (name, DYNAMIC))
        linears = theirs / ours
    return [
        Check(f"{what} ({peer.removeprefix('torch ')})", _BEST, whole, bound),
        Check(of_linears, _LINEARS, linears),
    ]
