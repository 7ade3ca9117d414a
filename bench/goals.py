"""The performance targets of ``--preset cpu-targets`` as data, and their evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import geometric_mean
from typing import Any

from ..demo.table import text_table

Row = Mapping[str, Any]

MS = (1, 4, 16, 64, 256)
PEER, BF16, DENSE = "best peer of its width", "torch bf16", "nybble's dense kernel"
LEGEND = (
    "speed over the baseline: geometric mean of the shapes (worst shape) / target; met if the worst shape reaches it; "
    "*: over torch bf16, else over the best peer of the same weight width"
)
STAR = "\\*"
_KEYS = {PEER: "vs_peer", BF16: "vs_bf16", DENSE: "vs_dense"}


@dataclass(frozen=True)
class Target:
    """At M = m, `scheme` must be at least `ratio` times as fast as the baseline on every shape."""

    scheme: str
    m: int
    baseline: str
    ratio: float


@dataclass(frozen=True)
class Limit:
    """At M = m, the figure `name` of `scheme` must be at least, or at most, `bound` on every shape."""

    scheme: str
    m: int
    name: str
    bound: float
    at_most: bool


def _row(scheme: str, *ratios: float, dense_from: int = 5) -> tuple[Target, ...]:
    """One line of the table; from column `dense_from` on, the baseline is torch bf16."""
    return tuple(
        Target(scheme, m, BF16 if column >= dense_from else PEER, ratio)
        for column, (m, ratio) in enumerate(zip(MS, ratios, strict=True))
    )


TARGETS = (
    *_row("w4a8g128", 1.15, 1.3, 2.2, 1.8, 1.8),
    *_row("w4a16g128", 1.0, 1.2, 1.3, 1.1, 0.9, dense_from=4),
    *_row("w8a8", 1.0, 1.1, 1.3, 1.2, 1.08),
    *_row("w8a16", 1.0, 1.1, 1.2, 1.0, 0.9, dense_from=2),
)
OF_BOUND, GOPS, OF_BYTES = "time over the byte bound", "GOP/s", "speed over dense, of its bytes over"
LIMITS = (Limit("w4a8g128", 1, OF_BOUND, 1.15, at_most=True), Limit("w8a8", 256, GOPS, 1800, at_most=False))
_FIGURES: dict[str, Callable[[Row], float | None]] = {
    OF_BOUND: lambda row: 1 / row["roofline"],
    GOPS: lambda row: row["gops"],
    OF_BYTES: lambda row: row["vs_dense"] and row["vs_dense"] / row["bytes_vs_dense"],
}


@dataclass(frozen=True)
class Checked:
    """A target and the result: geometric mean over the shapes, value and name of the worst shape, peer (or baseline) there.

    met: whether the worst shape reaches the target; None if the baseline was not measured.
    """

    goal: Target | Limit
    mean: float | None = None
    worst: float | None = None
    worst_shape: str | None = None
    worst_peer: str | None = None

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        if isinstance(self.goal, Limit):
            return self.worst <= self.goal.bound if self.goal.at_most else self.worst >= self.goal.bound
        return self.worst >= self.goal.ratio

    def line(self) -> dict[str, Any]:
        """The check as a result line."""
        goal = asdict(self.goal)
        reached = {
            "mean": self.mean,
            "worst": self.worst,
            "worst_shape": self.worst_shape,
            "worst_peer": self.worst_peer,
        }
        return {"kind": "target", **goal, **reached, "met": self.met}


def word(met: bool | None) -> str:
    """met, MISSED or not measured."""
    return {True: "met", False: "MISSED", None: "not measured"}[met]


def check(goal: Target | Limit, rows: Iterable[Row]) -> Checked:
    """The check of a target by the results of its scheme, one per shape."""
    mine = [row for row in rows if row.get("scheme") == goal.scheme and row["m"] == goal.m]
    values = [value for value in (_reached(goal, row) for row in mine) if value is not None]
    if not values or len(values) < len(mine):
        return Checked(goal)
    lowest = not (isinstance(goal, Limit) and goal.at_most)
    worst = min(values) if lowest else max(values)
    row = mine[values.index(worst)]
    peer = None if isinstance(goal, Limit) else row["best_peer"] if goal.baseline == PEER else goal.baseline
    return Checked(goal, geometric_mean(values), worst, f"{row['n']}x{row['k']}", peer)


def _reached(goal: Target | Limit, row: Row) -> float | None:
    if isinstance(goal, Limit):
        return _FIGURES[goal.name](row)
    ratio: float | None = row[_KEYS[goal.baseline]]
    return ratio


def checks(rows: Sequence[Row]) -> list[Checked]:
    """The checks of all targets, in the order of the table, then of the limits."""
    goals: tuple[Target | Limit, ...] = (*TARGETS, *LIMITS)
    return [check(goal, rows) for goal in goals]


def table(found: Sequence[Checked], markdown: bool = False) -> str:
    """The table of targets, with mean, worst shape and target in each cell; below it one line per missed target."""
    ratios = {(v.goal.scheme, v.goal.m): v for v in found if isinstance(v.goal, Target)}
    schemes = list(dict.fromkeys(scheme for scheme, _ in ratios))
    headers = ("", *(f"M={m}" for m in MS))
    lines = [(scheme, *(_cell(ratios[scheme, m]) for m in MS)) for scheme in schemes]
    if markdown:
        lines = [("---",) * len(headers), *lines]
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in (headers, *lines))
    else:
        drawn = text_table(headers, lines)
    limits = [_limit_text(checked) for checked in found if isinstance(checked.goal, Limit)]
    misses = [
        f"MISSED {scheme} M={m}: {checked.worst:.2f}x of {checked.worst_peer} at {checked.worst_shape}"
        for scheme, m in product(schemes, MS)
        if (checked := ratios[scheme, m]).met is False
    ]
    return "\n".join((LEGEND, "", drawn, "", *limits, *misses)).replace("*", STAR if markdown else "*")


def _cell(checked: Checked) -> str:
    goal = checked.goal
    assert isinstance(goal, Target), "limits are printed below the table"  # noqa: S101
    target = f"{goal.ratio:g}x{'*' if goal.baseline == BF16 else ''}"
    if checked.mean is None:
        return f"- / {target} {word(None)}"
    return f"{checked.mean:.2f}x ({checked.worst:.2f}x) / {target} {word(checked.met)}"


def _limit_text(checked: Checked) -> str:
    goal = checked.goal
    assert isinstance(goal, Limit), "targets are printed in the table"  # noqa: S101
    asked = f"{goal.scheme} M={goal.m} {goal.name} {'<=' if goal.at_most else '>='} {goal.bound:g}"
    if checked.mean is None:
        return f"{asked}: {word(None)}"
    return f"{asked}: {checked.mean:.4g} (worst {checked.worst:.4g} at {checked.worst_shape}) {word(checked.met)}"
