"""Waits until no thread of this process spins, so that contestants with thread pools of their own do not slow each other."""

from __future__ import annotations

from time import perf_counter, process_time, sleep

# Threads of a pool spin after a call: libgomp's 8 ms, onnxruntime's 30 ms, measured on 2 cores, where a spinning thread
# made calls of another pool 1.8 times slower.
_STEP_S, _IDLE_SHARE, _LIMIT_S = 2e-3, 0.1, 0.5


def settle() -> None:
    """Sleeps until all threads of this process are idle."""
    end = perf_counter() + _LIMIT_S
    while perf_counter() < end:
        wall, used = perf_counter(), process_time()
        sleep(_STEP_S)
        if process_time() - used < _IDLE_SHARE * (perf_counter() - wall):
            return
