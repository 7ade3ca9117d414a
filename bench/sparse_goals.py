"""The performance targets of ``--preset sparse-targets`` as data, and the table of targets and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..demo.table import text_table
from .goals import BF16, DENSE, OF_BYTES, Checked, Limit, Row, Target, check, word

MS = (1, 16, 256)
SHAPES = ((4096, 4096), (4096, 14336))
BASELINES = ("w8a8", "w4a8g128")
LEGEND = (
    "speed over nybble's dense kernel of the same width: geometric mean of the shapes (worst shape) / target; met if the "
    "worst shape reaches it; then the worst speed over torch bf16. of bytes: that speed over the ratio of bytes read"
)
# For block sparsity at M = 1: smallest speed over dense, as a share of the ratio of bytes read.
LEAST_OF_BYTES = 0.85

# Kind of weight (see WeightKind.parse) -> smallest speed over dense for each M; None: no target.
_RATIOS: dict[str, tuple[float | None, float | None, float | None]] = {
    "sp50w8a8": (1.4, 1.0, 0.9),
    "sp70w8a8": (1.4, 1.1, 1.2),
    "sp80w8a8": (1.9, 1.4, 1.6),
    "sp90w8a8": (3.2, 2.0, 2.4),
    "sp95w8a8": (5.0, 3.2, 3.2),
    "sp32of128w8a8": (1.8, 1.6, 1.8),
    "sp16of128w8a8": (3.6, 3.0, 3.2),
    "sp8of128w8a8": (6.0, 6.0, 5.0),
    "sp24w8a8": (1.4, 1.0, 0.9),
    "sp50w4a8g128": (1.25, None, None),
    "sp32of128w4a8g128": (1.3, None, None),
    "bs32x32w8a8:50%": (None, None, 1.8),
    "bs32x32w8a8:75%": (None, None, 3.3),
    "bs32x32w8a8:90%": (None, None, 7.0),
}
KINDS = tuple(_RATIOS)
TARGETS = tuple(
    Target(kind, m, DENSE, ratio)
    for kind, ratios in _RATIOS.items()
    for m, ratio in zip(MS, ratios, strict=True)
    if ratio is not None
)
LIMITS = tuple(Limit(kind, 1, OF_BYTES, LEAST_OF_BYTES, at_most=False) for kind in KINDS if kind.startswith("bs"))


@dataclass(frozen=True)
class Place:
    """The results of a kind of weight at an M, with its targets, if any."""

    over_dense: Checked
    over_bf16: Checked
    goals: tuple[Checked, ...]

    def __str__(self) -> str:
        dense, bf16 = self.over_dense, self.over_bf16
        if dense.mean is None:
            return " ".join(("-", *(f"/ {_asked(checked)}" for checked in self.goals)))
        parts = [f"{dense.mean:.2f}x ({dense.worst:.2f}x)", *(f"/ {_asked(checked)}" for checked in self.goals)]
        return " ".join((*parts, *([] if bf16.worst is None else [f"[{bf16.worst:.1f}x bf16]"])))


def checks(rows: Sequence[Row]) -> list[Checked]:
    """The checks of all targets, in the order of the table, then of the limits."""
    goals: tuple[Target | Limit, ...] = (*TARGETS, *LIMITS)
    return [check(goal, rows) for goal in goals]


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table of targets and results; below it one line per missed target."""
    found = checks(rows)
    places = {(kind, m): _place(kind, m, rows, found) for kind in KINDS for m in MS}
    headers = ("", *(f"M={m}" for m in MS))
    lines = [(kind, *(str(places[kind, m]) for m in MS)) for kind in KINDS]
    if markdown:
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in (headers, ("---",) * len(headers), *lines))
    else:
        drawn = text_table(headers, lines)
    return "\n".join((LEGEND, "", drawn, "", *(_miss(checked) for checked in found if checked.met is False)))


def _place(kind: str, m: int, rows: Sequence[Row], found: Sequence[Checked]) -> Place:
    over_dense, over_bf16 = (check(Target(kind, m, baseline, 0.0), rows) for baseline in (DENSE, BF16))
    return Place(over_dense, over_bf16, tuple(v for v in found if (v.goal.scheme, v.goal.m) == (kind, m)))


def _asked(checked: Checked) -> str:
    goal = checked.goal
    if isinstance(goal, Target):
        return f"{goal.ratio:g}x {word(checked.met)}"
    reached = "-" if checked.worst is None else f"{checked.worst:.2f}"
    return f"{reached} of bytes, >= {goal.bound:g} {word(checked.met)}"


def _miss(checked: Checked) -> str:
    goal = checked.goal
    what = "x of dense" if isinstance(goal, Target) else " of the ratio of bytes read"
    bound = goal.ratio if isinstance(goal, Target) else goal.bound
    return f"MISSED {goal.scheme} M={goal.m}: {checked.worst:.2f}{what} at {checked.worst_shape}, target {bound:g}"


def is_of(row: Mapping[str, object]) -> bool:
    """Whether a result line is a target of this preset."""
    return row["kind"] == "target" and row["scheme"] in KINDS
