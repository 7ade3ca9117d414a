"""Decisions about calls of 0.2 to 1.9 s, of which there are only a few: simulated with what disturbs long calls."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest

from nybble.paired import SLOW_S, Limits, Pairs, decide, speed_of
from nybble.report.speed import Speed, mean_speed

STREAMS = 400
SECONDS = (0.2, 0.6, 1.9)


def limits(seconds: float, layers: int = 1) -> Limits:
    """Those of one of several layers in `quantize` with timing_s=10; with calls of 1.9 s, with more."""
    all_there_is = max(10.0, 8 * seconds)
    return Limits(max(all_there_is / layers, 5 * seconds), all_there_is / 12, least=all_there_is)


class Machine:
    """A clock that only calls of its functions move.

    Args:
        seed: of the noise.
        jitter: standard deviation of the logarithm of a call's time.
        slices: how many times a second another process runs in between, for 10 ms on average.
        drift: relative amplitude of a wave with a period of 0.5 to 5 s.
        stolen: the factor while another process has a core, half of the time, for 0.3 s on average.
    """

    def __init__(self, seed: int, jitter: float = 0.03, slices: float = 0.0, drift: float = 0.0, stolen: float = 1.0):
        self.random = random.Random(seed)  # noqa: S311 (not used for security)
        self.jitter, self.slices, self.drift, self.stolen = jitter, slices, drift, stolen
        self.period, self.phase = self.random.uniform(0.5, 5), self.random.uniform(0, 2 * math.pi)
        self.now = 0.0
        self.is_stolen = self.random.random() < 0.5
        self.until = self.random.expovariate(1 / 0.3)

    def clock(self) -> float:
        return self.now

    def function(self, seconds: float, first: float = 0.0) -> Callable[[], None]:
        """A function that takes these seconds, and ``first`` more in its first call."""
        extra = [first]

        def call() -> None:
            begin = self.now
            self.work(seconds * math.exp(self.random.gauss(0, self.jitter)))
            ends = begin + self.random.expovariate(self.slices) if self.slices else math.inf
            while ends < self.now:
                self.now += self.random.expovariate(1 / 0.01)
                ends += self.random.expovariate(self.slices)
            self.now += extra.pop() if extra else 0

        return call

    def work(self, seconds: float) -> None:
        while seconds > 0:
            while self.now >= self.until:
                self.is_stolen = not self.is_stolen
                self.until += self.random.expovariate(1 / 0.3)
            wave = 1 + self.drift * math.sin(self.phase + 2 * math.pi * self.now / self.period)
            factor = wave * (self.stolen if self.is_stolen else 1)
            step = min(seconds * factor, 0.05, self.until - self.now + 1e-9)
            self.now += step
            seconds -= step / factor


NOISE: dict[str, dict[str, float]] = {
    "jitter": {"jitter": 0.03},
    "more jitter": {"jitter": 0.05},
    "slices": {"slices": 5.0},
    "drift": {"drift": 0.1},
}


def decided(seed: int, seconds: float, ratio: float, noise: dict[str, float], first: float = 0.02) -> Speed:
    """The speed of a function that is ``ratio`` times as fast as one that takes these seconds."""
    machine = Machine(seed, **noise)
    pairs = Pairs(machine.function(seconds, first), machine.function(seconds / ratio, first / 2), machine.clock)
    return decide({256: pairs}, limits(seconds * max(1, 1 / ratio)), machine.clock)[256]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize(("ratio", "right"), [(1.8, "faster"), (1 / 1.8, "slower")])
def test_a_clear_difference_is_found(seconds: float, ratio: float, right: str, noise: str) -> None:
    slower = seconds * min(1, ratio)  # the slower of the two takes ``seconds``
    verdicts = Counter(decided(seed, slower, ratio, NOISE[noise]).verdict for seed in range(STREAMS))
    assert verdicts[right] >= 0.99 * STREAMS, verdicts


@pytest.mark.parametrize(("noise", "share"), [*((one, 0.01) for one in NOISE), ("stolen", 0.02)])
@pytest.mark.parametrize("seconds", SECONDS)
def test_equal_functions_are_not_called_different(seconds: float, noise: str, share: float) -> None:
    given = NOISE.get(noise, {"stolen": 2.0})
    verdicts = Counter(decided(seed, seconds, 1.0, given).verdict for seed in range(STREAMS))
    assert verdicts["no difference"] >= (1 - share) * STREAMS, verdicts


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("noise", [{}, {"slices": 5.0}, {"drift": 0.1}, {"stolen": 2.0}], ids=str)
@pytest.mark.parametrize("seconds", SECONDS)
def test_several_batch_sizes(seconds: float, noise: dict[str, float]) -> None:
    """The largest takes as long; a third of the time is there."""

    def verdict(seed: int, ratio: float) -> str:
        machine = Machine(seed, **noise)
        calls = {m: (share * seconds, share * seconds / ratio) for m, share in ((1, 0.02), (16, 0.1), (256, 1.0))}
        pairs = {m: Pairs(machine.function(a), machine.function(b), machine.clock) for m, (a, b) in calls.items()}
        speeds = decide(pairs, limits(seconds, layers=3), machine.clock)
        return mean_speed(list(speeds.values())).verdict

    equal = Counter(verdict(seed, 1.0) for seed in range(STREAMS))
    assert equal["no difference"] >= 0.99 * STREAMS, equal
    different = Counter(verdict(seed, 1.8) for seed in range(STREAMS))
    assert not different["slower"]
    assert different["faster"] >= (0.99 if "stolen" not in noise else 0.5) * STREAMS, different


@pytest.mark.parametrize(("seconds", "pairs"), [(0.2, 6), (0.6, 4), (1.9, 4)])
def test_it_is_decided_early(seconds: float, pairs: int) -> None:
    found = [decided(seed, seconds, 3.5, {}) for seed in range(50)]
    assert all(speed.is_faster and speed.pairs <= 3 for speed in found)
    assert all(decided(seed, seconds, 1.8, {}).pairs <= pairs for seed in range(50))


class TestTheFirstPair:
    def test_it_counts_if_it_is_slow(self) -> None:
        for first in (0.0, 0.1):
            machine = Machine(0, jitter=0.0)
            pairs = Pairs(machine.function(0.5, first), machine.function(0.5), machine.clock)
            pairs.start(10.0)
            assert len(pairs.logs) == len(pairs.firsts) == 2
            assert pairs.spent == pytest.approx(2.0 + first)

    @pytest.mark.parametrize("which", [0, 1])
    def test_it_does_not_if_it_is_out_of_line(self, which: int) -> None:
        machine = Machine(0, jitter=0.0)
        first, second = (machine.function(0.5, 0.4 * (which == i)) for i in range(2))
        pairs = Pairs(first, second, machine.clock)
        pairs.start(10.0)
        assert pairs.logs == pytest.approx([0.0])
        assert pairs.spent == pytest.approx(1.0)

    def test_a_quick_function_that_compiles_is_not_slow(self) -> None:
        machine = Machine(0, jitter=0.0)
        pairs = Pairs(machine.function(1e-3), machine.function(1e-3, first=2.0), machine.clock)
        pairs.start(10.0)
        assert pairs.logs == pytest.approx([0.0])
        assert not pairs.is_slow

    def test_two_are_made_if_they_end_in_time(self) -> None:
        for end, count in ((2.1, 2), (1.9, 1)):
            machine = Machine(0, jitter=0.0)
            pairs = Pairs(machine.function(0.5), machine.function(0.5), machine.clock)
            pairs.start(end)
            assert len(pairs.logs) == count


def test_one_pair_decides_nothing() -> None:
    assert speed_of([math.log(100)], is_slow=True).verdict == "no difference"


def test_more_pairs_tell_smaller_differences() -> None:
    reach = [speed_of([0.0] * count, is_slow=True).high for count in range(2, 11)]
    assert reach == sorted(reach, reverse=True)
    assert reach[:4] == pytest.approx([2.32, 1.63, 1.40, 1.29], abs=0.01)
    assert speed_of([0.0, 0.5], is_slow=True).high > speed_of([0.25, 0.25], is_slow=True).high
    assert SLOW_S <= 0.2
