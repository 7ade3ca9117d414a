"""What a writer gets of a quantized layer: its codes, scales and zero points as other libraries count them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.linear import Linear
from ..weights.activations import ActScale
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme
from ..weights.weight_type import FloatType


class NotHeldError(ValueError):
    """A format cannot hold a layer; the message is the rule."""


class Scaled(NamedTuple):
    """Scales as they are written, and what rounding them cost: ``inf`` where they are the layer's own."""

    scale: Tensor
    sqnr_db: float


@dataclass(frozen=True)
class Held:
    """A quantized layer of a model. ``dense``: the class that it replaced, "Linear" or transformers' "Conv1D"."""

    name: str
    module: Linear
    dense: str = "Linear"

    @property
    def scheme(self) -> Scheme:
        return self.module.scheme

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.scheme.weight_bits

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.module.out_features, self.module.in_features

    @property
    def act(self) -> ActScale | None:
        """Of static activations."""
        return self.module.act()

    @cached_property
    def quantized(self) -> QuantizedWeight:
        """The weight, with the zeros of a sparse one filled in. It stays in memory as long as this object."""
        return self.module.quantized()

    def unsigned(self) -> Tensor:
        """The codes (N, K) in the order of the inputs, uint8, from 0 on: of a symmetric weight 2 ** (bits - 1) is the weight 0.

        Raises NotHeldError for weights that are no numbers of 4 or 8 bits, or have float minimums.
        """
        kind = self.scheme.weight_type
        if isinstance(kind, FloatType) or kind.table or kind.bits not in (4, 8):
            raise NotHeldError(f"its weights are {kind.name}: must be codes of 4 or 8 bits, not of a table")
        if self.quantized.minimum is not None:
            raise NotHeldError("its groups have float minimums: must have integer zero points, or none")
        codes, order = kind.unpack(self.quantized.qweight, self.shape[1]), self.quantized.order
        if codes.dtype != torch.uint8:
            codes = (codes.to(torch.int16) + self._shift).to(torch.uint8)
        return codes if order is None else torch.empty_like(codes).index_copy_(1, order.long(), codes)

    def unsigned_zeros(self) -> Tensor | None:
        """The zero points (N, groups), uint8, counted as the codes; None: symmetric."""
        zero = self.quantized.zero_point
        return None if zero is None else (zero.to(torch.int16) + self._shift).to(torch.uint8)

    def column_groups(self) -> Tensor:
        """The group of each input, int32 (K,)."""
        k, order = self.shape[1], self.quantized.order
        groups = torch.arange(k, dtype=torch.int32) // (self.scheme.group_size or k)
        return groups if order is None else torch.empty_like(groups).index_copy_(0, order.long(), groups)

    @property
    def _shift(self) -> int:
        return (1 << (self.bits - 1)) - self.scheme.weight_type.middle

    def scales(self, dtypes: Iterable[torch.dtype], round_scales: bool) -> Scaled:
        """The scales (N, groups) in the first dtype that has all of them.

        Raises NotHeldError if none does, unless they may be rounded to the last one.
        """
        scale, dtype = self.quantized.scale, torch.float32
        for dtype in dtypes:
            if torch.equal(scale.to(dtype).float(), scale.float()):
                return Scaled(scale.to(dtype), math.inf)
        rounded = scale.to(dtype)
        rule = f"not all of its {_name(scale.dtype)} scales are {_name(dtype)}"
        if not round_scales:
            raise NotHeldError(f"{rule} (round_scales=True rounds them)")
        if not torch.isfinite(rounded).all() or ((rounded == 0) & (scale != 0)).any():
            raise NotHeldError(f"{rule}, and some are beyond its range")
        return Scaled(rounded, self._sqnr_db(rounded))

    def _sqnr_db(self, rounded: Tensor) -> float:
        k, old = self.shape[1], self.quantized
        weight = dequantize_weight(old, self.scheme, k)
        new = dequantize_weight(replace(old, scale=rounded.float()), self.scheme, k)
        noise = (weight - new).double().square().sum().item()
        return 10 * math.log10(weight.double().square().sum().item() / noise) if noise else math.inf


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
