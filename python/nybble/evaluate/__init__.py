"""`nybble.evaluate`: quality, speed and size of a model, compared with the original.

Inside: `run` (the public function), `data` (checks of batches, targets and masks), `outputs` (loss, KL and cosine of
outputs), `table` (sums to metrics), `bootstrap` (intervals), `memory`, `result`.
"""

from __future__ import annotations

from .result import Evaluation, Metric
from .run import evaluate

__all__ = ["Evaluation", "Metric", "evaluate"]
