"""The roofline plot: attained rate over arithmetic intensity (operations per byte)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .report_cells import Row
from .weights import WeightKind

_OURS = {
    "w4a8": "#0b6bcb",
    "w4a16": "#00a3a3",
    "w8a8": "#d1480f",
    "w8a16": "#b8860b",
    "spw4a8": "#6fa8e0",
    "spw4a16": "#7fd0d0",
    "spw8a8": "#7b3fb5",
    "spw8a16": "#c9b3e6",
    "bsw8a8": "#2e8b57",
}
_PEERS = {4: "v", 8: "s", 16: "o", 32: "D"}
_GREY, _INK = "#8d949e", "#30363d"
# From the narrowest; a peak that equals the one before is not drawn twice, and older files lack some.
_COMPUTE = {"int4_gops": "int4", "int7_gops": "int7", "int8_gops": "int8", "bf16_gflops": "bf16", "fp32_gflops": "fp32"}


def roofline_png(rows: Sequence[Row]) -> bytes:
    """A PNG with a panel for each (threads, cache) in the results.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no results, or no line of kind "run" with the ceilings.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    results = [row for row in rows if row["kind"] == "result"]
    run = next((row for row in rows if row["kind"] == "run"), None)
    if not results or run is None:
        raise ValueError("no results with their ceilings: nothing to plot")
    panels = list(dict.fromkeys((row["threads"], row["cache"]) for row in results))
    figure: Any = Figure(figsize=(8.2 * len(panels), 6.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (threads, cache) in zip(axes, panels, strict=True):
        chosen = [row for row in results if (row["threads"], row["cache"]) == (threads, cache)]
        _panel(axis, chosen, run["ceilings"]["threads"][str(threads)])
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}, {cache} weights", color=_INK, loc="left")
    figure.suptitle(f"{run['cpu']}, {run['date'][:10]}", color=_INK, x=0.01, ha="left", fontsize=10)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _points(rows: Sequence[Row]) -> Iterator[tuple[float, float, Row]]:
    for row in rows:
        kept = row.get("kept", 1.0)  # missing in older files, which have no sparse weights
        yield 2 * row["m"] * row["n"] * row["k"] * kept / row["bytes"], row["gops"], row


def _panel(axis: Any, rows: Sequence[Row], limits: Mapping[str, float]) -> None:
    points = list(_points(rows))
    left, right = min(x for x, _, _ in points) / 1.5, max(x for x, _, _ in points) * 2
    top = max(_peaks(limits).values())
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(y for _, y, _ in points) / 1.6, top * 1.6))
    axis.set_xlabel("operations per byte of weights, activations and output")
    axis.set_ylabel("attained: 10⁹ operations per second")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:g}")
    axis.grid(which="major", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _ceilings(axis, limits, left, right)
    for bits, marker in _PEERS.items():
        _marks(axis, [p for p in points if p[2]["peer"] and p[2]["weight_bits"] == bits], f"peers, {bits} bit", marker)
    for family, colour in _OURS.items():
        ours = [p for p in points if not p[2]["peer"] and WeightKind.parse(p[2]["scheme"]).scheme.family == family]
        _marks(axis, ours, f"nybble {family}", _PEERS[int(family.removeprefix("sp").removeprefix("bs")[1])], colour)


def _marks(
    axis: Any, points: Sequence[tuple[float, float, Row]], label: str, marker: str, colour: str | None = None
) -> None:
    if not points:
        return
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    if colour is None:
        axis.scatter(xs, ys, s=26, marker=marker, facecolors="none", edgecolors=_GREY, linewidths=0.9, label=label)
    else:
        axis.scatter(
            xs, ys, s=46, marker=marker, color=colour, edgecolors="white", linewidths=0.6, label=label, zorder=3
        )


def _peaks(limits: Mapping[str, float]) -> dict[str, float]:
    """The multiply rates to draw, by name: of equal ones the last."""
    names = {limits[key]: name for key, name in _COMPUTE.items() if key in limits}
    return {name: rate for rate, name in names.items()}


def _ceilings(axis: Any, limits: Mapping[str, float], left: float, right: float) -> None:
    """Memory bandwidths as slopes up to the highest peak; multiply rates as horizontal lines from the L3 slope on."""
    peaks = _peaks(limits)
    top = max(peaks.values())
    dram, l3 = max(limits["dram_gbps"], limits["dram_huge_gbps"]), limits["l3_gbps"]
    for name, rate, style in (("DRAM", dram, "-"), ("L3", l3, ":")):
        axis.plot(
            [left, min(top / rate, right)], [left * rate, min(top, right * rate)], style, color=_INK, linewidth=1.2
        )
        x = left * 1.12
        slope = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
        _label(axis, f"{name} {rate:.0f} GB/s", (x, x * rate), (0, 4), **slope)
    for name, rate in peaks.items():
        axis.plot([min(max(left, rate / l3), right), right], [rate, rate], "-", color=_INK, linewidth=1.2)
        _label(axis, f"{name} {rate:.0f}", (right, rate), (5, -3))


def _label(axis: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **options: Any) -> None:
    axis.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=8.5, color=_INK, **options)
