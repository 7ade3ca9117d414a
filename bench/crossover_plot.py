"""Crossover maps as a plot, coloured by the fastest kernel; the text is the sparse kernel's speed over dense int8."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .crossover import ALTERNATIVES, INT4, INT8, SPARSE, Map
from .peers.torch_dense import BF16

COLOURS = {SPARSE: "#8fbff0", INT8: "#f3b38a", INT4: "#c9b3e6", BF16: "#cfd4da"}
INK = "#1f2328"
_COLUMNS = 2


def crossover_png(maps: Sequence[Map], heading: str) -> bytes:
    """A PNG with one panel per map: share of zeros on the x axis, M on the y axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    lines = -(-len(maps) // _COLUMNS)
    figure: Any = Figure(figsize=(7.2 * _COLUMNS, 3.1 * lines + 0.8), dpi=120, layout="constrained")
    axes = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for axis, found in zip(axes, maps, strict=False):
        _panel(axis, found)
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    figure.suptitle(f"{heading}: numbers are speed over dense int8", color=INK, x=0.01, ha="left", fontsize=10)
    legend = [Patch(color=colour, label=f"{ALTERNATIVES.get(who, who)} fastest") for who, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _panel(axis: Any, found: Map) -> None:
    for (zeros, m), cell in found.cells.items():
        x, y = found.zeros.index(zeros), found.ms.index(m)
        axis.bar(x, 0.94, 0.96, bottom=y - 0.47, color=COLOURS[cell.winner])
        speed = cell.over(INT8)
        if speed is not None:
            axis.text(x, y, f"{speed:.2f}{'?' if cell.noisy else ''}", ha="center", va="center", fontsize=8, color=INK)
    axis.set_xticks(range(len(found.zeros)), [f"{zeros:.4g} %" for zeros in (100 * zeros for zeros in found.zeros)])
    axis.set_yticks(range(len(found.ms)), [f"M={m}" for m in found.ms])
    axis.set(xlim=(-0.5, max(len(found.zeros), 3) - 0.5), ylim=(-0.5, len(found.ms) - 0.5))
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    axis.set_title(found.title, color=INK, loc="left", fontsize=9)
