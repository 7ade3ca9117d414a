"""Times calls in turns: every round calls each contestant once, so that drift of the machine's speed affects all equally."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

from ..demo.settle import settle

Call = Callable[[], object]

# A cell is noisy if two timings of the same contestant differ by more than this share.
NOISY_ABOVE = 0.05
MIN_ROUNDS, MAX_ROUNDS = 5, 400
# Shorter calls are timed several at a time: reading the clock takes 0.1 us.
BATCH_S = 50e-6
# Longer calls are timed once before the rounds, shorter ones three times, for a first estimate.
LONG_S = 20e-3
# Shorter calls are preceded by two untimed ones, which wake the contestant's threads and load its activations into the
# cache, as in a model.
WAKE_BELOW_S, WAKE_CALLS = 2e-3, 2
# A contestant that is this many times slower than the first runs only in every fourth round, to save time.
SLOW, SLOW_EVERY = 8, 4


@dataclass(frozen=True)
class Runner:
    """A contestant to time: calls on copies of its weight, made in turn (one copy is hot, many are cold), and the thread
    pool that they use."""

    calls: Sequence[Call]
    pool: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    rounds: int


def summarize(samples: Sequence[float]) -> Timing:
    """The Timing from the seconds per call of each round."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    p10, p50, p90 = (ordered[round(last * share)] for share in (0.1, 0.5, 0.9))
    return Timing(p50, p10, p90, len(ordered))


def spread(first: Timing, second: Timing) -> float:
    """Relative difference of two medians of the same contestant."""
    low, high = sorted((first.median, second.median))
    return high / low - 1


def in_turns(
    runners: Sequence[Runner], budget_s: float, wake_below_s: float = WAKE_BELOW_S
) -> tuple[list[Timing], float]:
    """The Timing of each contestant, and the spread between two timings of the first one (A/A).

    Each round runs the pools, and the contestants of each pool, in a new random order. Rounds end after budget_s seconds, but
    not before MIN_ROUNDS. wake_below_s: see WAKE_BELOW_S.

    Raises:
        ValueError: no contestants, or one without calls.
    """
    if not runners or not all(runner.calls for runner in runners):
        raise ValueError("runners: must have at least one entry, each with at least one call")
    for runner in runners:
        for call in runner.calls:
            call()  # warm-up: the first call on a copy may pack, plan or allocate
    entries = [_Entry(runner, wake_below_s) for runner in runners]
    entries.append(entries[0].again())
    pools = [[e for e in entries if e.pool == pool] for pool in dict.fromkeys(e.pool for e in entries)]
    order = random.Random(0)  # noqa: S311 (not used for security)
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = perf_counter() + budget_s
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and perf_counter() >= end:
                break
            for pool in order.sample(pools, len(pools)):
                if len(pools) > 1:
                    settle()
                for entry in order.sample(pool, len(pool)):
                    if done % SLOW_EVERY == 0 or entry.once < SLOW * entries[0].once:
                        entry.sample()
    finally:
        if enabled:
            gc.enable()
    timings = [summarize(entry.samples) for entry in entries]
    return timings[:-1], spread(timings[0], timings[-1])


class _Entry:
    """A contestant during timing: its calls and samples."""

    def __init__(self, runner: Runner, wake_below_s: float = WAKE_BELOW_S) -> None:
        self.pool = runner.pool
        self.samples: list[float] = []
        self._calls = cycle(runner.calls)
        first = self._time(1)
        again = 2 if first < LONG_S else 0
        self.once = max(min([first, *(self._time(1) for _ in range(again))]), 1e-9)
        self._batch = max(1, round(BATCH_S / self.once))
        self._wake = WAKE_CALLS if self.once < wake_below_s else 0

    def again(self) -> _Entry:
        """The same contestant a second time. Both use the same sequence of copies, so that these stay cold."""
        other = copy(self)
        other.samples = []
        return other

    def sample(self) -> None:
        for _ in range(self._wake):
            next(self._calls)()
        self.samples.append(self._time(self._batch))

    def _time(self, count: int) -> float:
        batch = [next(self._calls) for _ in range(count)]
        start = perf_counter()
        for call in batch:
            call()
        return (perf_counter() - start) / count
