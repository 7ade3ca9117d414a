"""Performance goals on GPUs as data, and tables of goals and results.

A Goal: the speed of a scheme at a shape over a baseline, on an H100 and on an H200. A Limit: an absolute bound of one
figure, on both. On other GPUs, results are shown, but not checked.

Origin of the numbers. H200: the design. H100, bound by memory (few rows): time of bfloat16 over 3 us + bytes / (0.9 of
3.0 TB/s), rounded down, where the time of bfloat16 is 1.7 us + bytes / (0.95 of 3.0 TB/s). 8-bit activations add 2.5 us
for quantization; 16 rows may take 10 % more time, 32 rows 20 %. Bound by compute, and for block sparsity: the numbers
of the H200, which has the same multiprocessors.
Over other libraries: at least as fast as the fastest of PEERS_OF that runs in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..demo.table import text_table
from .goals import word

BF16, INT8 = "torch bf16", "torch int_mm"
# Baselines that are the fastest of several peers of gpu_peers. The likely fastest come first, because time may run out.
W4A16, W4A8, W8A8 = "fastest w4a16 peer", "fastest w4a8 peer", "fastest w8a8 peer"
PEERS_OF = {
    W4A16: ("marlin w4a16 g128", "humming w4a16 g128", "torch int4pack g128", "bitsandbytes nf4", "gemlite w4a16 g128"),
    W4A8: ("humming w4a8 g128",),
    W8A8: ("humming w8a8", INT8, "torchao int8 dynamic", "gemlite w8a8"),
}
GPUS = ("H100", "H200")
Row = Mapping[str, Any]


def gpu_of(results: Iterable[Row]) -> str | None:
    """The GPU of the results, one of GPUS; None for another or unknown GPU."""
    names = [row["gpu"] for row in results if row["key"] == "machine"]
    return next((gpu for gpu in GPUS if names and gpu in names[-1]), None)


@dataclass(frozen=True)
class Goal:
    """kernel: the kernel's label. over: the baseline, from PEERS or PEERS_OF. h100, h200: smallest speed over it."""

    kernel: str
    scheme: str
    m: int
    n: int
    k: int
    over: str
    h100: float
    h200: float

    @property
    def key(self) -> str:
        """The key of its result."""
        return f"{self.kernel} {self.scheme} {self.n}x{self.k} m={self.m} over {self.over}"

    def bound(self, gpu: str) -> float:
        """The smallest speed on one of GPUS."""
        return {"H100": self.h100, "H200": self.h200}[gpu]


@dataclass(frozen=True)
class Limit:
    """An upper or lower bound of a figure.

    what: an operation of gpu_operations, or a scheme. figure: a key of FIGURES.
    """

    kernel: str
    what: str
    m: int
    n: int
    k: int
    figure: str
    bound: float

    @property
    def key(self) -> str:
        """The key of its result."""
        return f"{self.kernel} {self.what} {self.n}x{self.k} m={self.m} {self.figure}"

    def reached(self, row: Row) -> float:
        """The value of the figure in a result."""
        return FIGURES[self.figure].of(row)

    def met(self, row: Row) -> bool:
        """Whether a result meets the bound."""
        value = self.reached(row)
        return value <= self.bound if FIGURES[self.figure].at_most else value >= self.bound


@dataclass(frozen=True)
class Figure:
    """How to compute a figure from a result, whether its bound is an upper one, and its text format."""

    of: Callable[[Row], float]
    at_most: bool
    text: str


OF_COPY, KERNEL, HOST, FIRST = "share of copy", "kernel us", "host us a call", "first call s"
FIGURES = {
    OF_COPY: Figure(lambda row: row["gbps"] / row["copy_gbps"], at_most=False, text="{:.0%}"),
    KERNEL: Figure(lambda row: row["us"], at_most=True, text="{:.2f}"),
    HOST: Figure(lambda row: row["host_us"], at_most=True, text="{:.2f}"),
    FIRST: Figure(lambda row: row["first_s"], at_most=True, text="{:.2f}"),
}


def _each(
    kernel: str, scheme: str, over: str, shape: tuple[int, int], by_m: dict[int, tuple[float, float]]
) -> tuple[Goal, ...]:
    return tuple(Goal(kernel, scheme, m, *shape, over, *speedups) for m, speedups in by_m.items())


