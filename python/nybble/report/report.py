"""What a pass did to each layer of a model, as data, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..dispatch.selection import FIRST_CALL

SCHEMA = "nybble.report/1"


@dataclass(frozen=True)
class Pruned:
    """What pruning did to one layer.

    ``pattern`` is such as "sp50"; ``kept`` the share of weights that are not zero; ``method`` the one that made the
    mask in the end, with ``notes`` on why it was not the one that was asked for, and what else happened. ``error`` is
    the relative output error (Frobenius norm) of the new layer on calibration data that the method did not see, and
    ``error_dense`` that of rounding alone (0 where nothing is rounded); None where there was no data.
    ``permutation_gain`` is the relative gain in kept magnitude by permuting the inputs; None where they stand as they
    stood.
    """

    pattern: str
    kept: float
    method: str
    error_dense: float | None = None
    error: float | None = None
    permutation_gain: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rounded:
    """How one layer got its codes.

    ``method`` is the one that chose them in the end, with ``notes`` on why it was not the one that was asked for, and
    what else happened. ``error`` is the relative output error (Frobenius norm) of the new layer on calibration data that
    the method did not see, and ``error_rtn`` that of rounding to nearest; None where there was no data.
    """

    method: str
    error_rtn: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one weight that is not a Linear layer's.

    ``shape`` is (N, K) for a Linear layer and the parameter's own shape otherwise. ``nbytes_before`` and
    ``nbytes_after`` count memory once: of layers that share a weight, only one carries its bytes. ``sqnr_db`` is
    ``inf`` where quantization is exact and None where nothing was quantized. ``speedup`` maps M to dense time over
    nybble time and is empty where nothing was timed. ``reason`` says why the layer was left alone; it is None for a
    layer that was swapped. ``also`` holds the further names of a module that stands at several places.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    before: str
    after: str
    nbytes_before: int
    nbytes_after: int
    sqnr_db: float | None = None
    kernel: str | None = None
    speedup: dict[int, float] = field(default_factory=dict)
    slower_at: tuple[int, ...] = ()
    reason: str | None = None
    tied_to: str | None = None
    also: tuple[str, ...] = ()
    pruned: Pruned | None = None
    rounded: Rounded | None = None

    @property
    def swapped(self) -> bool:
        """Whether the layer was replaced."""
        return self.reason is None

    @property
    def mean_speedup(self) -> float | None:
        """Geometric mean of ``speedup`` over M, or None where nothing was timed."""
        return geometric_mean(tuple(self.speedup.values())) if self.speedup else None


@dataclass(frozen=True)
class Report:
    """All layers of a model after a pass. ``print(report)`` shows the table; ``to_json`` gives everything.

    ``weight_bytes`` counts every parameter of rank 2 and more once, Linear or not; ``weight_bytes_changed`` is the
    part of it that belongs to quantized layers. A layer that was quantized before the call counts as changed, with
    the bytes that its weight would take in its own dtype.
    """

    layers: tuple[LayerReport, ...]
    scheme: str
    goal: str
    method: str
    m: tuple[int, ...]
    machine: str
    threads: int
    weight_bytes: int
    weight_bytes_changed: int
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Percent of the model's weight bytes that changed; 0.0 for a model without weights."""
        return 100.0 * self.weight_bytes_changed / self.weight_bytes if self.weight_bytes else 0.0

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The layers and weights that were left alone, each with its ``reason``."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    @property
    def nbytes_before(self) -> int:
        """Bytes of all listed layers before the pass."""
        return sum(layer.nbytes_before for layer in self.layers)

    @property
    def nbytes_after(self) -> int:
        """Bytes of all listed layers after the pass."""
        return sum(layer.nbytes_after for layer in self.layers)

    def __str__(self) -> str:
        header = ["layer", "kind", "shape", "before", "after", "bytes", "->", "SQNR dB", "kernel"]
        header += [f"M={m}" for m in self.m] + ["mean"]
        rows = [header] + [_cells(layer, self.m) for layer in self.layers]
        for names, cells in ((("kept %",), _kept_cells), (("method", "error %", "->"), _error_cells)):
            if any(cells(layer) for layer in self.layers):
                header += names
                for row, layer in zip(rows[1:], self.layers, strict=True):
                    row += cells(layer) or ["-"] * len(names)
        header.append("note")
        for row, layer in zip(rows[1:], self.layers, strict=True):
            row.append(_note(layer))
        left_aligned = {0, 1, 3, 4, 8, len(header) - 1} | ({header.index("method")} if "method" in header else set())
        return "\n".join([*table(rows, left_aligned), "", *self._foot()])

    def _foot(self) -> list[str]:
        before, after = self.nbytes_before, self.nbytes_after
        ratio = f" ({before / after:.2f}x smaller)" if after and before != after else ""
        counts = f"{len(self.swapped)} of {len(self.layers)} layers swapped"
        lines = [
            f"{counts}, scheme {self.scheme}, method {self.method}, goal {self.goal}",
            f"listed bytes {_bytes(before)} -> {_bytes(after)}{ratio}",
            f"coverage {self.coverage:.1f} % of {_bytes(self.weight_bytes)} of weights",
            f"machine: {self.machine}, threads: {self.threads}",
        ]
        if self.goal == "speed":
            lines.append(
                "M=... : dense time / nybble time, above 1 is faster; a layer is swapped where the mean is above 1"
            )
        else:
            lines.append("speed was not measured (goal='memory')")
        if any("_triton" in (layer.kernel or "") for layer in self.layers):
            lines.append(f"..._triton : {FIRST_CALL}")
        if any(_error_cells(layer) for layer in self.layers):
            lines.append(
                "error % : of a layer's output on held-out calibration data, by rounding alone -> as it is now"
            )
        return lines

    def to_json(self) -> str:
        """Every field of the report and its layers, and the totals, as strict JSON.

        An infinite ``sqnr_db`` is the string "inf"; the keys of ``speedup`` are strings.
        """
        layers = []
        for layer in self.layers:
            entry: dict[str, Any] = asdict(layer)
            if layer.sqnr_db is not None and math.isinf(layer.sqnr_db):
                entry["sqnr_db"] = "inf"
            layers.append({**entry, "swapped": layer.swapped, "mean_speedup": layer.mean_speedup})
        totals = {
            "schema": SCHEMA,
            **{name: value for name, value in vars(self).items() if name != "layers"},
            "nbytes_before": self.nbytes_before,
            "nbytes_after": self.nbytes_after,
            "coverage": self.coverage,
            "layers": layers,
        }
        return json.dumps(totals, indent=2, allow_nan=False)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers. Raises ValueError when there are none."""
    if not values:
        raise ValueError("geometric_mean: values must not be empty")
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _cells(layer: LayerReport, ms: tuple[int, ...]) -> list[str]:
    mean = layer.mean_speedup
    return [
        " = ".join((layer.name, *layer.also)),
        layer.kind,
        "x".join(map(str, layer.shape)),
        layer.before,
        layer.after if layer.swapped else "-",
        _bytes(layer.nbytes_before),
        _bytes(layer.nbytes_after),
        "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        layer.kernel or "-",
        *(f"{layer.speedup[m]:.2f}" if m in layer.speedup else "-" for m in ms),
        "-" if mean is None else f"{mean:.2f}",
    ]


def _kept_cells(layer: LayerReport) -> list[str]:
    return [f"{100 * layer.pruned.kept:.2f}"] if layer.pruned else []


def _error_cells(layer: LayerReport) -> list[str]:
    """Method and errors; none of a layer whose codes are as plain as its report's method says."""
    if layer.pruned is not None:
        method, errors = layer.pruned.method, (layer.pruned.error_dense, layer.pruned.error)
    elif layer.rounded is not None and layer.rounded.error is not None:
        method, errors = layer.rounded.method, (layer.rounded.error_rtn, layer.rounded.error)
    else:
        return []
    return [method, *("-" if share is None else f"{100 * share:.2f}" for share in errors)]


def _note(layer: LayerReport) -> str:
    if layer.reason is not None:
        return f"left alone: {layer.reason}"
    notes = [f"tied to {layer.tied_to}"] if layer.tied_to else []
    if layer.slower_at:
        notes.append("slower at M=" + ", ".join(map(str, layer.slower_at)))
    if layer.pruned is not None:
        gain = layer.pruned.permutation_gain
        notes += [f"inputs permuted: {100 * gain:.2f} % more magnitude kept"] if gain is not None else []
        notes += layer.pruned.notes
    if layer.rounded is not None:
        notes += layer.rounded.notes
    return "; ".join(notes)


def table(rows: list[list[str]], left_aligned: set[int]) -> list[str]:
    """The lines of a table, ruled, under its first row; the columns that are left-aligned, by number."""
    last = len(rows[0]) - 1
    # the last column is free text: padding it would only add trailing blanks
    widths = [0 if i == last else max(len(row[i]) for row in rows) for i in range(last + 1)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left_aligned else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * last + len(rows[0][last]))
    return [lines[0], rule, *lines[1:], rule]
