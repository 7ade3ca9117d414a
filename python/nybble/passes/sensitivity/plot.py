"""Bars of harm, a row for each layer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Sensitivity

_MOST = 40  # layers that are drawn


def draw(found: Sensitivity, path: str | os.PathLike[str]) -> None:
    """The layers that suffer most, by scheme, on a logarithmic axis. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'nybble[bench]'") from error

    layers = found.layers[:_MOST]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for scheme in found.schemes:
        known = [(i, layer.damage[scheme].harm) for i, layer in enumerate(layers) if scheme in layer.damage]
        places, values = [i for i, _ in known], [harm.value for _, harm in known]
        axes.plot(values, places, "o", label=scheme, markersize=5)
        color = axes.lines[-1].get_color()
        for place, harm in known:
            if harm.low is not None and harm.high is not None:
                axes.plot((harm.low, harm.high), (place, place), "-", color=color, alpha=0.5)
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel({"kl": "KL, nats a token", "output": "squared change of the output over its square"}[found.damage])
    axes.set_title("Harm of each scheme in this layer alone, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path)
