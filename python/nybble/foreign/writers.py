"""The table of formats that models are written in.

A package adds formats with an entry point of the group ``nybble.writers``, see ``nybble.plugins``:

    [project.entry-points."nybble.writers"]
    toy = "toy_package.writer:WRITER"
"""

from __future__ import annotations

from functools import lru_cache

from .. import plugins
from . import write_compressed, write_sparse
from .write_gptq import GPTQ, GPTQ_V2
from .writer import ForeignWriter

_BUILT_IN = (
    ForeignWriter(
        "compressed-tensors",
        "compressed-tensors, pack-quantized and int-quantized",
        write_compressed.encode,
        write_compressed.config,
        write_compressed.notes,
    ),
    ForeignWriter(
        "compressed-tensors-sparse",
        "the same, with 2:4 layers as sparse-24-bitmask",
        write_sparse.encode,
        write_sparse.config,
        write_sparse.notes,
    ),
    GPTQ,
    GPTQ_V2,
)


@lru_cache
def foreign_writers() -> tuple[ForeignWriter, ...]:
    """The table: nybble's own writers and those of plug-ins. Raises PluginError if a plug-in cannot be loaded."""
    return plugins.rows("nybble.writers", ForeignWriter, _BUILT_IN)


def foreign_writer(name: str) -> ForeignWriter:
    """The writer of a format. Raises ValueError if there is none."""
    found = next((row for row in foreign_writers() if row.name == name), None)
    if found is None:
        names = ", ".join(repr(row.name) for row in foreign_writers())
        raise ValueError(f"format={name!r}: must be one of {names}")
    return found
