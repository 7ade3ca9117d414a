"""How much faster one function is than another on a noisy machine: paired times, and an interval of their median ratio.

A spike, a slow drift or a core that another process uses hits both calls of a pair, or few pairs. If the noise of both
functions has the same distribution, the logarithm of a pair's ratio lies symmetrically about its true value, and an
interval of its median needs no other assumption:

* from 11 pairs on, order statistics (the sign test's interval);
* below, the range of the logarithms, k = ERROR ** (-1 / (n - 1)) - 1 times as wide: it misses the centre of a symmetric
  unimodal distribution with a probability of at most ERROR (N. M. Blachman, R. E. Machol, Confidence intervals based on
  one or more observations, IEEE Trans. Inf. Theory 33, 1987).

Of slow calls (pairs of at least SLOW_S) there are few, but more is known: time slices of other processes are short
against them, and a process that holds a core all the time at most doubles a time. So their noise is assumed to be about
_NOISE, which weighs as much as _GUESSED more pairs, and 2 to 10 pairs give Student's interval with that prior: two
pairs that agree tell 2.4x from 1x, three 1.6x, five 1.3x.

The interval is looked at after every growth of the number of pairs by a quarter. ERROR is that of one look: in simulated
streams of two equally fast functions about 1 % of all decisions are "faster" or "slower".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, median
from typing import NamedTuple

from .report.speed import Speed, mean_speed

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
# Pairs that take as long are slow: the prior holds, the first one counts too, and a clear decision needs only _LEAST.
SLOW_S, _LEAST = 0.2, 2
_NOISE, _GUESSED = 0.16, 3
# Student's quantiles at 1 - ERROR / 2 for _LEAST pairs and more, with _GUESSED degrees of freedom more.
_STUDENT = (8.610, 6.869, 5.959, 5.408, 5.041, 4.781, 4.587, 4.437, 4.318)
# The first pair does not count if one of its calls takes as many times as long as in the second one.
_FIRST = math.log(1.5)
_Z = NormalDist().inv_cdf(1 - ERROR / 2)

Call = Callable[[], object]
Clock = Callable[[], float]


def speed_of(logs: Sequence[float], is_slow: bool = False) -> Speed:
    """The speed that pairs with these logarithms of their ratios, at least one, tell."""
    ordered, count = sorted(logs), len(logs)
    middle = median(ordered)
    stretch = ERROR ** (-1 / (count - 1)) - 1 if count > 1 else math.inf
    if count == 1:
        low, high = middle - _FAR, middle + _FAR
    elif is_slow and count < _LEAST + len(_STUDENT):
        low, high = _with_prior(logs)
    elif stretch > 1:
        centre, reach = (ordered[0] + ordered[-1]) / 2, stretch * (ordered[-1] - ordered[0]) / 2
        low, high = centre - reach, centre + reach
    else:
        rank = max(0, math.floor((count - _Z * math.sqrt(count) - 1) / 2))
        low, high = ordered[rank], ordered[-1 - rank]
    low = min(max(low, middle - _FAR), middle - _NEAR)
    high = max(min(high, middle + _FAR), middle + _NEAR)
    return Speed(math.exp(middle), math.exp(low), math.exp(high), count)


def _with_prior(logs: Sequence[float]) -> tuple[float, float]:
    count, mean = len(logs), fmean(logs)
    squares = _GUESSED * _NOISE**2 + math.fsum((one - mean) ** 2 for one in logs)
    reach = _STUDENT[count - _LEAST] * math.sqrt(squares / (_GUESSED + count - 1) / count)
    return mean - reach, mean + reach


@dataclass
class Pairs:
    """Paired times of two functions; the ratios are those of ``first`` over ``second``.

    ``firsts``: seconds of the first one. ``spent``: seconds of the pairs that count. ``cost``: those of the fastest pair.
    ``made``: how many were made.
    """

    first: Call
    second: Call
    clock: Clock = time.perf_counter
    logs: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    spent: float = 0.0
    cost: float = math.inf
    made: int = 0

    def start(self, end: float) -> None:
        """Time two pairs, or only one if two would end after ``end``.

        The first of two allocates, packs, plans and perhaps compiles: it counts only if it is slow but not out of line.
        """
        self.add(1, math.inf)
        if self.clock() + self.cost > end:
            return
        before, was_slow = self.spent, self.is_slow
        self.add(1, math.inf)
        ahead = math.log(self.firsts[0] / self.firsts[1])
        if not was_slow or max(ahead, ahead - self.logs[0] + self.logs[1]) > _FIRST:
            del self.logs[0], self.firsts[0]
            self.spent -= before

    def add(self, count: int, end: float) -> None:
        """Time this many pairs in turns, first second and second first; none begins at ``end`` or later."""
        now = self.clock()
        for _ in range(count):
            begin = now
            if begin >= end:
                break
            turned = self.made % 2 == 1
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
            self.made += 1
            self.spent += now - begin
            self.cost = min(self.cost, now - begin)

    @property
    def is_slow(self) -> bool:
        """Whether even the fastest pair is slow."""
        return self.cost >= SLOW_S

    @property
    def speed(self) -> Speed:
        """What the pairs tell so far."""
        return speed_of(self.logs, self.is_slow)

    def is_brief(self, is_clear: bool) -> bool:
        """Whether it has fewer pairs, or less time, than each should get; ``is_clear``: the decision is."""
        count = len(self.logs)
        if is_clear and self.is_slow:
            return count < _LEAST
        return count < FEW or self.spent < BRIEF_S or (count < _MORE and self.spent < _MORE_S)

    def next_look(self) -> int:
        """How many pairs to add before the interval is looked at again."""
        return math.ceil(_GROWTH * len(self.logs))


class Limits(NamedTuple):
    """How long to measure.

    ``most``: seconds in all. ``patience``: those after each has had what it should, as long as the mean is not ``enough``.
    ``least``: those within which each gets what it must have, even if ``most`` is less.
    """

    most: float
    patience: float
    enough: Callable[[Speed], bool] = lambda mean: mean.is_faster or mean.is_slower
    least: float = 0.0


def decide(pairs: Mapping[int, Pairs], limits: Limits, clock: Clock = time.perf_counter) -> dict[int, Speed]:
    """The speed of each measurement, with pairs added until the interval of their mean excludes 1 or the time is spent.

    The next pairs go to the measurement with the widest interval. Each gets ``FEW`` pairs and ``BRIEF_S`` seconds, or
    two slow pairs if they make it clear, as far as the time allows; each gets one pair in any case.
    """
    begin, least = clock(), max(limits.least, limits.most)
    for one in pairs.values():
        one.start(begin + least)
    speeds = {m: one.speed for m, one in pairs.items()}
    patient: float | None = None
    while True:
        is_clear = limits.enough(mean_speed(list(speeds.values())))
        must = [m for m, one in pairs.items() if one.is_brief(is_clear=True)]
        should = [m for m, one in pairs.items() if one.is_brief(is_clear)]
        spent = clock() - begin
        left, end = _fitting(pairs, must, least - spent), least
        if not left:
            left, end = _fitting(pairs, should, limits.most - spent), limits.most
        if not left and not is_clear:
            patient = patient or min(spent + limits.patience, limits.most)
            left, end = _fitting(pairs, list(pairs), patient - spent), patient
        if not left:
            return speeds
        widest = max(left, key=lambda m: speeds[m].high / speeds[m].low)
        pairs[widest].add(pairs[widest].next_look(), begin + end)
        speeds[widest] = pairs[widest].speed


def _fitting(pairs: Mapping[int, Pairs], wanted: Sequence[int], seconds: float) -> list[int]:
    """The measurements of which one more pair fits the seconds."""
    return [m for m in wanted if pairs[m].cost <= seconds]
