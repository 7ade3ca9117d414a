"""The table of checkpoint formats: how each is recognized, loaded and saved.

A package adds formats with an entry point of the group ``nybble.formats``, see ``nybble.plugins``:

    [project.entry-points."nybble.formats"]
    toy = "toy_package.formats:TOY"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from .. import plugins
from . import own
from .files import INDEX, CheckpointError


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    ``what`` says for messages what the format is and which files it looks for. ``detect`` tells whether a directory
    holds a checkpoint of the format; it reads no weights. ``load`` fills a model from a directory, or, after any
    exception, leaves the model unchanged; it raises CheckpointError if the checkpoint is damaged or does not fit.
    ``save`` writes a model into a directory; it is None if the format can only be read.
    """

    name: str
    what: str
    detect: Callable[[Path], bool]
    load: Callable[[nn.Module, Path], None]
    save: Callable[[nn.Module, Path], None] | None = None


BUILT_IN = (
    Format(
        "nybble", f"{INDEX} and the safetensors file that it names", detect=own.detect, load=own.load, save=own.save
    ),
)


@lru_cache
def known_formats() -> tuple[Format, ...]:
    """The table: nybble's formats and those of plug-ins. Raises PluginError if a plug-in cannot be loaded."""
    return plugins.rows("nybble.formats", Format, BUILT_IN)


def format_in(directory: Path) -> Format:
    """The format of the checkpoint in a directory. Raises CheckpointError unless exactly one format detects it."""
    try:
        os.stat(os.path.join(directory, "."))  # needs the right to look into it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{directory}: no such directory") from error
    except (OSError, ValueError) as error:  # the latter of a path with a zero byte
        raise CheckpointError(f"{directory}: {getattr(error, 'strerror', error)}") from error
    found = [row for row in known_formats() if row.detect(directory)]
    if len(found) == 1:
        return found[0]
    looked_for = "; ".join(f"{row.name}: {row.what}" for row in found or known_formats())
    if found:
        raise CheckpointError(f"{directory}: holds checkpoints of {len(found)} formats, must be one ({looked_for})")
    raise CheckpointError(f"{directory}: holds no checkpoint in a format that nybble can load ({looked_for})")


def writer(name: str) -> Callable[[nn.Module, Path], None]:
    """The ``save`` of a format. Raises ValueError if the format is unknown or can only be read."""
    found = next((row for row in known_formats() if row.name == name), None)
    if found is None or found.save is None:
        names = ", ".join(repr(row.name) for row in known_formats() if row.save is not None)
        why = "unknown" if found is None else "can be loaded but not saved"
        raise ValueError(f"format={name!r}: {why}; must be one of {names}")
    return found.save
