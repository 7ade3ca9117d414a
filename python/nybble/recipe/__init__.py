"""Recipes: which passes `nybble.optimize` runs on which layers, as a Python object or a YAML or JSON file.

Inside: `recipe` (Recipe and Stage), `schema` (types of the fields), `file` (reading and writing with line numbers).
"""

from __future__ import annotations

from .. import _moved
from .recipe import Recipe, Stage, data_sha256

__all__ = ["Recipe", "Stage", "data_sha256"]

__getattr__ = _moved.old_names(__name__)
