"""Which passes run on which layers, as a file: the stages of nybble.optimize."""

from __future__ import annotations

from .. import _moved
from .recipe import Recipe, Stage, data_sha256

__all__ = ["Recipe", "Stage", "data_sha256"]

__getattr__ = _moved.names_in(f"{__name__}.recipe")
