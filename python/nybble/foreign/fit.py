"""Whether nybble's schemes hold a foreign weight exactly, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.rounding import QuantizedWeight, check_portable, dequantize_weight
from ..weights.scheme import Scheme
from ..weights.weight_type import WeightType, weight_types
from .weight import ForeignWeight


@dataclass(frozen=True)
class Fit:
    """The scheme that holds a weight bit for bit, and the weight in it; or why none does."""

    scheme: Scheme | None = None
    quantized: QuantizedWeight | None = None
    why: str | None = None


def fit(weight: ForeignWeight) -> Fit:
    """The scheme, with float activations, whose weight equals the foreign one bit for bit as float32."""
    why = _unlike(weight)
    if why is not None:
        return Fit(why=why)
    k, flips = weight.shape[1], weight.scale < 0
    kind = weight_types()[8 if weight.bits > 4 else 4]
    whole = weight.group_size >= k
    if not whole and weight.group_size not in kind.group_sizes:
        allowed = ", ".join(map(str, kind.group_sizes))
        held = f"{kind.name} has groups of {allowed} or a whole row" if allowed else f"{kind.name} has one scale a row"
        return Fit(why=f"groups of {weight.group_size}: {held}")
    if not torch.equal(weight.scale.to(kind.scale).float(), weight.scale.float()):
        share = (weight.scale.to(kind.scale).float() != weight.scale.float()).float().mean().item()
        return Fit(why=f"{share:.0%} of the {_name(weight.scale)} scales are not {_name(weight.scale, kind.scale)}")
    if flips.any() and kind.zero_point is None:
        return Fit(why=f"negative scales: {kind.name} is symmetric and has none")
    codes, zero = _codes(weight, kind, flips)
    low, high = (int(end) for end in codes.aminmax())
    if low < kind.lowest or high > kind.highest:
        code = low if low < kind.lowest else high
        return Fit(why=f"code {code - kind.middle} ({int((codes == code).sum())} times): {kind.name} has not this code")
    if kind.zero_point is not None and zero is not None and (zero.min() < kind.lowest or zero.max() > kind.highest):
        return Fit(why=f"a zero point outside [{kind.lowest}, {kind.highest}]")
    scheme = Scheme(kind.bits, 16, None if whole else weight.group_size, zero is None)
    stored = None if zero is None or kind.zero_point is None else zero.to(kind.zero_point)
    found = QuantizedWeight(kind.pack(codes), weight.scale.abs().to(kind.scale), stored)
    check_portable(found, scheme, *weight.shape)
    if not torch.equal(dequantize_weight(found, scheme, k), weight.dequantize()):
        return Fit(why="the library rounds twice in float32, so that last bits differ")
    return Fit(scheme, found)


def _unlike(weight: ForeignWeight) -> str | None:
    """What no scheme of nybble has."""
    reasons = (
        (weight.book is not None, "a code book"),
        (weight.minimum is not None, "a float minimum in place of an integer zero point"),
        (weight.flat_shape is not None, "groups that run over the flattened matrix"),
        (weight.groups is not None, "columns in activation order"),
    )
    return next((why for holds, why in reasons if holds), None)


def _codes(weight: ForeignWeight, kind: WeightType, flips: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes (N, K) as the weight type counts them, and zero points (N, groups), or None where all are its middle.

    Of a group with a negative scale they are mirrored: lowest + highest - code, which goes with the positive scale.
    """
    columns = weight.column_groups(slice(0, weight.shape[1]))
    codes = weight.codes.to(torch.int16)
    if isinstance(weight.zero, int) and not flips.any():
        return codes - weight.zero + kind.middle, None
    if kind.zero_point is None:
        zero = weight.zero if isinstance(weight.zero, int) else weight.zero[:, columns]
        return codes - zero + kind.middle, None
    shift = 0 if not isinstance(weight.zero, int) else kind.middle - weight.zero
    zeros = torch.full(weight.scale.shape, kind.middle) if isinstance(weight.zero, int) else weight.zero
    codes, zeros = codes + shift, zeros.to(torch.int16)
    ends = kind.lowest + kind.highest
    return torch.where(flips[:, columns], ends - codes, codes), torch.where(flips, ends - zeros, zeros)


def _name(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    return str(dtype or tensor.dtype).removeprefix("torch.")
