"""What became of each quantized layer of a model that was written in another library's format."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..text import Items, Part, Shown, Table


@dataclass(frozen=True)
class ExportedLayer:
    """A layer. ``after``: how it was written. ``sqnr_db``: of the written weight to nybble's; ``inf``: equal, bit for bit.

    ``dense``: it was written as floats, in the model's dtype. ``notes``: why, or what the format does not say of it.
    """

    name: str
    shape: tuple[int, int] | None
    scheme: str
    after: str
    nbytes: int
    dense: bool = False
    sqnr_db: float = math.inf
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportReport(Shown):
    """All of nybble's layers of a model. ``print(report)`` shows a table; ``to_json`` gives everything.

    ``notes``: what a user should know of such a checkpoint. ``dense_nbytes``: of all that was never quantized.
    """

    format: str
    layers: tuple[ExportedLayer, ...]
    dense_nbytes: int
    notes: tuple[str, ...] = ()

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        rows = [("layer", "scheme", "written as", "SQNR dB")]
        for row in self.layers:
            sqnr = "exact" if math.isinf(row.sqnr_db) else f"{row.sqnr_db:.1f}"
            rows.append((row.name, row.scheme, row.after, "" if row.dense else sqnr))
        quantized = [row for row in self.layers if not row.dense]
        exact = sum(math.isinf(row.sqnr_db) for row in quantized)
        nbytes = sum(row.nbytes for row in self.layers) + self.dense_nbytes
        told = f"format {self.format}: {len(quantized)} of {len(self.layers)} layers are written quantized, {exact} exactly"
        parts: list[Part] = [Table(rows, left=(0, 1, 2)), f"{told}; {nbytes / 1e6:,.1f} MB"]
        whys: dict[str, list[str]] = {}
        for row in self.layers:
            for note in row.notes:
                whys.setdefault(note, []).append(row.name)
        lines = [f"{_names(names)}: {why}" for why, names in whys.items()]
        return [*parts, Items.dashed("to know:", [*lines, *self.notes])] if lines or self.notes else parts

    def to_json(self) -> str:
        """As strict JSON: an SQNR that is infinite is null."""
        rows = [asdict(row) | {"exact": not row.dense and math.isinf(row.sqnr_db)} for row in self.layers]
        for row in rows:
            row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
        told = {"schema": "nybble.export/1", "format": self.format, "layers": rows}
        return json.dumps({**told, "dense_nbytes": self.dense_nbytes, "notes": list(self.notes)}, indent=2)


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
