"""Quantize the layers of a plan."""

from __future__ import annotations

from ...nn import Linear
from ...report import Rounded
from ...scheme import Scheme
from ..eligible import dense_weight
from ..layerwise.inputs import Inputs
from ..layerwise.judge import Errors
from ..layerwise.outcome import Outcome
from ..layerwise.work import Work
from ..plan import Layer, Plan
from ..walk import Edits
from .ladder import NEEDS_DATA, round_weight


class Rounding(Work):
    """The layers of a plan on their way to quantized ones; they get ``rounded`` and ``new``, or a ``reason``."""

    def __init__(self, plan: Plan, edits: Edits, scheme: Scheme) -> None:
        super().__init__(plan, edits)
        self._scheme = scheme
        self.hessian = self.asked.method in NEEDS_DATA
        if self.hessian and self.sets:
            self.needs_data = f"method={self.asked.method!r}: needs calibration data"

    def solve(self, layer: Layer, inputs: Inputs | None) -> Outcome:
        """As Work.solve."""
        return round_weight(dense_weight(layer.site.module), self._scheme, self.asked.method, inputs)

    def make(self, layer: Layer, outcome: Outcome) -> Linear:
        """As Work.make."""
        assert outcome.quantized is not None, "rounded weights have codes"  # noqa: S101
        in_features = dense_weight(layer.site.module).shape[1]
        return Linear.from_quantized(outcome.quantized, in_features, layer.bias, self._scheme, layer.weight.dtype)

    def note(self, layer: Layer, outcome: Outcome, errors: Errors) -> None:
        """As Work.note."""
        layer.rounded = Rounded(outcome.method, errors.rounding, errors.new, (*outcome.notes, *layer.notes))
