"""A model's state as safetensors plus a JSON index: save, load, and what is wrong with a file."""

from __future__ import annotations

from .files import CheckpointError
from .io import load, save

__all__ = ["CheckpointError", "load", "save"]
