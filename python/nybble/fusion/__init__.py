"""Chains of layers that run as compiled steps: `nybble.fuse`."""

from __future__ import annotations

from .fuse import fuse
from .report import FusionReport

__all__ = ["FusionReport", "fuse"]
