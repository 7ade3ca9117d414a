"""A foreign weight in a scheme of nybble: bit for bit where one holds it, else rounded again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled.rounding import quantize_weight
from ..weights.rounding import QuantizedWeight, dequantize_weight, portable_spec
from ..weights.scheme import Scheme
from .fit import fit, in_rows, keep_codes
from .weight import ForeignWeight

_AT_ONCE = 1 << 20  # weights that are rounded at a time
_LITTLE = 30.0  # dB that rounding again to 8 bits always has


class Chosen(NamedTuple):
    """A weight in a scheme of nybble. ``why``: it is not the foreign one bit for bit."""

    scheme: Scheme
    quantized: QuantizedWeight
    sqnr_db: float
    why: str | None


def choose(weight: ForeignWeight, act_bits: int) -> Chosen:
    """The weight in the scheme that holds it exactly; else with its own codes; else rounded to 4 bits, or to 8 if it has more.

    Raises ValueError if no scheme has activations of ``act_bits``.
    """
    found = fit(weight, act_bits)
    if found.scheme is not None and found.quantized is not None:
        return Chosen(found.scheme, found.quantized, math.inf, None)
    choices, kept = [], found.near or keep_codes(weight, act_bits)
    if kept.scheme is not None and kept.quantized is not None:
        parts = ((dense, kept.quantized.rows(rows)) for rows, dense in _rows(weight))
        choices.append(Chosen(kept.scheme, kept.quantized, _sqnr_db(parts, kept.scheme), found.why))
    if not choices or choices[0].sqnr_db < _LITTLE:  # many codes were clipped
        eight = weight.bits > 4 or weight.shape[1] % 32 != 0
        scheme = Scheme(8, act_bits) if eight else Scheme(4, act_bits, 32, symmetric=False)
        choices.append(_rounded(weight, scheme, found.why))
    return max(choices, key=lambda one: one.sqnr_db)


def _rounded(weight: ForeignWeight, scheme: Scheme, why: str | None) -> Chosen:
    """By some rows at a time, so that the whole weight is never there as floats."""
    spec = portable_spec(scheme, *weight.shape)
    whole = QuantizedWeight(**{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()})

    def parts() -> Iterator[tuple[Tensor, QuantizedWeight]]:
        for rows, dense in _rows(weight):
            part = quantize_weight(dense, scheme)
            for name, tensor in whole.rows(rows).tensors().items():
                tensor.copy_(part.tensors()[name])
            yield dense, part

    return Chosen(scheme, whole, _sqnr_db(parts(), scheme), why)


def _sqnr_db(parts: Iterable[tuple[Tensor, QuantizedWeight]], scheme: Scheme) -> float:
    """10 * log10(sum W^2 / sum (W - W_hat)^2) of a weight W in parts of some rows, and what holds them."""
    signal = noise = 0.0
    for dense, held in parts:
        exact = dense.double()
        signal += exact.square().sum().item()
        noise += exact.sub_(dequantize_weight(held, scheme, dense.shape[1])).square_().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _rows(weight: ForeignWeight) -> Iterator[tuple[slice, Tensor]]:
    """The weight, float32, in parts of some rows; in one where its groups cross rows."""
    weight = in_rows(weight)
    n, k = weight.shape
    if weight.flat_shape is not None:
        yield slice(0, n), weight.dequantize()
        return
    height = max(_AT_ONCE // k, 1)
    for row in range(0, n, height):
        rows = slice(row, row + height)
        yield rows, weight.rows(rows).dequantize()
