"""Readers of other libraries' quantized checkpoints, exact to the bit."""

from __future__ import annotations

from .formats import ForeignFormat, foreign_formats, open_foreign
from .opened import Layer, Opened, Part
from .weight import ForeignWeight

__all__ = ["ForeignFormat", "ForeignWeight", "Layer", "Opened", "Part", "foreign_formats", "open_foreign"]
