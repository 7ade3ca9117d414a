"""How much faster one function is than another on a noisy machine: paired times, and an interval of their median ratio.

A spike, a slow drift or a core that another process uses hits both calls of a pair, or few pairs. If the noise of both
functions has the same distribution, the logarithm of a pair's ratio lies symmetrically about its true value, and an
interval of its median needs no other assumption:

* from 11 pairs on, order statistics (the sign test's interval);
* below, the range of the logarithms, k = ERROR ** (-1 / (n - 1)) - 1 times as wide: it misses the centre of a symmetric
  unimodal distribution with a probability of at most ERROR (N. M. Blachman, R. E. Machol, Confidence intervals based on
  one or more observations, IEEE Trans. Inf. Theory 33, 1987).

The interval is looked at after every growth of the number of pairs by a quarter. ERROR is that of one look: in simulated
streams of two equally fast functions about 1 % of all decisions are "faster" or "slower".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, median
from typing import NamedTuple

from ..report.speed import Speed, mean_speed

ERROR = 1e-3
# What each measurement gets, even if the decision is clear: pairs, seconds, and more pairs that fit more seconds. Time
# slices of other processes are some milliseconds long and may hit one of the functions in several pairs in succession.
FEW, BRIEF_S = 5, 0.02
_MORE, _MORE_S = 25, 0.1
# No interval ends nearer to its median, since the order of the calls makes small differences, nor farther.
_NEAR, _FAR = math.log(1.01), math.log(1000)
_GROWTH = 0.25
# Shorter calls follow a call of the other function that is not timed, as in a model, where other layers run in between.
_WAKE_BELOW_S = 5e-3
_TICK_S = 1e-9
_Z = NormalDist().inv_cdf(1 - ERROR / 2)

Call = Callable[[], object]
Clock = Callable[[], float]


def speed_of(logs: Sequence[float]) -> Speed:
    """The speed that pairs with these logarithms of their ratios, at least one, tell."""
    ordered, count = sorted(logs), len(logs)
    middle = median(ordered)
    stretch = ERROR ** (-1 / (count - 1)) - 1 if count > 1 else math.inf
    if count == 1:
        low, high = middle - _FAR, middle + _FAR
    elif stretch > 1:
        centre, reach = (ordered[0] + ordered[-1]) / 2, stretch * (ordered[-1] - ordered[0]) / 2
        low, high = centre - reach, centre + reach
    else:
        rank = max(0, math.floor((count - _Z * math.sqrt(count) - 1) / 2))
        low, high = ordered[rank], ordered[-1 - rank]
    low = min(max(low, middle - _FAR), middle - _NEAR)
    high = max(min(high, middle + _FAR), middle + _NEAR)
    return Speed(math.exp(middle), math.exp(low), math.exp(high), count)


@dataclass
class Pairs:
    """Paired times of two functions; the ratios are those of ``first`` over ``second``.

    ``firsts``: seconds of the first one. ``spent``: seconds of the pairs that count. ``cost``: those of the fastest pair.
    """

    first: Call
    second: Call
    clock: Clock = time.perf_counter
    logs: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    spent: float = 0.0
    cost: float = math.inf

    def start(self, limit: float) -> None:
        """Time one pair, after one that does not count, since it allocates, packs and plans.

        If that one alone takes ``limit`` seconds, it is the one that counts.
        """
        self.add(1, math.inf)
        if self.spent < limit:
            self.logs.clear()
            self.firsts.clear()
            self.spent = 0.0  # or a slow first call would count as time of measuring
            self.add(1, math.inf)

    def add(self, count: int, end: float) -> None:
        """Time this many pairs in turns, first second and second first; none begins at ``end`` or later."""
        now = self.clock()
        for _ in range(count):
            begin = now
            if begin >= end:
                break
            turned = len(self.logs) % 2 == 1
            one, other = (self.second, self.first) if turned else (self.first, self.second)
            if self.cost < _WAKE_BELOW_S:
                other()
            start = self.clock()
            one()
            between = self.clock()
            other()
            now = self.clock()
            times = [max(seconds, _TICK_S) for seconds in (between - start, now - between)]
            if turned:
                times.reverse()
            self.firsts.append(times[0])
            self.logs.append(math.log(times[0] / times[1]))
            self.spent += now - begin
            self.cost = min(self.cost, now - begin)

    @property
    def speed(self) -> Speed:
        """What the pairs tell so far."""
        return speed_of(self.logs)

    @property
    def is_brief(self) -> bool:
        """Whether it has fewer pairs, or less time, than each should get."""
        count = len(self.logs)
        return count < FEW or self.spent < BRIEF_S or (count < _MORE and self.spent < _MORE_S)

    def next_look(self) -> int:
        """How many pairs to add before the interval is looked at again."""
        return math.ceil(_GROWTH * len(self.logs))


class Limits(NamedTuple):
    """How long to measure.

    ``most``: seconds in all. ``patience``: seconds as long as the mean is not ``enough``.
    """

    most: float
    patience: float
    enough: Callable[[Speed], bool] = lambda mean: mean.is_faster or mean.is_slower


def decide(pairs: Mapping[int, Pairs], limits: Limits, clock: Clock = time.perf_counter) -> dict[int, Speed]:
    """The speed of each measurement, with pairs added until the interval of their mean excludes 1 or the time is spent.

    The next pairs go to the measurement with the widest interval. Each gets ``FEW`` pairs and ``BRIEF_S`` seconds before
    it ends, unless that takes more than ``limits.most`` seconds; each gets one pair even then.
    """
    begin = clock()
    for one in pairs.values():
        one.start(limits.most / len(pairs))
    speeds = {m: one.speed for m, one in pairs.items()}
    while True:
        spent = clock() - begin
        brief = [m for m, one in pairs.items() if one.is_brief]
        if not brief and (spent >= limits.patience or limits.enough(mean_speed(list(speeds.values())))):
            return speeds
        most = limits.most if brief else min(limits.patience, limits.most)
        left = [m for m in brief or pairs if spent + pairs[m].cost <= most]
        if not left:
            return speeds
        widest = max(left, key=lambda m: speeds[m].high / speeds[m].low)
        pairs[widest].add(pairs[widest].next_look(), begin + most)
        speeds[widest] = pairs[widest].speed
