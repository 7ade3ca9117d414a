"""What a pass did to each layer of a model, as a table with notes, totals, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..dispatch.selection import FIRST_CALL
from ..text import Part, Shown
from ..text.shown import text_of
from .advice import advice
from .columns import drawn, error_of, size
from .data import ReportData
from .fold import Row, rows

# For each goal that is timed, where the interval of a layer that is swapped lies.
_SWAPPED = {"speed": "is above 1", "no_slower": "reaches 1 or more"}


@dataclass(frozen=True)
class Report(ReportData, Shown):
    """All layers of a model after a pass. ``print(report)`` shows the table; ``to_json`` gives everything.

    Layers that differ only in their index share a row; ``table(fold=False)`` gives each its own.

    ``weight_bytes`` counts every parameter of rank 2 and more once, Linear or not; ``weight_bytes_changed`` is the
    part of it that belongs to quantized layers. A layer that was quantized before the call counts as changed, with
    the bytes that its weight would take in its own dtype.
    """

    def table(self, fold: bool = True) -> str:
        """The table and its notes; with ``fold`` layers that differ only in their index share a row."""
        return text_of(self._table(rows(self.layers, fold)))

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        folded = rows(self.layers)
        last = advice(self)
        fusion = [] if self.fusion is None else self.fusion.parts()
        return [*self._table(folded), *self._foot(folded), *fusion, *([last] if last else [])]

    def _table(self, folded: Sequence[Row]) -> list[Part]:
        table, notes = drawn(folded, self.m)
        return [table, *([notes] if notes else [])]

    def _timing(self) -> list[str]:
        if self.goal == "memory":
            return ["speed was not measured (goal='memory')"]
        holds = "; where it holds 1 no difference was found"
        return [
            f"M=... : dense time / nybble time, above 1 is faster; mean : over M, and its interval{holds}",
            f"a layer is swapped where the interval {_SWAPPED[self.goal]} (goal={self.goal!r})",
            f"timing took {self.timing_s:.1f} s of {self.timing_limit_s:g} s (timing_s)",
        ]

    def _foot(self, folded: Sequence[Row]) -> list[str]:
        before, after = self.nbytes_before, self.nbytes_after
        ratio = ""
        if before and after and before != after:
            ratio = f" ({before / after:.2f}x smaller)" if after < before else f" ({after / before:.2f}x larger)"
        counts = f"{len(self.swapped)} of {len(self.layers)} layers swapped"
        kernels = sorted({layer.kernel for layer in self.layers if layer.kernel is not None})
        lines = [
            f"{counts}, scheme {self.scheme}, method {self.method}, goal {self.goal}",
            f"listed bytes {size(before)} -> {size(after)}{ratio}",
            f"coverage {self.coverage:.1f} % of {size(self.weight_bytes)} of weights",
            f"machine: {self.machine}, threads: {self.threads}{f', kernel: {kernels[0]}' if len(kernels) == 1 else ''}",
        ]
        lines += self._timing()
        if any("_triton" in kernel for kernel in kernels):
            lines.append(f"..._triton : {FIRST_CALL}")
        if any(error_of(layer) is not None for layer in self.layers):
            lines.append(
                "error % : of a layer's output on held-out calibration data, by rounding alone -> as it is now"
            )
        if any(len(row.layers) > 1 for row in folded):
            lines.append(
                "n : layers that differ only in their index share a row, with the sum of their bytes and ranges of their "
                "numbers; print(report.table(fold=False)) shows each"
            )
        return lines
