"""Times calls on a GPU: replays of a captured graph that works through copies of the weights, so that none is cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

Call = Callable[[], object]
# Bytes of an H200's second-level cache, and how many times the copies of a weight must fill it to be cold.
CACHE_BYTES, COLD_CACHES = 60 << 20, 3
REPLAYS, LEAST_CALLS, EAGER_CALLS = 9, 20, 1000
# A driver's queue holds some thousand launches, and a call may make three.
HOST_CALLS = 200


@dataclass(frozen=True)
class Sample:
    """Microseconds a call: median, and the quantiles 0.2 and 0.8."""

    us: float
    us_p20: float
    us_p80: float


def copies(weight_bytes: int, cache_bytes: int = CACHE_BYTES) -> int:
    """How many copies of a weight, used in turn, keep each from being cached."""
    return max(1, math.ceil(COLD_CACHES * cache_bytes / max(1, weight_bytes)))


def rounds(calls: int) -> int:
    """How often a graph goes through its calls, so that it has LEAST_CALLS."""
    return math.ceil(LEAST_CALLS / calls)


def summarize(seconds: Sequence[float]) -> Sample:
    """The Sample of the seconds that a call took in each replay.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("seconds: wants at least one")
    ordered = sorted(seconds)
    last = len(ordered) - 1
    p50, p20, p80 = (ordered[round(last * share)] * 1e6 for share in (0.5, 0.2, 0.8))
    return Sample(p50, p20, p80)


def in_graph(calls: Sequence[Call], replays: int = REPLAYS) -> Sample:
    """Microseconds of a kernel: replays of one graph of the calls, by the GPU's events, over how many they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles, allocates
    torch.cuda.current_stream().wait_stream(side)
    graph, repeat = torch.cuda.CUDAGraph(), rounds(len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    seconds = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / (repeat * len(calls)))
    return summarize(seconds)


def eager(call: Call, count: int = EAGER_CALLS) -> float:
    """Microseconds of wall time a call, launches included, over `count` of them."""
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (perf_counter() - start) / count * 1e6


def host(call: Call, count: int = HOST_CALLS) -> float:
    """Microseconds that a call keeps the CPU: to launch `count` of them, while the GPU has still to work through them."""
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(count):
        call()
    seconds = perf_counter() - start
    torch.cuda.synchronize()
    return seconds / count * 1e6


def first(call: Call) -> float:
    """Microseconds of a call that may have to compile."""
    torch.cuda.synchronize()
    start = perf_counter()
    call()
    torch.cuda.synchronize()
    return (perf_counter() - start) * 1e6
