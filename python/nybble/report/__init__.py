"""What a pass did to each layer of a model."""

from __future__ import annotations

from .. import _moved
from .report import LayerReport, Report

__all__ = ["LayerReport", "Report"]

__getattr__ = _moved.names_in(f"{__name__}.report")
