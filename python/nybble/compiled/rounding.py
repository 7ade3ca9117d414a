"""Weights to codes and the error of that, by the compiled library where it can: parallel, and in one pass.

``weights.rounding`` is the definition. Codes, scales and zero points equal it bit for bit. The passes and the modules
round through this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import native
from ..weights import rounding as definition
from ..weights.rounding import QuantizedWeight, natural_order, portable_spec
from ..weights.scheme import Scheme

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 22  # elements of a weight that are copied at a time


def quantize_weight(weight: Tensor, scheme: Scheme, method: str = "rtn") -> QuantizedWeight:
    """As ``weights.rounding.quantize_weight``."""
    if method != "rtn" or not native.rounds(scheme) or not _is_native(weight):
        return definition.quantize_weight(weight, scheme, method)
    scheme.check_shape(*weight.shape)
    spec = portable_spec(scheme, *weight.shape)
    found = QuantizedWeight(**{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()})
    if found.order is not None:
        found.order.copy_(natural_order(weight.shape[1]))
    for rows, part in _native_parts(weight):
        if not native.round_weight(part, scheme, found.rows(rows)):
            raise ValueError("weight: has NaN or Inf")
    return found


def all_finite(weight: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf."""
    if not _is_native(weight):
        return bool(torch.isfinite(weight).all())
    return all(native.all_finite(part) for _, part in _native_parts(weight))


def sqnr_db(weight: Tensor, rounded: QuantizedWeight, scheme: Scheme) -> float:
    """10 * log10(sum W^2 / sum (W - W_hat)^2) of a weight W (N, K) and the rounded one W_hat, in the dtype of W.

    ``inf`` if they are equal; ``-inf`` if W is 0, or a rounded weight is beyond the largest number of the dtype.
    """
    signal = noise = 0.0
    if native.rounds(scheme) and _is_native(weight) and not scheme.ordered:
        parts, sums_of = _native_parts(weight), native.squared_sums
    else:
        parts, sums_of = _parts(weight.detach()), _squared_sums
    for rows, part in parts:
        sums = sums_of(part, rounded.rows(rows), scheme)
        signal, noise = signal + sums[0], noise + sums[1]
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf


def _squared_sums(weight: Tensor, rounded: QuantizedWeight, scheme: Scheme) -> tuple[float, float]:
    """As native.squared_sums, for any type of weights."""
    stored = definition.dequantize_weight(rounded, scheme, weight.shape[1]).to(weight.dtype)
    exact = weight.double()
    return exact.square().sum().item(), (exact - stored.double()).square().sum().item()


def _is_native(weight: Tensor) -> bool:
    """Whether the compiled library reads this weight: a matrix in plain memory, float32, bfloat16 or float16."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.dtype in _FLOATS
        and not weight.is_neg()
    )


def _native_parts(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A weight (N, K) whole; if its rows are not contiguous, in parts, copied."""
    weight = weight.detach()
    if weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]:
        return iter([(slice(0, len(weight)), weight)])
    return ((rows, part.contiguous()) for rows, part in _parts(weight))


def _parts(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A weight (N, K), some rows at a time."""
    step = max(1, _CHUNK // weight.shape[1])
    for i in range(0, len(weight), step):
        part = weight[i : i + step]
        yield slice(i, i + len(part)), part
