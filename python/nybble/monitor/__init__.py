"""Compares what a model in service sees with what it saw in calibration."""

from __future__ import annotations

from .. import _moved
from .monitor import Monitor

__all__ = ["Monitor"]

__getattr__ = _moved.names_in(f"{__name__}.monitor")
