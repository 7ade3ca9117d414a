"""A scheme for each layer under a budget."""

from __future__ import annotations

from .find import plan
from .result import ChosenPlan, Point

__all__ = ["ChosenPlan", "Point", "plan"]
