"""What was asked of w8a8, against what was measured: met or not met, never left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .measure import Track, accuracy, speedup
from .variants import BF16, DEFAULT, DYNAMIC, FP32, W8A8

# Held to the demands: as a user's one call gives it, and with every Linear swapped.
JUDGED = (DEFAULT, W8A8)
_RATIOS = {FP32: 2.5, BF16: 1.0, DYNAMIC: 0.95}
_MEAN_COSINE = 0.998


@dataclass(frozen=True)
class Check:
    """One demand. `measured` is None where the baseline could not run; `bound` is a speed ratio with free linears."""

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
        text = f"  {state:8} {self.what:37} {value:>8}  (asked for: at least {self.at_least:g})"
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
    found.append(Check("mean cosine to torch fp32", _MEAN_COSINE, cosine, digits=5))
    return found
