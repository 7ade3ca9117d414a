"""Times calls in turns: every round calls each contestant once, so that a drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

Call = Callable[[], object]

# A contestant whose second entry differs from its first by more than this makes the cell noisy.
NOISY_ABOVE = 0.05
MIN_ROUNDS, MAX_ROUNDS = 5, 400
# Shorter calls are timed several at a time: reading the clock takes 0.1 us.
BATCH_S = 50e-6
# Shorter calls are preceded by one that is not timed. It wakes the contestant's threads and outlasts those of the one
# before, which may still spin; it also brings the activations into the cache, where a layer's input is in a model.
WAKE_BELOW_S = 5e-3


@dataclass(frozen=True)
class Timing:
    """Seconds a call over the rounds: median, first and last decile."""

    median: float
    p10: float
    p90: float
    rounds: int


def summarize(samples: Sequence[float]) -> Timing:
    """The Timing of the rounds' seconds a call."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    p10, p50, p90 = (ordered[round(last * share)] for share in (0.1, 0.5, 0.9))
    return Timing(p50, p10, p90, len(ordered))


def spread(first: Timing, second: Timing) -> float:
    """How far two medians of the same contestant lie apart, relative to the lower one."""
    low, high = sorted((first.median, second.median))
    return high / low - 1


def in_turns(contestants: Sequence[Sequence[Call]], budget_s: float) -> tuple[list[Timing], float]:
    """The Timing of each contestant, and the spread between the first one and itself, entered twice (A/A).

    A contestant is a list of calls on copies of its weight, which it works through in turn: one copy is hot, many are
    cold. Each round takes all contestants in a new order, so that none always follows the same neighbour.

    Raises:
        ValueError: no contestants, or one without calls.
    """
    if not contestants or not all(contestants):
        raise ValueError("contestants: wants at least one, each with at least one call")
    for calls in contestants:
        for call in calls:
            call()  # the first call on a copy may pack, plan or allocate
    turns: list[Iterator[Call]] = [cycle(calls) for calls in contestants]
    turns.append(turns[0])
    entries = [_Entry(calls) for calls in turns]
    order = random.Random(0)  # noqa: S311: an order, not a secret
    end = perf_counter() + budget_s
    enabled = gc.isenabled()
    gc.disable()
    try:
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and perf_counter() >= end:
                break
            for entry in order.sample(entries, len(entries)):
                entry.sample()
    finally:
        if enabled:
            gc.enable()
    timings = [summarize(entry.samples) for entry in entries]
    return timings[:-1], spread(timings[0], timings[-1])


class _Entry:
    """A contestant in the race: its calls, and what it took so far."""

    def __init__(self, calls: Iterator[Call]) -> None:
        self._calls = calls
        self.samples: list[float] = []
        once = self._time(1)
        self._batch = max(1, round(BATCH_S / max(once, 1e-9))) if once < BATCH_S else 1
        self._wake = once < WAKE_BELOW_S

    def sample(self) -> None:
        if self._wake:
            next(self._calls)()
        self.samples.append(self._time(self._batch))

    def _time(self, count: int) -> float:
        batch = [next(self._calls) for _ in range(count)]
        start = perf_counter()
        for call in batch:
            call()
        return (perf_counter() - start) / count
