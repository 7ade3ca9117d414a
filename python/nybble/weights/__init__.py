"""What the numbers of a layer mean: schemes, weight types, rounding, patterns of zeros, static activation scales."""

from __future__ import annotations

from .rounding import QuantizedWeight, dequantize_weight, quantize_weight
from .scheme import Scheme
from .weight_type import WeightType

__all__ = ["QuantizedWeight", "Scheme", "WeightType", "dequantize_weight", "quantize_weight"]
