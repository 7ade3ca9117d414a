"""Times calls in turns: every round calls each contestant once, so that a drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter, process_time, sleep

Call = Callable[[], object]

# A contestant whose second entry differs from its first by more than this makes the cell noisy.
NOISY_ABOVE = 0.05
MIN_ROUNDS, MAX_ROUNDS = 5, 400
# Shorter calls are timed several at a time: reading the clock takes 0.1 us.
BATCH_S = 50e-6
# Before shorter calls two are made that are not timed. They wake the contestant's threads and bring its activations
# into the cache, where a layer's input is in a model.
WAKE_BELOW_S, WAKE_CALLS = 2e-3, 2
# Who takes this many times as long as the first runs in every fourth round only, so that the others get more of them.
SLOW, SLOW_EVERY = 8, 4
# Threads of a pool spin after a call: libgomp's 8 ms, onnxruntime's 30 ms, measured on 2 cores, where a spinning worker
# made a call of another pool take 1.8 times as long. So nobody is timed before the pool used last is idle.
_SETTLE_STEP_S, _IDLE_SHARE, _SETTLE_LIMIT_S = 2e-3, 0.1, 0.5


@dataclass(frozen=True)
class Runner:
    """A contestant: calls on copies of its weight, made in turn (one copy is hot, many are cold), and the pool whose
    threads they use."""

    calls: Sequence[Call]
    pool: str = ""


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


def in_turns(runners: Sequence[Runner], budget_s: float) -> tuple[list[Timing], float]:
    """The Timing of each contestant, and the spread between the first one and itself, entered twice (A/A).

    Each round takes the pools, and the contestants of each pool, in a new order, so that none always follows the same
    neighbour. The rounds end when budget_s is spent, but not before MIN_ROUNDS.

    Raises:
        ValueError: no contestants, or one without calls.
    """
    if not runners or not all(runner.calls for runner in runners):
        raise ValueError("runners: wants at least one, each with at least one call")
    for runner in runners:
        for call in runner.calls:
            call()  # the first call on a copy may pack, plan or allocate
    entries = [_Entry(runner) for runner in runners]
    entries.append(entries[0].again())
    pools = [[e for e in entries if e.pool == pool] for pool in dict.fromkeys(e.pool for e in entries)]
    order = random.Random(0)  # noqa: S311 (an order, not a secret)
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = perf_counter() + budget_s
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and perf_counter() >= end:
                break
            for pool in order.sample(pools, len(pools)):
                if len(pools) > 1:
                    _settle()
                for entry in order.sample(pool, len(pool)):
                    if done % SLOW_EVERY == 0 or entry.once < SLOW * entries[0].once:
                        entry.sample()
    finally:
        if enabled:
            gc.enable()
    timings = [summarize(entry.samples) for entry in entries]
    return timings[:-1], spread(timings[0], timings[-1])


def _settle() -> None:
    """Sleeps until no thread of this process runs any more."""
    end = perf_counter() + _SETTLE_LIMIT_S
    while perf_counter() < end:
        wall, used = perf_counter(), process_time()
        sleep(_SETTLE_STEP_S)
        if process_time() - used < _IDLE_SHARE * (perf_counter() - wall):
            return


class _Entry:
    """A contestant in the race: its calls, and what they took so far."""

    def __init__(self, runner: Runner) -> None:
        self.pool = runner.pool
        self.samples: list[float] = []
        self._calls = cycle(runner.calls)
        self.once = max(min(self._time(1) for _ in range(3)), 1e-9)
        self._batch = max(1, round(BATCH_S / self.once))
        self._wake = WAKE_CALLS if self.once < WAKE_BELOW_S else 0

    def again(self) -> _Entry:
        """The same contestant once more. Both work through the same copies, so that these stay cold."""
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
