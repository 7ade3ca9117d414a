"""Passes walk a model and swap its layers. They never touch kernels."""

from __future__ import annotations

from .quantize import quantize
from .rotate import rotate
from .sparsify import sparsify

__all__ = ["quantize", "rotate", "sparsify"]
