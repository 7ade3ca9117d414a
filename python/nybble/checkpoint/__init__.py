"""A model's state on disk: save, load, and the table of formats."""

from __future__ import annotations

from .files import CheckpointError
from .formats import Format, known_formats
from .io import load, save

__all__ = ["CheckpointError", "Format", "known_formats", "load", "save"]
