"""The Pareto front of a plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import ChosenPlan, Point


def draw(plan: ChosenPlan, path: str | os.PathLike[str]) -> None:
    """Harm over bytes, or over milliseconds where those are what counts. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'nybble[bench]'") from error

    timed = plan.kind == "ms"
    cost: Callable[[Point], float] = (lambda point: point.ms or 0.0) if timed else (lambda point: point.nbytes / 1e6)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_line([(cost(p), p.predicted) for p in plan.front]), "-", color="gray", label="front, predicted")
    for name, point in plan.uniform.items():
        axes.plot(cost(point), _harm(point), "s", label=f"all {name}")
    axes.plot(*_line([(cost(p), _harm(p)) for p in plan.tried]), "x", color="gray", label="tried, measured")
    axes.plot(cost(plan.chosen), _harm(plan.chosen), "*", markersize=14, color="black", label="chosen, measured")
    if plan.kind != "harm":
        axes.axvline(plan.limit if timed else plan.limit / 1e6, linestyle=":", color="gray")
    axes.set_yscale("log")
    axes.set_xlabel(f"ms at M={plan.m}" if timed else "MB of weights")
    axes.set_ylabel("harm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _harm(point: Point) -> float:
    return point.predicted if point.measured is None else point.measured.value


def _line(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
