"""How the bytes of a weight lie: portable in a checkpoint, packed for CPUs and for GPUs."""

from __future__ import annotations

from .. import _moved
from .layout import Layout
from .packed import (
    aligned,
    find,
    offsets,
    pack,
    packed_nbytes,
    padded,
    padded_in_features,
    sections,
    table,
    unpack,
    views,
)
from .plain import PLAIN

__all__ = [
    "PLAIN",
    "Layout",
    "aligned",
    "find",
    "offsets",
    "pack",
    "packed_nbytes",
    "padded",
    "padded_in_features",
    "sections",
    "table",
    "unpack",
    "views",
]

__getattr__ = _moved.old_names(__name__)
