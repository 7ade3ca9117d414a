"""Performance targets of presets as tables of data, their evaluation from results, and their text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import geometric_mean
from typing import Any

from ..demo.table import text_table
from .shapes import Shape

Row = Mapping[str, Any]

STAR = "\\*"


@dataclass(frozen=True)
class Value:
    """A measured value, the contestant that it is compared with, and the globs of needed peers that did not run."""

    value: float
    over: str | None = None
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """What a target bounds.

    of: takes a result and all results of its cell (itself included); None if what it is compared with was not measured.
    text: format of a value; unit: follows it once. at_most: whether the bound is an upper one. mark: follows the bound.
    peers: globs on the names of the peers that take part.
    """

    of: Callable[[Row, Sequence[Row]], Value | None]
    text: str = "{:.2f}x"
    unit: str = ""
    at_most: bool = False
    mark: str = ""
    peers: tuple[str, ...] = ()

    def meets(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


def over(*names: str, mark: str = "") -> Measure:
    """The speed over the fastest peer whose name matches one of the globs. Each glob needs a peer that ran."""

    def matches(_: Row, other: Row) -> bool:
        return other["peer"] and any(fnmatchcase(other["contestant"], name) for name in names)

    return Measure(faster_than(matches, names), mark=mark, peers=names)


def faster_than(
    admits: Callable[[Row, Row], bool], needs: Sequence[str] = ()
) -> Callable[[Row, Sequence[Row]], Value | None]:
    """The speed over the fastest result that `admits(mine, other)` lets in. needs: globs on names that must be there."""

    def of(mine: Row, cell: Sequence[Row]) -> Value | None:
        others = [row for row in cell if admits(mine, row)]
        best = min(others, key=lambda row: row["us"], default=None)
        if best is None:
            return None
        absent = [glob for glob in needs if not any(fnmatchcase(row["contestant"], glob) for row in others)]
        return Value(best["us"] / mine["us"], best["contestant"], tuple(absent))

    return of


@dataclass(frozen=True)
class Goal:
    """A cell of a table: at M = m, the fastest of nybble's contestants with one of `schemes` must reach `bound`.

    label: the line of the table. measure: key of the table's measures. bound: None: shown without a target.
    least_cosine: schemes whose cosine is smaller, or was not measured, do not count.
    """

    label: str
    schemes: tuple[str, ...]
    m: int
    measure: str
    bound: float | None
    least_cosine: float | None = None


@dataclass(frozen=True)
class Table:
    """The targets of a preset. by_mean: whether the geometric mean of the shapes must reach them; else the worst shape.

    beside: measure whose worst value is added in brackets to each cell that has a value.
    """

    legend: str
    ms: tuple[int, ...]
    shapes: tuple[Shape, ...]
    measures: Mapping[str, Measure]
    goals: tuple[Goal, ...]
    by_mean: bool = False
    beside: str | None = None

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of all goals, each once."""
        return tuple(dict.fromkeys(scheme for goal in self.goals for scheme in goal.schemes))

    @property
    def peers(self) -> tuple[str, ...]:
        """Globs on the names of all peers that the goals need."""
        return tuple(dict.fromkeys(name for goal in self.goals for name in self.measures[goal.measure].peers))


def line(
    label: str, measure: str, bounds: Mapping[int, float | None], schemes: Sequence[str] = (), **more: Any
) -> tuple[Goal, ...]:
    """The goals of a line of a table by M; lines with the same label are shown as one. schemes: default: the label."""
    return tuple(Goal(label, tuple(schemes) or (label,), m, measure, bound, **more) for m, bound in bounds.items())


@dataclass(frozen=True)
class Checked:
    """A goal and what was reached: geometric mean over the shapes, value and shape of the worst, contestant compared with.

    shapes: how many were measured, of how many. absent: globs of peers that it needs and that did not run at some shape.
    met: None if it has no bound, if not all shapes were measured, or if peers are absent and those that ran do not miss it.
    """

    goal: Goal
    shapes: tuple[int, int]
    mean: float | None = None
    worst: float | None = None
    worst_shape: str | None = None
    worst_peer: str | None = None
    absent: tuple[str, ...] = ()
    met: bool | None = None

    def line(self) -> dict[str, Any]:
        """The check as a result line."""
        return {"kind": "target", **asdict(self.goal), **{k: v for k, v in asdict(self).items() if k != "goal"}}


def word(met: bool | None) -> str:
    """met, MISSED or not measured."""
    return {True: "met", False: "MISSED", None: "not measured"}[met]


def check(goal: Goal, table: Table, rows: Iterable[Row]) -> Checked:
    """The check of a goal by results and, where it asks for a cosine, by lines of kind "cosine"."""
    rows = list(rows)
    measure, admitted = table.measures[goal.measure], _admitted(goal, rows)
    found: dict[Shape, Value] = {}
    for n, k in table.shapes:
        cell = [r for r in rows if r["kind"] == "result" and (r["m"], r["n"], r["k"]) == (goal.m, n, k)]
        mine = [row for row in cell if not row["peer"] and row["scheme"] in admitted]
        value = measure.of(min(mine, key=lambda row: row["us"]), cell) if mine else None
        if value is not None:
            found[n, k] = value
    count = (len(found), len(table.shapes))
    if not found:
        return Checked(goal, count)
    mean = geometric_mean(one.value for one in found.values())
    shape = (max if measure.at_most else min)(found, key=lambda shape: found[shape].value)
    worst = found[shape]
    absent = tuple(dict.fromkeys(glob for one in found.values() for glob in one.absent))
    met = None
    if goal.bound is not None and count[0] == count[1]:
        met = measure.meets(mean if table.by_mean else worst.value, goal.bound)
    judged = None if met and absent else met  # more peers could only lower what was reached
    return Checked(goal, count, mean, worst.value, f"{shape[0]}x{shape[1]}", worst.over, absent, judged)


