"""The linear layer in plain torch, in float64: the oracle of the tests, and what runs where there is no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layouts
from .rounding import QuantizedWeight, dequantize_weight
from .scheme import Scheme

_TINY_AMAX, _UP = 2.0**-100, 2.0**100


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (M, K) in [-127, 127] and scales float32 (M,) of activations (M, K).

    q = round_half_even(x * (127 / amax)) in float32, amax the largest magnitude of the row; a row below 2**-100 is
    scaled up by 2**100 first. A row with a NaN or an Inf has codes 0 and scale NaN; a row of zeros scale 0.
    """
    x = x.float()
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    finite = torch.isfinite(x).all(-1)
    up = torch.where(amax < _TINY_AMAX, _UP, 1.0).to(torch.float32)
    lifted = torch.where(finite & (amax > 0), amax * up, 1)
    inverse = torch.where(finite & (amax > 0), 127 / lifted, 0)
    scaled = torch.where(finite[:, None], x, 0) * up[:, None] * inverse[:, None]
    scale = torch.where(amax > 0, lifted / 127 / up, 0)
    return scaled.round().to(torch.int8), torch.where(finite, scale, torch.nan)


def linear(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None, scheme: Scheme, out_dtype: torch.dtype) -> Tensor:
    """y (M, N) = x (M, K) w^T + bias, summed in float64 and rounded once to out_dtype."""
    k = x.shape[-1]
    weight = dequantize_weight(quantized, scheme, k).double()
    if scheme.act_bits == 8:
        codes, scale = quantize_activations(x)
        y = (codes.double() @ weight.t()) * scale.double()[:, None]
    else:
        y = x.double() @ weight.t()
    if bias is not None:
        y = y + bias.double()
    return y.to(out_dtype)


class ReferencePlan:
    """The reference with the calling convention of native.LinearPlan, for the plain layout."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        self._shape = (scheme, out_features, in_features)

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        scheme, out_features, in_features = self._shape
        quantized = layouts.unpack(packed, layouts.PLAIN, scheme, out_features, in_features)
        out.copy_(linear(x, quantized, bias, scheme, out.dtype))
