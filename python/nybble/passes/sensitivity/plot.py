"""A plot of the harm of each scheme, one row for each layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ...evaluate.result import Metric

MOST_LAYERS = 40  # in one plot


def draw(
    layers: Sequence[str], harm: Mapping[str, Mapping[str, Metric]], label: str, path: str | os.PathLike[str]
) -> None:
    """Plot the harm on a logarithmic axis.

    Args:
        layers: names, from top to bottom; the first 40 are plotted.
        harm: scheme -> layer -> harm; layers may be missing.
        label: of the axis.
        path: a file of a format that matplotlib supports.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'nybble[bench]'") from error

    layers = layers[:MOST_LAYERS]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for scheme, by_layer in harm.items():
        known = [(i, by_layer[name]) for i, name in enumerate(layers) if name in by_layer]
        places, values = [i for i, _ in known], [metric.value for _, metric in known]
        axes.plot(values, places, "o", label=scheme, markersize=5)
        color = axes.lines[-1].get_color()
        for place, metric in known:
            if metric.low is not None and metric.high is not None:
                axes.plot((metric.low, metric.high), (place, place), "-", color=color, alpha=0.5)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_title("Harm of each scheme in this layer alone, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path)
