"""What the numbers of a layer mean: schemes, rounding, sparsity patterns, static activation scales."""

from __future__ import annotations

from .rounding import QuantizedWeight, dequantize_weight, quantize_weight
from .scheme import Scheme

__all__ = ["QuantizedWeight", "Scheme", "dequantize_weight", "quantize_weight"]
