"""Decisions from noisy timings: simulated streams, timings recorded under load, and the interval itself."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.paired import FEW, Limits, Pairs, decide, speed_of
from nybble.report.speed import Speed, mean_speed

STREAMS = 1000
LIMITS = Limits(2.5, 0.8)
# Two functions, timed in turns while other processes ran; in units of 100 ns.
RECORDED = json.loads((Path(__file__).parent / "data" / "timings.json").read_text())


def noise_source(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 (not used for security)


class Machine:
    """A clock that only calls of its functions move, by times that other processes disturb.

    Args:
        seed: of the noise.
        jitter: standard deviation of the logarithm of a call's time.
        spikes: share of calls that take 100 times as long.
        drift: relative amplitude of a slow wave.
        stolen: factor during episodes in which another process has a core, 0.3 s on average, as the times between.
    """

    def __init__(self, seed: int, jitter: float = 0.03, spikes: float = 0.0, drift: float = 0.0, stolen: float = 1.0):
        self.random = noise_source(seed)
        self.jitter, self.spikes, self.drift, self.stolen = jitter, spikes, drift, stolen
        self.period, self.phase = self.random.uniform(0.5, 5), self.random.uniform(0, 2 * math.pi)
        self.now = 0.0
        self.is_stolen = False
        self.until = self.random.expovariate(1 / 0.3)

    def clock(self) -> float:
        return self.now

    def function(self, seconds: float, first: float = 0.0) -> Callable[[], None]:
        """A function that takes these seconds, and ``first`` more in its first call."""
        extra = [first]

        def call() -> None:
            took = seconds * math.exp(self.random.gauss(0, self.jitter)) * self.factor()
            if self.random.random() < self.spikes:
                took *= 100
            self.now += took + (extra.pop() if extra else 0)

        return call

    def factor(self) -> float:
        while self.now > self.until:
            self.is_stolen = not self.is_stolen
            self.until += self.random.expovariate(1 / 0.3)
        wave = 1 + self.drift * math.sin(self.phase + 2 * math.pi * self.now / self.period)
        return wave * (self.stolen if self.is_stolen else 1)


NOISE: dict[str, tuple[float, dict[str, float]]] = {  # seconds of a call, arguments of Machine
    "jitter": (1e-3, {}),
    "spikes in 1 %": (2e-4, {"spikes": 0.01}),
    "spikes in 10 %": (5e-5, {"spikes": 0.1}),
    "drift": (1e-3, {"drift": 0.5}),
    "stolen core": (1e-3, {"stolen": 2.0}),
    "all": (5e-5, {"spikes": 0.03, "drift": 0.3, "stolen": 2.0, "jitter": 0.05}),
}


def simulated(seed: int, ratio: float, noise: str, calls: tuple[float, ...] = (1.0,)) -> tuple[Speed, float]:
    """The mean speed over calls that take these multiples of the noise's seconds, and the seconds that it took."""
    seconds, arguments = NOISE[noise]
    machine = Machine(seed, **arguments)
    pairs = {}
    for i, factor in enumerate(calls):
        slow, fast = machine.function(seconds * factor * ratio, 0.01), machine.function(seconds * factor, 0.003)
        pairs[i] = Pairs(slow, fast, machine.clock)
    return mean_speed(list(decide(pairs, LIMITS, machine.clock).values())), machine.now


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.95, 1.05, 1.25, 2.0])
def test_a_difference_is_found(ratio: float, noise: str) -> None:
    verdicts = Counter(simulated(seed, ratio, noise)[0].verdict for seed in range(STREAMS))
    right, wrong = ("faster", "slower") if ratio > 1 else ("slower", "faster")
    assert verdicts[right] >= 0.99 * STREAMS, verdicts
    assert not verdicts[wrong]


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("noise", NOISE)
def test_no_difference_is_called_so(noise: str) -> None:
    found = [simulated(seed, 1.0, noise) for seed in range(STREAMS // 4)]
    verdicts = Counter(speed.verdict for speed, _ in found)
    assert verdicts["no difference"] >= 0.98 * len(found), verdicts


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("noise", ["spikes in 1 %", "drift", "stolen core", "all"])
@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1, 2.0])
def test_several_batch_sizes_are_decided_together(ratio: float, noise: str) -> None:
    streams = STREAMS // 10
    verdicts = Counter(simulated(seed, ratio, noise, calls=(0.5, 1.0, 4.0))[0].verdict for seed in range(streams))
    right = "no difference" if ratio == 1 else "faster" if ratio > 1 else "slower"
    assert verdicts[right] >= 0.97 * streams, verdicts


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("noise", NOISE)
def test_the_time_is_kept(noise: str) -> None:
    """Within one pair of calls, which may be spikes, and what each gets first: 0.1 s, and calls that do not count."""
    for seed in range(50):
        for ratio in (1.0, 2.0):
            seconds, arguments = NOISE[noise]
            spike = 100 if arguments.get("spikes") else 1
            pair = 3 * seconds * ratio * spike * arguments.get("stolen", 1) * (1 + arguments.get("drift", 0)) * 1.3
            assert simulated(seed, ratio, noise)[1] <= LIMITS.patience + 0.12 + 6 * pair


