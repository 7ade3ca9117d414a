"""How good, how fast and how large a model is, beside the one that it was made of."""

from __future__ import annotations

from .result import Evaluation, Metric
from .run import evaluate

__all__ = ["Evaluation", "Metric", "evaluate"]