_LARGE, _MIDDLE, _SMALL = (8192, 8192), (28672, 4096), (4096, 4096)
_HUGE = (14336, 8192)  # more than 100 M weights
_EVEN = (1.0, 1.0)
# In the order of measurement: the most important first, because a run may be cut off.
GOALS: tuple[Goal, ...] = (
    *_each("K1", "w4a16g128", BF16, _LARGE, {1: (3.0, 3.2)}),
    *_each("K2", "w4a16g128", BF16, _LARGE, {16: (2.8, 3.0), 64: (1.8, 1.8)}),
    *_each("K4", "w8a8", BF16, _LARGE, {1: (1.6, 1.6), 16: (1.6, 1.6), 4096: (1.5, 1.5)}),
    *_each("K6", "w4a8g128", BF16, _LARGE, {16: (2.6, 2.8), 64: (2.4, 2.6), 256: (1.5, 1.5)}),
    *_each("K1", "w4a16g128", BF16, _SMALL, {1: (2.1, 1.8)}),
    *_each("K1", "w4a16g128", BF16, _MIDDLE, {1: (3.3, 3.4)}),
    *_each("K3", "w4a16g128", BF16, _LARGE, {128: (1.25, 1.25), 256: (0.9, 0.9)}),
    *_each("K2", "w4a16g128", BF16, _LARGE, {32: (2.5, 2.7)}),
    *_each("K4", "w8a8", BF16, _LARGE, {64: (1.6, 1.6)}),
    *_each("K6", "w4a8g128", BF16, _LARGE, {32: (2.6, 2.8), 128: (1.9, 1.9)}),
    *_each("K4", "w8a8", INT8, _LARGE, dict.fromkeys((32, 128, 512), (1.3, 1.3))),
    *_each("K4", "w8a8", INT8, _LARGE, dict.fromkeys((1024, 4096), (1.1, 1.1))),
    *_each("K7", "sp24w8a16", BF16, _HUGE, dict.fromkeys((1, 16), (2.7, 2.5))),
    *_each("K7", "sp24w4a16g128", BF16, _HUGE, dict.fromkeys((1, 16), (4.0, 3.8))),
    *_each("K7", "sp24w16a16", BF16, _HUGE, dict.fromkeys((1, 16), (1.6, 1.5))),
    *_each("K8", "bs64x64w8a8:75%", BF16, _LARGE, dict.fromkeys((16, 64), (2.5, 2.5))),
    *_each("K8", "bs64x64w8a8:90%", BF16, _LARGE, {16: (5.0, 5.0), 64: (5.0, 5.0), 2048: (6.5, 6.5)}),
    # Last, because the libraries compile and tune themselves at their first call.
    *_each("K1", "w4a16g128", W4A16, _LARGE, dict.fromkeys((1, 16, 64), _EVEN)),
    *_each("K4", "w8a8", W8A8, _LARGE, dict.fromkeys((1, 4096), _EVEN)),
    *_each("K6", "w4a8g128", W4A8, _LARGE, dict.fromkeys((16, 256), _EVEN)),
)
_QUANTIZE = ("quantize", "rms_norm_quantize", "silu_mul_quantize")
_DEQUANTIZED = ("w8a16", "w4a16g128", "sp24w8a16", "sp24w4a16g128")
_DAILY = ("w8a8", "w8a16", "w4a8g128", "w4a16g128")
LIMITS: tuple[Limit, ...] = (
    *(Limit("K0", f"dequantize {scheme}", 0, *_LARGE, OF_COPY, 0.8) for scheme in _DEQUANTIZED),
    *(Limit("K5", what, 4096, 0, 8192, OF_COPY, 0.8) for what in _QUANTIZE),  # 64 MiB and more
    *(Limit("K5", what, m, 0, 4096, KERNEL, 3.0) for what in _QUANTIZE for m in (1, 64)),
    *(Limit("host", scheme, 1, 1024, 1024, HOST, 6.0) for scheme in _DAILY),
    *(Limit("first", scheme, m, 1024, 1024, FIRST, 2.0) for scheme in _DAILY for m in (1, 128)),
)


# Limits come before the goals over other libraries, which take the longest.
_OVER_PEERS = tuple(goal for goal in GOALS if goal.over in PEERS_OF)
ALL: tuple[Goal | Limit, ...] = (*(goal for goal in GOALS if goal not in _OVER_PEERS), *LIMITS, *_OVER_PEERS)
UNMEASURED = "not measured on a GPU yet"


