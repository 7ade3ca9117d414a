"""Passes walk a model and swap its layers. They never touch kernels."""

from __future__ import annotations

from .quantize import quantize

__all__ = ["quantize"]
