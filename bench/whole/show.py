"""The results of whole models as tables: one of the goals, and one of each model with everything that was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...demo.table import text_table
from ...demo.variants import FP32
from . import lines
from .goals import Checked, checks
from .lines import Row
from .suites import of

Draw = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

_PLAIN = {
    lines.COSINE: "{:.4f}",
    lines.WORST_COSINE: "{:.3f}",
    lines.SAME_TOP_1: "{:.3f}",
    lines.DISK: "{:.1f}",
    lines.KEPT: "{:.2f}",
    lines.RESIDENT: "{:.2f}",
}
_GOALS = ("model", "what", "nybble's best", "against", "reached", "goal", "")


def plain(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    return text_table(headers, rows, right=range(1, len(headers)))


def goals(rows: Sequence[Row], draw: Draw) -> str:
    """The table of the goals."""
    return draw(_GOALS, [_goal(checked) for checked in checks(rows, of(rows).goals)])


def _goal(checked: Checked) -> tuple[str, ...]:
    goal = checked.goal
    cosine = f", cosine >= {goal.least_cosine:g}" if goal.least_cosine is not None else ""
    against = f"time over {' or '.join(goal.over)}" if goal.over and goal.at_most else " or ".join(goal.over)
    unit = "x" if goal.over or goal.quantity == lines.RESIDENT else ""
    bound = "-" if checked.bound is None else f"{'<=' if goal.at_most else '>='} {checked.bound:g}{unit}"
    text = "{:.2f}" if goal.over else _PLAIN.get(goal.quantity, "{:.2f}")
    value = "-" if checked.value is None else f"{text.format(checked.value)}{unit}"
    return (
        goal.model,
        f"{goal.quantity}{cosine}",
        (checked.ours or "-").removeprefix("nybble "),
        checked.other if len(goal.over) > 1 and checked.other else against,
        value,
        bound,
        checked.verdict,
    )


def models(rows: Sequence[Row], draw: Draw) -> list[str]:
    """A table of each model, then why contestants are missing."""
    skipped = dict.fromkeys(f"- not run: {row['contestant']}: {row['reason']}" for row in rows if row["kind"] == "skip")
    return [*tables(rows, draw), *(["\n".join(skipped)] if skipped else [])]


def tables(rows: Sequence[Row], draw: Draw) -> list[str]:
    """A table of each model: times of a step in milliseconds and their ratio to the first contestant, and the rest."""
    return [f"{model}:\n\n{draw(*_model(rows, model))}" for model in lines.models(rows)]


def _model(rows: Sequence[Row], model: str) -> tuple[list[str], list[list[str]]]:
    mine = [row for row in rows if row["kind"] == lines.KIND and row["model"] == model]
    quantities = list(dict.fromkeys(row["quantity"] for row in mine))
    contestants = list(dict.fromkeys((FP32, *(row["contestant"] for row in mine))))
    headers = ["contestant", *(name if name in _PLAIN else f"{name}, ms" for name in quantities)]
    cells = [[name, *(_cell(rows, model, quantity, name, FP32) for quantity in quantities)] for name in contestants]
    return headers, cells


def _cell(rows: Sequence[Row], model: str, quantity: str, contestant: str, reference: str) -> str:
    value = lines.value_of(rows, model, quantity, contestant)
    if value is None:
        return "-"
    if quantity in _PLAIN:
        return _PLAIN[quantity].format(value)
    base = lines.value_of(rows, model, quantity, reference)
    return f"{value * 1e3:.4g}" + (f" ({base / value:.2f}x)" if base else "")
