"""The linear layer in plain torch, in float64: what tests compare with, and what runs where no kernel does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import layouts
from ..weights.activation_type import ActivationType
from ..weights.activations import ActScale, split
from ..weights.form import USUAL, Form
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme

# Rows whose range would over- or underflow in float32 are scaled by a power of two first, which is exact.
_TINY, _TINY_FACTOR = 2.0**-100, 2.0**100
_HUGE, _HUGE_FACTOR = 2.0**126, 2.0**-4


class Activations(NamedTuple):
    """codes int8 (M, K) of an ActivationType, scale float32 (M,), zero int32 (M,): x = (codes - zero) * scale."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize_activations(x: Tensor, act_type: ActivationType) -> Activations:
    """Rounds activations (M, K) row by row.

    In float32, with [low, high] the range of the row and 0, and steps, lowest and highest of the type, 255, -128 and 127
    for 8 bits: scale = (high - low) / steps, inverse = steps / (high - low), zero = round_half_even(-low * inverse) +
    lowest, q = min(round_half_even(x * inverse) + zero, highest). A row with a NaN or
    an Inf has codes 0 and scale NaN; a row of zeros has scale 0.
    """
    x = x.float()
    finite = torch.isfinite(x).all(-1)
    x = torch.where(finite[:, None], x, 0)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    magnitude = torch.maximum(-low, high)
    factor = torch.where(magnitude < _TINY, _TINY_FACTOR, torch.where(magnitude > _HUGE, _HUGE_FACTOR, 1.0)).float()
    live = magnitude > 0
    low, width = low * factor, torch.where(live, high * factor - low * factor, 1)
    full = torch.full_like(width, act_type.steps)
    inverse = torch.where(live, full / width, 0)  # a scalar numerator would become a product with the reciprocal
    zero = torch.where(live, (-low * inverse).round() + act_type.lowest, 0)
    codes = ((x * factor[:, None] * inverse[:, None]).round() + zero[:, None]).clamp(max=act_type.highest)
    scale = torch.where(live, width / full / factor, 0)
    return Activations(codes.to(torch.int8), torch.where(finite, scale, torch.nan), zero.to(torch.int32))


def quantize_static(x: Tensor, act: ActScale, act_type: ActivationType) -> Activations:
    """Rounds activations (M, K) with a given scale and zero point.

    In float32: q = round_half_even(min(max(x * (1 / scale), lowest - zero), highest - zero)) + zero. A row with a NaN or Inf
    has codes 0, zero 0 and scale NaN.
    """
    x = x.float()
    finite = torch.isfinite(x).all(-1)
    zero = act.zero_point.float()
    steps = torch.where(finite[:, None], x, 0) * act.scale.reciprocal()
    codes = steps.clamp(act_type.lowest - zero, act_type.highest - zero).round() + zero
    return Activations(
        torch.where(finite[:, None], codes, 0).to(torch.int8),
        torch.where(finite, act.scale, torch.nan),
        torch.where(finite, zero, 0).to(torch.int32),
    )


def quantize(x: Tensor, act: ActScale | None, act_type: ActivationType) -> Activations:
    """Rounds activations (M, K) with the static scale, or row by row if that is None."""
    return quantize_activations(x, act_type) if act is None else quantize_static(x, act, act_type)


def linear(
    x: Tensor,
    quantized: QuantizedWeight,
    bias: Tensor | None,
    scheme: Scheme,
    out_dtype: torch.dtype,
    act: ActScale | None = None,
) -> Tensor:
    """y (M, N) = x (M, K) w^T + bias, summed in float64 and rounded once to out_dtype. act: the static scale."""
    weight = dequantize_weight(quantized, scheme, x.shape[-1]).double()
    codes = quantize(x, act, scheme.act_type) if scheme.act_type.quantized else None
    return product(x, codes, weight, bias).to(out_dtype)


def product(x: Tensor, codes: Activations | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (M, N) = x (M, K) w^T + bias in float64, of the codes of x, or of x itself where there are none; weight: float64 (N, K)."""
    if codes is None:
        y = x.double() @ weight.t()
    else:
        whole = codes.codes.double() - codes.zero.double()[:, None]
        y = (whole @ weight.t()) * codes.scale.double()[:, None]
    return y if bias is None else y + bias.double()


class EmbeddingReference:
    """Lookups in plain torch, called like native.Lookup. The weight has a layout with `rows`."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int, layout: str = layouts.PLAIN) -> None:
        self._shape = (scheme, out_features, in_features)
        self._layout = layout

    def __call__(self, packed: Tensor, ids: Tensor, out: Tensor) -> None:
        self._check(ids)
        scheme, _, in_features = self._shape
        rows = layouts.find(self._layout).read_rows(packed, *self._shape, ids.reshape(-1))
        out.view(-1, in_features).copy_(dequantize_weight(rows, scheme, in_features))

    def bags(
        self,
        packed: Tensor,
        ids: Tensor,
        start: Tensor,
        weights: Tensor | None,
        out: Tensor,
        mode: str,
        left_out: int,
    ) -> None:
        self._check(ids)
        weight = dequantize_weight(layouts.unpack(packed, self._layout, *self._shape), self._shape[0], self._shape[2])
        skip = None if left_out < 0 else left_out
        bags = torch.nn.functional.embedding_bag(
            ids.long(),
            weight,
            start,
            mode=mode,
            per_sample_weights=weights,
            include_last_offset=True,
            padding_idx=skip,
        )
        out.copy_(bags)

    def _check(self, ids: Tensor) -> None:
        wrong = ((ids < 0) | (ids >= self._shape[1])).reshape(-1).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise IndexError(
                f"ids: {int(ids.reshape(-1)[place])} (item {place}) is not in [0, {self._shape[1]}), the rows of the "
                "embedding"
            )


class ReferencePlan:
    """The reference as a plan, which is called like native.LinearPlan. The weight has the layout plain."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int, form: Form = USUAL) -> None:
        self._shape = (scheme, out_features, in_features)
        self._layout = form.of_layout(layouts.PLAIN)

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        scheme, out_features, in_features = self._shape
        act, weight = split(packed, scheme)
        quantized = layouts.unpack(weight, self._layout, scheme, out_features, in_features)
        rows = linear(x.reshape(-1, in_features), quantized, bias, scheme, out.dtype, act)
        out.view(-1, out_features).copy_(rows)