class TestLargeLayers:
    """One call takes a good part of the time that there is."""

    def run(
        self, seed: int, seconds: float, ratio: float, most: float, **noise: float
    ) -> tuple[dict[int, Speed], float]:
        machine = Machine(seed, **noise)
        pairs = {
            m: Pairs(machine.function(share * seconds * ratio), machine.function(share * seconds), machine.clock)
            for m, share in ((1, 0.02), (16, 0.1), (256, 1.0))
        }
        return decide(pairs, Limits(most, most / 3), machine.clock), machine.now

    def test_a_large_speedup_is_found_in_few_pairs(self) -> None:
        for seed in range(100):
            speeds, spent = self.run(seed, 0.1, 2.0, 2.5)
            assert mean_speed(list(speeds.values())).is_faster
            assert all(speed.pairs >= FEW for m, speed in speeds.items() if m < 256)
            assert speeds[256].pairs >= 2
            assert spent < 2.8

    @pytest.mark.parametrize("ratio", [1.0, 1.05, 1.3])
    def test_it_is_hardly_ever_called_slower(self, ratio: float) -> None:
        runs = [self.run(seed, 0.1, ratio, 2.5, stolen=2.0, jitter=0.1, drift=0.3) for seed in range(200)]
        assert sum(mean_speed(list(speeds.values())).is_slower for speeds, _ in runs) <= 2

    def test_one_call_longer_than_all_the_time_there_is(self) -> None:
        speeds, spent = self.run(0, 3.0, 2.0, 1.0)
        assert speeds[256].pairs == 1, "the first call counts"
        assert (speeds[256].low, speeds[256].high) == pytest.approx((2 / 1000, 2000), rel=0.3)
        assert mean_speed(list(speeds.values())).verdict == "no difference"
        assert spent < 12


def replayed(stream: dict[str, Any], seed: int) -> Speed:
    """The decision on recorded times from a random place on; a call takes the next time of its function."""
    times = [time for both in zip(stream["first"], stream["second"], strict=True) for time in both]
    now, place = [0.0], [noise_source(seed).randrange(len(times))]

    def function(which: int) -> Callable[[], None]:
        def call() -> None:
            place[0] += 1 + (place[0] + 1 + which) % 2
            now[0] += 1e-7 * times[place[0] % len(times)]

        return call

    pairs = Pairs(function(0), function(1), lambda: now[0])
    seconds = 2e-7 * sum(times)
    return decide({0: pairs}, Limits(seconds, seconds), lambda: now[0])[0]


@pytest.mark.parametrize("stream", RECORDED, ids=lambda stream: f"{stream['of']}, {stream['load']}")
def test_recorded_timings(stream: dict[str, Any]) -> None:
    verdicts = Counter(replayed(stream, seed).verdict for seed in range(200))
    right = "no difference" if stream["of"].startswith("two") else "faster"
    assert verdicts[right] >= 0.99 * 200, verdicts


