"""How the bytes of a weight lie: in a checkpoint, packed for CPUs, packed for GPUs."""

from __future__ import annotations

from .. import _moved
from .packed import (
    IN_TORCH,
    MASK_OF,
    PLAIN,
    aligned,
    offsets,
    pack,
    packed_nbytes,
    padded_in_features,
    sections,
    unpack,
    views,
)

__all__ = [
    "IN_TORCH",
    "MASK_OF",
    "PLAIN",
    "aligned",
    "offsets",
    "pack",
    "packed_nbytes",
    "padded_in_features",
    "sections",
    "unpack",
    "views",
]

__getattr__ = _moved.names_in(f"{__name__}.packed")
