"""What the kernels are to reach on a GPU, as data, and the table of what they did.

Of each goal: a scheme and a shape, what it is compared with, and how many times as fast it is to be. The numbers are the
design's for an H200; on another GPU they are shown and judge nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..demo.table import text_table

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


def _each(kernel: str, scheme: str, over: str, shape: tuple[int, int], by_m: dict[int, float]) -> tuple[Goal, ...]:
    return tuple(Goal(kernel, scheme, m, *shape, over, speedup) for m, speedup in by_m.items())


_LARGE, _MIDDLE, _SMALL = (8192, 8192), (28672, 4096), (4096, 4096)
GOALS: tuple[Goal, ...] = (
    *_each("K1", "w4a16g128", BF16, _SMALL, {1: 1.8}),
    *_each("K1", "w4a16g128", BF16, _LARGE, {1: 3.2}),
    *_each("K1", "w4a16g128", BF16, _MIDDLE, {1: 3.4}),
    *_each("K2", "w4a16g128", BF16, _LARGE, {16: 3.0, 32: 2.7, 64: 1.8}),
    *_each("K3", "w4a16g128", BF16, _LARGE, {128: 1.25, 256: 0.9}),
    *_each("K4", "w8a8", BF16, _LARGE, {1: 1.6, 16: 1.6, 64: 1.6, 4096: 1.5}),
    *_each("K4", "w8a8", INT8, _LARGE, {32: 1.3, 128: 1.3, 512: 1.3, 1024: 1.1, 4096: 1.1}),
    *_each("K6", "w4a8g128", BF16, _LARGE, {16: 2.8, 32: 2.8, 64: 2.6, 128: 1.9, 256: 1.5}),
    *_each("K8", "bs64x64w8a8:75%", BF16, _LARGE, {16: 2.5, 64: 2.5}),
    *_each("K8", "bs64x64w8a8:90%", BF16, _LARGE, {16: 5.0, 64: 5.0, 2048: 6.5}),
)


def table(results: Iterable[Row]) -> str:
    """The goals with what was measured, in the order of GOALS; what was not says so."""
    by_key = {row["key"]: row for row in results}
    lines = [_line(goal, by_key.get(goal.key)) for goal in GOALS]
    headers = ("kernel", "scheme", "N x K", "M", "runs", "us", "p20-p80", "over", "goal", "reached", "")
    return text_table(headers, lines, right=(3, 5, 8, 9))


def _line(goal: Goal, row: Row | None) -> tuple[str, ...]:
    start = (goal.kernel, goal.scheme, f"{goal.n}x{goal.k}", str(goal.m))
    aim = f"{goal.speedup:.2f}x"
    if row is None:
        return (*start, "", "", "", goal.over, aim, "", "not measured")
    if "reason" in row:
        return (*start, "", "", "", goal.over, aim, "", row["reason"])
    speedup = row["over_us"] / row["us"]
    verdict = "yes" if speedup >= goal.speedup else "NO"
    times = (f"{row['us']:.1f}", f"{row['us_p20']:.1f}-{row['us_p80']:.1f}")
    return (*start, row["runs"], *times, goal.over, aim, f"{speedup:.2f}x", verdict)
