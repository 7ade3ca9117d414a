"""What the kernels are to reach on a GPU, as data, and the table of what they did.

A Goal: a scheme and a shape, what it is compared with, and how many times as fast it is to be. A Limit: a figure of one
thing alone. The numbers are the design's for an H200; on another GPU they are shown and judge nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..demo.table import text_table
from .goals import word

BF16, INT8 = "torch bf16", "torch int_mm"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """kernel: the number of the design; speedup: over the peer `over`, at least."""

    kernel: str
    scheme: str
    m: int
    n: int
    k: int
    over: str
    speedup: float

    @property
    def key(self) -> str:
        """What a result of it is filed under."""
        return f"{self.kernel} {self.scheme} {self.n}x{self.k} m={self.m} over {self.over}"


@dataclass(frozen=True)
class Limit:
    """A figure of one thing alone, at least or at most a bound.

    what: an operation of gpu_operations, or a scheme; figure: of FIGURES.
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
        """What a result of it is filed under."""
        return f"{self.kernel} {self.what} {self.n}x{self.k} m={self.m} {self.figure}"

    def reached(self, row: Row) -> float:
        """The figure of a result."""
        return FIGURES[self.figure].of(row)

    def met(self, row: Row) -> bool:
        """Whether a result has reached it."""
        value = self.reached(row)
        return value <= self.bound if FIGURES[self.figure].at_most else value >= self.bound


@dataclass(frozen=True)
class Figure:
    """How a figure follows from a result, whether it is to be low, and how it is written."""

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


def _each(kernel: str, scheme: str, over: str, shape: tuple[int, int], by_m: dict[int, float]) -> tuple[Goal, ...]:
    return tuple(Goal(kernel, scheme, m, *shape, over, speedup) for m, speedup in by_m.items())


_LARGE, _MIDDLE, _SMALL = (8192, 8192), (28672, 4096), (4096, 4096)
_HUGE = (14336, 8192)  # more than 100 M weights
GOALS: tuple[Goal, ...] = (
    *_each("K1", "w4a16g128", BF16, _SMALL, {1: 1.8}),
    *_each("K1", "w4a16g128", BF16, _LARGE, {1: 3.2}),
    *_each("K1", "w4a16g128", BF16, _MIDDLE, {1: 3.4}),
    *_each("K2", "w4a16g128", BF16, _LARGE, {16: 3.0, 32: 2.7, 64: 1.8}),
    *_each("K3", "w4a16g128", BF16, _LARGE, {128: 1.25, 256: 0.9}),
    *_each("K4", "w8a8", BF16, _LARGE, {1: 1.6, 16: 1.6, 64: 1.6, 4096: 1.5}),
    *_each("K4", "w8a8", INT8, _LARGE, {32: 1.3, 128: 1.3, 512: 1.3, 1024: 1.1, 4096: 1.1}),
    *_each("K6", "w4a8g128", BF16, _LARGE, {16: 2.8, 32: 2.8, 64: 2.6, 128: 1.9, 256: 1.5}),
    *_each("K7", "sp24w8a16", BF16, _HUGE, {1: 2.5, 16: 2.5}),
    *_each("K7", "sp24w4a16g128", BF16, _HUGE, {1: 3.8, 16: 3.8}),
    *_each("K7", "sp24w16a16", BF16, _HUGE, {1: 1.5, 16: 1.5}),
    *_each("K8", "bs64x64w8a8:75%", BF16, _LARGE, {16: 2.5, 64: 2.5}),
    *_each("K8", "bs64x64w8a8:90%", BF16, _LARGE, {16: 5.0, 64: 5.0, 2048: 6.5}),
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


ALL: tuple[Goal | Limit, ...] = (*GOALS, *LIMITS)


def table(results: Iterable[Row]) -> str:
    """The goals and limits with what was measured, in their order; what was not says so."""
    by_key = {row["key"]: row for row in results}
    lines = [_line(goal, by_key.get(goal.key)) for goal in ALL]
    headers = ("kernel", "of", "N x K", "M", "runs", "us", "p20-p80", "A/A", "over", "goal", "reached", "")
    return text_table(headers, lines, right=(3, 5, 7, 9, 10))


UNMEASURED = "not measured on a GPU yet"


def markdown(results: Iterable[Row] = ()) -> str:
    """The same for a README, the tokens of one shape together."""
    by_key = {row["key"]: row for row in results}
    groups: dict[tuple[str, str, str], list[Goal | Limit]] = {}
    for goal in ALL:
        what, over, _ = _asked(goal)
        groups.setdefault((what, _shape(goal), over), []).append(goal)
    lines = ["| of | N x K | over | goal | reached |", "| --- | --- | --- | --- | --- |"]
    for cells, goals in groups.items():
        aims = "; ".join(_words(goal, _asked(goal)[2]) for goal in goals)
        reached = "; ".join(_words(goal, *_outcome(goal, by_key[goal.key])) for goal in goals if goal.key in by_key)
        lines.append(f"| {' | '.join((*cells, aims, reached or UNMEASURED))} |")
    return "\n".join(lines)


def _shape(goal: Goal | Limit) -> str:
    return f"{goal.n or '-'}x{goal.k}"


def _words(goal: Goal | Limit, *words: str) -> str:
    return " ".join(part for part in (f"M={goal.m}" if goal.m else "", *words) if part)


def _asked(goal: Goal | Limit) -> tuple[str, str, str]:
    """What is judged, over what or by which figure, and the bound."""
    if isinstance(goal, Goal):
        return goal.scheme, goal.over, f"{goal.speedup:.2f}x"
    kind = FIGURES[goal.figure]
    return goal.what, goal.figure, f"{'<=' if kind.at_most else '>='} {kind.text.format(goal.bound)}"


def _outcome(goal: Goal | Limit, row: Row) -> tuple[str, str]:
    """What was reached, and whether that is enough, or why nothing was."""
    if "reason" in row:
        return "", row["reason"]
    if isinstance(goal, Goal):
        speedup = row["over_us"] / row["us"]
        return f"{speedup:.2f}x", word(speedup >= goal.speedup)
    return FIGURES[goal.figure].text.format(goal.reached(row)), word(goal.met(row))


def _line(goal: Goal | Limit, row: Row | None) -> tuple[str, ...]:
    what, over, aim = _asked(goal)
    start = (goal.kernel, what, _shape(goal), str(goal.m or "-"))
    if row is None or "reason" in row:
        return (*start, "", "", "", "", over, aim, "", UNMEASURED if row is None else row["reason"])
    return (*start, row.get("runs", ""), *_times(row), over, aim, *_outcome(goal, row))


def _times(row: Row) -> tuple[str, str, str]:
    """The kernel's time, its spread, and how far a second measurement of the same lies from it."""
    if "us" not in row:
        return "", "", ""
    spread = abs(row["again_us"] / row["us"] - 1) if "again_us" in row else None
    noise = "" if spread is None else f"{spread:.1%}"
    return f"{row['us']:.1f}", f"{row['us_p20']:.1f}-{row['us_p80']:.1f}", noise
