"""The plot of a plan: harm against cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

XY = tuple[float, float]  # cost, harm


class Chart(NamedTuple):
    """The data of the plot. ``limit``: the budget as a cost, or None if the budget limits harm."""

    front: Sequence[XY]
    uniform: Mapping[str, XY]
    tried: Sequence[XY]
    chosen: XY
    limit: float | None
    cost_label: str


def draw(chart: Chart, path: str | os.PathLike[str]) -> None:
    """Write the plot to a file of a format that matplotlib supports. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'nybble[bench]'") from error

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_columns(chart.front), "-", color="gray", label="front, predicted")
    for name, point in chart.uniform.items():
        axes.plot(*point, "s", label=f"all {name}")
    axes.plot(*_columns(chart.tried), "x", color="gray", label="tried, measured")
    axes.plot(*chart.chosen, "*", markersize=14, color="black", label="chosen, measured")
    if chart.limit is not None:
        axes.axvline(chart.limit, linestyle=":", color="gray")
    axes.set_yscale("log")
    axes.set_xlabel(chart.cost_label)
    axes.set_ylabel("harm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _columns(points: Sequence[XY]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
