"""Times calls on a GPU: replays of a CUDA graph that cycles through copies of the weights, so that they are not cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

Call = Callable[[], object]
# Size of an H200's L2 cache in bytes; weights are cold if their copies together exceed it this many times.
CACHE_BYTES, COLD_CACHES = 60 << 20, 3
REPLAYS, LEAST_CALLS, EAGER_CALLS = 9, 20, 1000
# Few enough not to fill the driver's queue, which holds about a thousand launches: a call may make three.
HOST_CALLS = 200


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: median, 20th and 80th percentile."""

    us: float
    us_p20: float
    us_p80: float


def copies(weight_bytes: int, cache_bytes: int = CACHE_BYTES) -> int:
    """Number of copies of a weight that, used in turn, do not stay in the cache."""
    return max(1, math.ceil(COLD_CACHES * cache_bytes / max(1, weight_bytes)))


def rounds(calls: int) -> int:
    """How often a graph repeats its calls, to have at least LEAST_CALLS."""
    return math.ceil(LEAST_CALLS / calls)


def summarize(seconds: Sequence[float]) -> Sample:
    """The Sample of the seconds per call of each replay.

    Raises:
        ValueError: seconds is empty.
    """
    if not seconds:
        raise ValueError("seconds: must not be empty")
    ordered = sorted(seconds)
    last = len(ordered) - 1
    p50, p20, p80 = (ordered[round(last * share)] * 1e6 for share in (0.5, 0.2, 0.8))
    return Sample(p50, p20, p80)


def in_graph(calls: Sequence[Call], replays: int = REPLAYS) -> Sample:
    """Microseconds per call on the GPU: replays one CUDA graph of the calls, timed with CUDA events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # warm-up: compiles and allocates
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
    """Microseconds of wall time per call, including launches, averaged over `count` calls."""
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (perf_counter() - start) / count * 1e6


def host(call: Call, count: int = HOST_CALLS) -> float:
    """Microseconds of host time per call: launches `count` calls without waiting for the GPU."""
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(count):
        call()
    seconds = perf_counter() - start
    torch.cuda.synchronize()
    return seconds / count * 1e6


def first(call: Call) -> float:
    """Microseconds of a single call, including compilation."""
    torch.cuda.synchronize()
    start = perf_counter()
    call()
    torch.cuda.synchronize()
    return (perf_counter() - start) * 1e6
