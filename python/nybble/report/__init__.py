"""What a pass did to each layer of a model: as data, as a folded table, and what to do next."""

from __future__ import annotations

from .. import _moved
from .data import LayerReport, Pruned, Rounded
from .report import Report

__all__ = ["LayerReport", "Pruned", "Report", "Rounded"]

__getattr__ = _moved.old_names(__name__)
