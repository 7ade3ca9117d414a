"""A measured speed with its interval, the mean of several, and the product of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Time of one layer over that of another: the median ratio of all pairs, its interval, and the number of pairs."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def is_faster(self) -> bool:
        """Whether the whole interval is above 1."""
        return self.low > 1

    @property
    def is_slower(self) -> bool:
        """Whether the whole interval is below 1."""
        return self.high < 1

    @property
    def verdict(self) -> str:
        """In words."""
        return "faster" if self.is_faster else "slower" if self.is_slower else "no difference"

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def product(one: Speed, other: Speed) -> Speed:
    """The speed over a of c, from those of b over a and of c over b, whose errors are independent."""
    ratio = one.ratio * other.ratio
    below, above = (
        math.hypot(math.log(one.ratio / one_end), math.log(other.ratio / other_end))
        for one_end, other_end in ((one.low, other.low), (one.high, other.high))
    )
    return Speed(ratio, ratio * math.exp(-below), ratio * math.exp(above), min(one.pairs, other.pairs))


def mean_speed(speeds: Sequence[Speed]) -> Speed:
    """The geometric mean, with the sum of pairs. Raises ValueError if there are none.

    Its interval reaches as far as the root of the sum of squares of the single ones: errors of separate measurements
    are independent (G. Y. Zou, A. Donner, Construction of confidence limits about effect measures, Stat. Med. 27, 2008).
    """
    if not speeds:
        raise ValueError("mean_speed: speeds must not be empty")
    # Not statistics.fmean: the import of decimal, which comes with it, takes longer than most of nybble's.
    middle = math.fsum(math.log(one.ratio) for one in speeds) / len(speeds)
    below, above = (
        math.hypot(*(math.log(one.ratio / end) for one, end in zip(speeds, ends, strict=True))) / len(speeds)
        for ends in ([one.low for one in speeds], [one.high for one in speeds])
    )
    return Speed(math.exp(middle), math.exp(middle - below), math.exp(middle + above), sum(one.pairs for one in speeds))
