"""`nybble.plan`: choose a scheme for each layer under a budget of bytes, milliseconds or harm.

Harm is the change of the model's output that a scheme causes. Inside: `find` (the public function), `budget`,
`options` (the candidates of each layer), `solve` (the multiple-choice knapsack), `times` (measured latencies), `result`
and `plot`.
"""

from __future__ import annotations

from .find import plan
from .result import ChosenPlan, Point

__all__ = ["ChosenPlan", "Point", "plan"]
