"""Rotate what flows between the blocks of a transformer, so that no channel stands out."""

from __future__ import annotations

from .rotate import rotate

__all__ = ["rotate"]
