"""The goals of whole models as data, and whether result lines meet them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from ...demo.variants import FP32
from ..goals import word
from ..machines import CLASSES
from . import lines
from .decoder import DECODE_1, DECODE_8, LLAMA, PREFILL
from .encoders import MINILM, VIT, WHISPER
from .lines import Row

OTHER = "other"  # every class of machines that a goal does not name


@dataclass(frozen=True)
class Goal:
    """What nybble must reach in a quantity of a model.

    bounds: key of machines.CLASSES, or OTHER -> the bound there.
    ours: globs on the names of nybble's contestants, of which the best counts. least_cosine: of those that count.
    over: globs on the names of contestants; the value is then how many times as fast nybble is as the fastest of them, each of
        which must have run. None: the value itself is bounded.
    at_most: the bound is an upper one; with `over`, of nybble's time over theirs.
    """

    model: str
    quantity: str
    bounds: Mapping[str, float]
    over: tuple[str, ...] = ()
    ours: tuple[str, ...] = ("nybble *",)
    least_cosine: float | None = None
    at_most: bool = False


def everywhere(bound: float) -> Mapping[str, float]:
    """The same bound on every machine."""
    return {OTHER: bound}


_ORT, _OV, _Q4 = "onnxruntime int8", "openvino int8", "llama.cpp Q4_0"
_ENCODERS = ((VIT, "batch 1"), (VIT, "batch 8"), (WHISPER, "30 s"))
GOALS = (
    Goal(MINILM.name, "batch 32", {"avx2": 1.1, OTHER: 1.3}, (_ORT,), least_cosine=0.998),
    Goal(MINILM.name, "batch 32", everywhere(1.4), (_ORT,), least_cosine=0.992),
    Goal(MINILM.name, "batch 32", {"avx2": 2.5}, (FP32,), least_cosine=0.992),
    Goal(MINILM.name, "batch 1", everywhere(1.25), (_ORT,), least_cosine=0.992),
    Goal(MINILM.name, "batch 1", everywhere(4), (FP32,), least_cosine=0.992),
    Goal(MINILM.name, lines.START, everywhere(1.2), (FP32,), ("nybble w8a8",), at_most=True),
    Goal(MINILM.name, lines.KEPT, everywhere(0.95), ours=("nybble w8a8",)),
    Goal(LLAMA.name, DECODE_1, everywhere(1.15), (_Q4,)),
    Goal(LLAMA.name, PREFILL, everywhere(2.5), (_Q4,)),
    Goal(LLAMA.name, DECODE_8, everywhere(2), (_Q4,)),
    Goal(LLAMA.name, lines.RESIDENT, everywhere(1.15), at_most=True),
    *(Goal(subject.name, case, everywhere(1.1), (_ORT, _OV), least_cosine=0.998) for subject, case in _ENCODERS),
)


@dataclass(frozen=True)
class Checked:
    """A goal and what was reached. ours, other: the contestants compared. bound: None: none on this machine.

    absent: globs of contestants that it needs and that did not run. met: None where that is not known.
    """

    goal: Goal
    bound: float | None
    value: float | None = None
    ours: str | None = None
    other: str | None = None
    absent: tuple[str, ...] = ()
    met: bool | None = None

    def line(self) -> dict[str, Any]:
        """The check as a result line."""
        goal = {f"goal_{key}" if key == "over" else key: value for key, value in asdict(self.goal).items()}
        return {"kind": "whole-goal", **goal, **{k: v for k, v in asdict(self).items() if k != "goal"}}

    @property
    def verdict(self) -> str:
        """met, MISSED or not measured, and without whom."""
        if self.bound is None:
            return "no goal here"
        without = f" without {', '.join(self.absent)}" if self.absent else ""
        return f"{word(self.met)}{without}"


def kind_of(targets: Sequence[str]) -> str:
    """The class of a machine that runs these targets, the last being the fastest."""
    return next((key for key, one in CLASSES.items() if targets and targets[-1] in one.targets), OTHER)


def check(goal: Goal, rows: Sequence[Row], kind: str) -> Checked:
    """The check of a goal by result lines. kind: class of the machine."""
    bound = goal.bounds.get(kind, goal.bounds.get(OTHER))
    measured = lines.of(rows, goal.model, goal.quantity)
    mine = [row for row in measured if not row["peer"] and _any(row, goal.ours) and _accurate(row, goal, rows)]
    others = [row for row in measured if _any(row, goal.over)]
    absent = tuple(glob for glob in goal.over if not any(_any(row, (glob,)) for row in others))
    if not mine or (goal.over and not others):
        return Checked(goal, bound, absent=absent)
    # Times are the better the shorter they are, and so is a bounded value with an upper bound.
    best = (min if goal.over or goal.at_most else max)(mine, key=_value)
    value, other = best["value"], None
    if goal.over:
        fastest = min(others, key=_value)
        other = fastest["contestant"]
        value = value / fastest["value"] if goal.at_most else fastest["value"] / value
    met = None if bound is None else (value <= bound if goal.at_most else value >= bound)
    judged = None if met and absent else met  # more peers could only lower what was reached
    return Checked(goal, bound, value, best["contestant"], other, absent, judged)


def _value(row: Row) -> float:
    return float(row["value"])


def _any(row: Row, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(row["contestant"], glob) for glob in globs)


def _accurate(row: Row, goal: Goal, rows: Sequence[Row]) -> bool:
    if goal.least_cosine is None:
        return True
    cosine = lines.value_of(rows, goal.model, lines.COSINE, row["contestant"])
    return cosine is not None and cosine >= goal.least_cosine


def checks(rows: Sequence[Row], goals: Sequence[Goal]) -> list[Checked]:
    """The checks of goals, in order, by the lines of a run."""
    run = next((row for row in rows if row["kind"] == "run"), {})
    return [check(goal, rows, kind_of(run.get("targets", ()))) for goal in goals]
