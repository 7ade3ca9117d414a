"""Readers and writers of other libraries' quantized checkpoints, exact to the bit."""

from __future__ import annotations

from .formats import ForeignFormat, foreign_formats, open_foreign
from .held import Held, NotHeldError
from .opened import Layer, Opened, Part
from .weight import ForeignWeight
from .writer import Encoded, ForeignWriter

__all__ = [
    "Encoded",
    "ForeignFormat",
    "ForeignWeight",
    "ForeignWriter",
    "Held",
    "Layer",
    "NotHeldError",
    "Opened",
    "Part",
    "foreign_formats",
    "open_foreign",
]