def _admitted(goal: Goal, rows: Sequence[Row]) -> tuple[str, ...]:
    if goal.least_cosine is None:
        return goal.schemes
    known = {row["scheme"]: row["cosine"] for row in rows if row["kind"] == "cosine" and row["cosine"] is not None}
    return tuple(scheme for scheme in goal.schemes if scheme in known and known[scheme] >= goal.least_cosine)


def checks(table: Table, rows: Sequence[Row]) -> list[Checked]:
    """The checks of all goals, in order."""
    return [check(goal, table, rows) for goal in table.goals]


def show(table: Table, rows: Sequence[Row], markdown: bool = False) -> str:
    """The table, with mean, worst shape and target in each cell; below it what was admitted, left out and missed."""
    found = checks(table, rows)
    headers = ("", *(f"M={m}" for m in table.ms))
    labels = dict.fromkeys(checked.goal.label for checked in found)
    lines = [(label, *(_cell(table, label, m, found, rows) for m in table.ms)) for label in labels]
    if markdown:
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in (headers, ("---",) * len(headers), *lines))
    else:
        drawn = text_table(headers, lines)
    notes = (*_cosines(table, rows), *_left_out(table, rows), *(_miss(table, one) for one in found if one.met is False))
    return "\n".join((table.legend, "", drawn, *(("", *notes) if notes else ()))).replace(
        "*", STAR if markdown else "*"
    )


def _cell(table: Table, label: str, m: int, found: Sequence[Checked], rows: Sequence[Row]) -> str:
    mine = [checked for checked in found if (checked.goal.label, checked.goal.m) == (label, m)]
    parts = [_reached(table, checked) for checked in mine]
    if table.beside and mine and mine[0].mean is not None:
        beside = check(Goal(label, mine[0].goal.schemes, m, table.beside, None), table, rows)
        if beside.worst is not None:
            parts.append(f"[{table.measures[table.beside].text.format(beside.worst)} {table.beside}]")
    return ", ".join(parts)


def _reached(table: Table, checked: Checked) -> str:
    """What a goal reached and whether it is met: "1.20x (1.10x) / 1.15x met"."""
    goal, measure = checked.goal, table.measures[checked.goal.measure]
    aim = "" if goal.bound is None else f" / {_bound(measure, goal.bound)}{measure.mark}"
    if checked.mean is None or checked.worst is None:
        return f"-{aim} {word(None)}" if aim else "-"
    reached = f"{measure.text.format(checked.mean)} ({measure.text.format(checked.worst)}){measure.unit}"
    return f"{reached}{aim}{_verdict(checked)}"


def _verdict(checked: Checked) -> str:
    """Whether it is met, after a space, or why that is not known: " (1 of 2 shapes)", " without ggml q4"."""
    done, of = checked.shapes
    if done < of:
        return f" ({done} of {of} shapes)"
    if checked.goal.bound is None:
        return ""
    without = f" without {', '.join(glob.rstrip('_* ') for glob in checked.absent)}" if checked.absent else ""
    return without if without and checked.met is None else f" {word(checked.met)}{without}"


def _bound(measure: Measure, bound: float) -> str:
    """A bound with the unit of its measure: "1.15x", "75%"."""
    return f"{bound:.0%}" if "%" in measure.text else f"{bound:g}{'x' if measure.text.endswith('x') else ''}"


def _miss(table: Table, checked: Checked) -> str:
    goal, measure = checked.goal, table.measures[checked.goal.measure]
    assert checked.mean is not None and checked.worst is not None, "missed goals were measured"  # noqa: S101, PT018
    against = f" of {checked.worst_peer}" if checked.worst_peer else ""
    worst = f"{measure.text.format(checked.worst)}{against} at {checked.worst_shape}"
    reached = f"{measure.text.format(checked.mean)} (worst {worst})" if table.by_mean else worst
    return f"MISSED {goal.label} M={goal.m}: {reached}"


def _cosines(table: Table, rows: Iterable[Row]) -> list[str]:
    """What was measured of the accuracy that some goals ask for."""
    least = next((goal.least_cosine for goal in table.goals if goal.least_cosine is not None), None)
    if least is None:
        return []
    asked = dict.fromkeys(name for goal in table.goals if goal.least_cosine is not None for name in goal.schemes)
    known = {row["scheme"]: row for row in rows if row["kind"] == "cosine"}
    lines = []
    for scheme in asked:
        row = known.get(scheme, {"cosine": None, "reason": None})
        if row["cosine"] is None:
            why = f" ({row['reason']})" if row["reason"] else ""
            lines.append(f"{scheme}: cosine of MiniLM not measured{why}, not admitted")
        else:
            verdict = "admitted" if row["cosine"] >= least else "not admitted"
            lines.append(f"{scheme}: cosine of MiniLM {row['cosine']:.4f} (>= {least:g}), {verdict}")
    return lines


def _left_out(table: Table, rows: Iterable[Row]) -> list[str]:
    """The peers that the goals need and that did not run, with the reason."""
    skipped = {row["contestant"]: row["reason"] for row in rows if row["kind"] == "skip"}
    return [
        f"left out: {name}: {reason}"
        for name, reason in skipped.items()
        if any(fnmatchcase(name, glob) for glob in table.peers)
    ]