class TestInterval:
    @pytest.mark.parametrize("count", [2, 3, 5, 8, 11, 30, 200])
    @pytest.mark.parametrize("shape", ["uniform", "normal", "heavy"])
    def test_it_misses_the_centre_as_rarely_as_it_says(self, count: int, shape: str) -> None:
        source = noise_source(count)
        draw = {
            "uniform": lambda: source.uniform(-2, 2),
            "normal": lambda: source.gauss(0, 1),
            "heavy": lambda: source.gauss(0, 0.01) / max(source.random(), 2e-3),
        }[shape]
        rounds = 20000 if count < 30 else 2000
        missed = sum(speed_of([draw() for _ in range(count)]).verdict != "no difference" for _ in range(rounds))
        assert missed <= 3 + 2e-3 * rounds

    def test_it_is_not_wider_than_needed(self) -> None:
        source = noise_source(0)
        for count, most in ((5, 1.45), (11, 1.2), (100, 1.05), (1000, 1.021)):
            found = [speed_of([source.gauss(0, 0.03) for _ in range(count)]) for _ in range(100)]
            assert sorted(speed.high / speed.low for speed in found)[50] < most

    def test_it_holds_the_ratio_and_at_least_one_percent(self) -> None:
        exact = speed_of([math.log(3.0)] * 50)
        assert (exact.ratio, exact.low, exact.high, exact.pairs) == pytest.approx((3.0, 3 / 1.01, 3 * 1.01, 50))
        assert speed_of([math.log(1.005)] * 1000).verdict == "no difference"
        assert speed_of([0.0, 5.0]).high == pytest.approx(math.exp(2.5) * 1000)

    def test_the_mean_of_several(self) -> None:
        one, other = Speed(2.0, 1.0, 4.0, 10), Speed(0.5, 0.5, 0.5, 3)
        alone = mean_speed([one])
        assert (alone.ratio, alone.low, alone.high, alone.pairs) == pytest.approx((2.0, 1.0, 4.0, 10))
        mean = mean_speed([one, other])
        assert (mean.ratio, mean.low, mean.high, mean.pairs) == pytest.approx((1.0, 2**-0.5, 2**0.5, 13))
        both = mean_speed([one, one])
        assert (both.low, both.high) == pytest.approx((2 * 2 ** -(2**-0.5), 2 * 2 ** (2**-0.5)))
        with pytest.raises(ValueError, match="speeds"):
            mean_speed([])


class TestCalls:
    def test_they_alternate_and_each_goes_first_in_turn(self) -> None:
        calls: list[str] = []
        now = [0.0]

        def function(name: str, seconds: float) -> Callable[[], None]:
            def call() -> None:
                calls.append(name)
                now[0] += seconds

            return call

        pairs = Pairs(function("a", 3e-3), function("b", 1e-3), lambda: now[0])
        pairs.add(4, math.inf)
        assert "".join(calls) == "ab" + "aba" + "bab" + "aba", "all but the first after a call that is not timed"
        assert pairs.logs == pytest.approx([math.log(3)] * 4)
        assert pairs.firsts == pytest.approx([3e-3] * 4)
        calls.clear()
        slow = Pairs(function("a", 3.0), function("b", 1.0), lambda: now[0])
        slow.add(3, now[0] + 5.0)
        assert "".join(calls) == "ab" + "ba", "none begins when the time is over"

    def test_the_first_calls_do_not_count(self) -> None:
        machine = Machine(0)
        pairs = Pairs(machine.function(1e-3, first=5.0), machine.function(1e-3), machine.clock)
        speed = decide({1: pairs}, Limits(20.0, 1.0), machine.clock)[1]
        assert speed.verdict == "no difference"
        assert max(pairs.firsts) < 2e-3

    def test_a_slow_first_call_saves_no_pairs(self) -> None:
        counts = []
        for first in (0.0, 0.15):
            machine = Machine(0)
            pairs = Pairs(machine.function(50e-6, first=first), machine.function(90e-6), machine.clock)
            decide({1: pairs}, Limits(20.0, 1.0), machine.clock)
            counts.append(len(pairs.logs))
        assert counts[1] > counts[0] / 2

    def test_a_clock_that_stands_still(self) -> None:
        pairs = Pairs(lambda: None, lambda: None, lambda: 0.0)
        pairs.add(1, math.inf)
        assert pairs.logs == [0.0]

    def test_the_widest_interval_gets_the_pairs(self) -> None:
        machine = Machine(0, jitter=0.0)
        noisy = Machine(1, jitter=0.3)

        def unsteady() -> None:
            before = noisy.now
            noisy_call()
            machine.now += noisy.now - before

        noisy_call = noisy.function(1e-3)
        pairs = {
            0: Pairs(machine.function(1e-3), machine.function(1e-3), machine.clock),
            1: Pairs(unsteady, machine.function(1e-3), machine.clock),
        }
        speeds = decide(pairs, Limits(2.0, 2.0), machine.clock)
        assert speeds[1].pairs > 10 * speeds[0].pairs