def table(results: Iterable[Row], goals: Iterable[Goal | Limit] = ALL) -> str:
    """The goals and limits with their results, in order; missing ones are marked."""
    results = list(results)
    gpu, by_key = gpu_of(results), {row["key"]: row for row in results}
    lines = [_line(goal, by_key.get(goal.key), gpu) for goal in goals]
    headers = ("kernel", "of", "N x K", "M", "runs", "us", "p20-p80", "A/A", "roofline", "over")
    return text_table((*headers, "goal", "reached", ""), lines, right=(3, 5, 7, 8, 10, 11))


def markdown(results: Iterable[Row] = (), goals: Iterable[Goal | Limit] = ALL) -> str:
    """The same as markdown, with one line for all M of a shape, in ascending order."""
    results = list(results)
    gpu, by_key = gpu_of(results), {row["key"]: row for row in results}
    groups: dict[tuple[str, str, str], list[Goal | Limit]] = {}
    for goal in goals:
        what, over, _ = _asked(goal)
        groups.setdefault((what, _shape(goal), over), []).append(goal)
    lines = [f"| of | N x K | over | goal, {' / '.join(GPUS)} | reached | roofline |", "| --- " * 6 + "|"]
    for cells, group in groups.items():
        found = sorted(group, key=lambda goal: goal.m)
        aims = "; ".join(_words(goal, _asked(goal)[2]) for goal in found)
        done = [(goal, by_key[goal.key]) for goal in found if goal.key in by_key]
        reached = "; ".join(_words(goal, *_outcome(goal, row, gpu)) for goal, row in done)
        shares = "; ".join(_words(goal, _roofline(row)) for goal, row in done if _roofline(row))
        lines.append(f"| {' | '.join((*cells, aims, reached or UNMEASURED, shares))} |")
    return "\n".join(lines)


def _shape(goal: Goal | Limit) -> str:
    return f"{goal.n or '-'}x{goal.k}"


def _words(goal: Goal | Limit, *words: str) -> str:
    return " ".join(part for part in (f"M={goal.m}" if goal.m else "", *words) if part)


def _asked(goal: Goal | Limit) -> tuple[str, str, str]:
    """(scheme or operation, baseline or figure, bound as text; one per GPU if they differ)."""
    if isinstance(goal, Goal):
        bounds = dict.fromkeys(f"{goal.bound(gpu):.2f}x" for gpu in GPUS)
        return goal.scheme, goal.over, " / ".join(bounds)
    kind = FIGURES[goal.figure]
    return goal.what, goal.figure, f"{'<=' if kind.at_most else '>='} {kind.text.format(goal.bound)}"


def _outcome(goal: Goal | Limit, row: Row, gpu: str | None) -> tuple[str, str]:
    """(value reached, result), or ("", reason of failure). The result is empty for GPUs other than GPUS."""
    if "reason" in row:
        return "", row["reason"]
    if isinstance(goal, Goal):
        speedup = row["over_us"] / row["us"]
        said = word(speedup >= goal.bound(gpu)) if gpu else ""
        beside = f"({row['fastest']})" if "fastest" in row else ""
        return f"{speedup:.2f}x", f"{said} {beside}".strip()
    return FIGURES[goal.figure].text.format(goal.reached(row)), word(goal.met(row)) if gpu else ""


def _line(goal: Goal | Limit, row: Row | None, gpu: str | None) -> tuple[str, ...]:
    what, over, aim = _asked(goal)
    start = (goal.kernel, what, _shape(goal), str(goal.m or "-"))
    if row is None or "reason" in row:
        return (*start, "", "", "", "", "", over, aim, "", UNMEASURED if row is None else row["reason"])
    return (*start, row.get("runs", ""), *_times(row), _roofline(row), over, aim, *_outcome(goal, row, gpu))


def _times(row: Row) -> tuple[str, str, str]:
    """Texts of the kernel's time, its p20 to p80 range, and the difference of a repeated measurement (A/A)."""
    if "us" not in row:
        return "", "", ""
    spread = abs(row["again_us"] / row["us"] - 1) if "again_us" in row else None
    noise = "" if spread is None else f"{spread:.1%}"
    return f"{row['us']:.1f}", f"{row['us_p20']:.1f}-{row['us_p80']:.1f}", noise


def _roofline(row: Row) -> str:
    """The largest share of a ceiling of this run, and the name of that ceiling."""
    shares = row.get("roofline")
    if not shares:
        return ""
    name = max(shares, key=shares.__getitem__)
    return f"{shares[name]:.0%} {name}"
