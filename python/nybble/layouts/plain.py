"""The layout plain: the portable tensors one after another, for the reference."""

from __future__ import annotations

from torch import Tensor

from ..weights.rounding import QuantizedWeight, portable_spec
from ..weights.scheme import Scheme
from .layout import Layout

PLAIN = "plain"


def _fill(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    return quantized.tensors()


def _collect(parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    return QuantizedWeight(**{name: part.clone() for name, part in parts.items()})


LAYOUTS = (Layout(PLAIN, portable_spec, _fill, _collect),)
