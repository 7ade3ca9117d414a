"""Peak rates (ceilings) of this machine: memory and L3 bandwidth and multiplies, by the probes of csrc/probes.def."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .. import native
from ..demo.table import text_table
from ..dispatch import targets
from .ceilings_cache import load, store

# A ceiling is the fastest of several short runs in each of several windows: on a shared machine a core may be taken away
# for longer than a window.
_WINDOWS = 3
_READ_RUNS, _CACHE_RUNS, _MULTIPLY_RUNS = 2, 20, 20
_CACHE_BYTES = 256 << 20  # bytes read from the cache per run, enough to make the thread start negligible
_MULTIPLY_ROUNDS, _MULTIPLY_PASSES = 20_000, 20
_LEAST_MEMORY = 1 << 30
_PAGE = 4096

_COLUMNS = {
    "dram_gbps": "DRAM GB/s",
    "dram_huge_gbps": "huge pages",
    "l3_gbps": "L3 GB/s",
    "int8_gops": "int8 GOP/s",
    "int7_gops": "int7 GOP/s",
    "int4_gops": "int4 GOP/s",
    "bf16_gflops": "bf16 GFLOP/s",
    "fp32_gflops": "fp32 GFLOP/s",
}
# Kind of multiply -> its ceiling; and the kinds of probe that compute it: what multiplies int8 also multiplies fewer bits.
PEAKS = {
    "int8": "int8_gops",
    "int7": "int7_gops",
    "int4": "int4_gops",
    "bf16": "bf16_gflops",
    "fp32": "fp32_gflops",
}
_SERVED_BY = {
    "int8": ("int8",),
    "int7": ("int7", "int8"),
    "int4": ("int4", "int7", "int8"),
    "bf16": ("bf16", "fp32"),
    "fp32": ("fp32",),
}

Limits = dict[str, float]


def ceilings(threads: Sequence[int], remeasure: bool = False) -> dict[str, dict[str, Limits]]:
    """{"threads": {"1": {...}, ...}} for each thread count, from the user's cache directory, or measured and stored there.

    The limits are those of _COLUMNS, in 10^9 bytes or operations per second: dram_gbps, dram_huge_gbps (memory read
    without and with huge pages), l3_gbps, and one for each kind of multiply, by the instructions of the targets that
    nybble uses here. One thread is measured too, because more threads never have less.
    """
    counts = sorted({1, *threads})
    known = {} if remeasure else {count: limits for count in counts if (limits := load(count, _COLUMNS)) is not None}
    fresh = {count: measure(count) for count in counts if count not in known}
    if fresh:
        store(fresh)
    return {
        "threads": {str(count): limits for count, limits in _rising({**known, **fresh}).items() if count in threads}
    }


def _rising(found: Mapping[int, Limits]) -> dict[int, Limits]:
    """The limits by number of threads, ascending, each at least that of fewer threads."""
    least: Limits = {}
    rising = {}
    for count in sorted(found):
        least = {name: max(value, least.get(name, 0.0)) for name, value in found[count].items()}
        rising[count] = least
    return rising


def measure(threads: int) -> Limits:
    """Measures the limits for a number of threads: the best of the windows."""
    windows = [_window(threads) for _ in range(_WINDOWS)]
    return {name: round(max(window[name] for window in windows), 1) for name in _COLUMNS}


def _window(threads: int) -> Limits:
    """Measures the limits once. Reads 1 GiB or 8 times L3, less if memory is short."""
    _, l2, l3 = native.caches()
    free = (
        "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    )  # macOS does not tell the first
    short = os.sysconf(free) * os.sysconf("SC_PAGE_SIZE") // 4
    memory = min(max(_LEAST_MEMORY, 8 * l3), short)
    # Half of L3 in total, but more than the L2 cache for each thread.
    cached = max(l3 // 2 // threads, 2 * l2)
    passes = max(1, _CACHE_BYTES // (cached * threads))
    return {
        **peaks(threads),
        "dram_gbps": _reads(threads, memory // threads, 1, _READ_RUNS, False),
        "dram_huge_gbps": _reads(threads, memory // threads, 1, _READ_RUNS, True),
        "l3_gbps": _reads(threads, cached, passes, _CACHE_RUNS, True),
    }


def peaks(threads: int) -> Limits:
    """Measures the peak rates of the multiplies, within a fraction of a second."""
    rates = {kind: _multiplies(kind, threads) for kind in PEAKS}
    return {name: max(rates[served] for served in _SERVED_BY[kind]) for kind, name in PEAKS.items()}


def _probes(kind: str) -> list[str]:
    """The probes of a kind that run here, by instructions of the targets in use: NYBBLE_TARGET holds them too."""
    names = targets.detect().targets
    used = {*names, *(need for name in names for need in targets.find(name).needs)}
    return [
        name
        for name, of, why_not in native.probes()
        if of == kind and not why_not and name.removeprefix(f"{kind}_") in used
    ]


def _reads(threads: int, each: int, passes: int, runs: int, huge_pages: bool) -> float:
    amount = max(_PAGE, each // _PAGE * _PAGE)
    return _fastest("read", threads, amount, passes=passes, runs=runs, huge_pages=huge_pages)


def _multiplies(kind: str, threads: int) -> float:
    return _fastest(kind, threads, _MULTIPLY_ROUNDS, passes=_MULTIPLY_PASSES, runs=_MULTIPLY_RUNS)


def _fastest(kind: str, threads: int, amount: int, **how: Any) -> float:
    """10^9 bytes or operations per second of the fastest probe of its kind; 0 if none runs on this CPU."""
    found = (native.probe(name, threads, amount, **how) for name in _probes(kind))
    return max((work / seconds / 1e9 for seconds, work in found), default=0.0)


def columns(found: dict[str, dict[str, Limits]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The ceilings as table headings and one row per thread count."""
    # Older files lack some.
    names = [name for name in _COLUMNS if all(name in limits for limits in found["threads"].values())]
    rows = [
        (count, *(f"{limits[name]:.1f}" if "gbps" in name else f"{limits[name]:.0f}" for name in names))
        for count, limits in found["threads"].items()
    ]
    return ("threads", *(_COLUMNS[name] for name in names)), rows


def table(found: dict[str, dict[str, Limits]]) -> str:
    """The ceilings as a text table."""
    headers, rows = columns(found)
    return text_table(headers, rows, right=range(len(headers)))


def show(threads: Sequence[int], remeasure: bool = False) -> None:
    """Prints the output of `python -m nybble.bench ceilings`."""
    print(native.cpu()[0])
    print(table(ceilings(threads, remeasure)))
