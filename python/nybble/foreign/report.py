"""What became of each layer of a foreign checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..text import Part, Shown, Table


@dataclass(frozen=True)
class ImportedLayer:
    """A quantized layer.

    ``sqnr_db``: of nybble's weight to the foreign one; ``inf``: equal bit for bit, else ``why`` not. ``inputs``: what became
    of static activations, where the file has them.
    """

    name: str
    shape: tuple[int, int]
    before: str
    scheme: str
    nbytes_before: int
    nbytes_after: int
    sqnr_db: float
    why: str | None = None
    inputs: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the weight is the foreign one, bit for bit."""
        return self.why is None


@dataclass(frozen=True)
class ImportReport(Shown):
    """All quantized layers of a foreign checkpoint. ``print(report)`` shows a table; ``to_json`` gives everything.

    ``notes``: what the checkpoint has that is not used.
    """

    format: str
    layers: tuple[ImportedLayer, ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        header = ("layer", "in the file", "scheme", "SQNR dB")
        rows = [
            (row.name, row.before, row.scheme, "exact" if row.exact else f"{row.sqnr_db:.1f}") for row in self.layers
        ]
        exact = sum(row.exact for row in self.layers)
        lines = [f"format {self.format}: {exact} of {len(self.layers)} layers are held exactly"]
        if exact < len(self.layers):
            first = next(row for row in self.layers if not row.exact)
            lines.append(f"the others were rounded again, such as {first.name}: {first.why}")
        if static := [row for row in self.layers if row.inputs]:
            lines.append(
                f"{len(static)} layers have static inputs in the file, such as {static[0].name}: {static[0].inputs}"
            )
        return [Table([header, *rows], left=(0, 1, 2)), *lines, *self.notes]

    def to_json(self) -> str:
        """As strict JSON: an SQNR that is infinite is null."""
        rows = [asdict(row) | {"exact": row.exact} for row in self.layers]
        for row in rows:
            row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
        told = {"schema": "nybble.import/1", "format": self.format, "layers": rows, "notes": list(self.notes)}
        return json.dumps(told, indent=2)
