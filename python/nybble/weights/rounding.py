"""Weights to codes and back: round to nearest, with scales from the range or from the least error.

Formulas: the group-wise rounding of GPTQ and its MSE search over clipped ranges (IST-DASLab/gptq, quant.py); here the
scale is rounded to the dtype that it is stored in before the codes are computed, and nothing has an absolute floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scheme import Scheme

METHODS = ("rtn", "mse", "hqq")

# Share of the range that the MSE search tries to give up, in hundredths, and the norm it minimises.
_CLIP_STEPS = 80
_CLIP_NORM = 2.4
# HQQ: the norm it minimises, how hard it first holds the errors, by what that rises, and its rounds.
_HQQ_NORM = 0.7
_HQQ_BETA, _HQQ_RISE, _HQQ_ROUNDS = 10.0, 1.01, 20
_ROWS_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in the portable layout.

    qweight: int8 (N, K) codes in [-127, 127]; or uint8 (N, ceil(K / 2)), unsigned 4-bit codes 0..15, even k in the low
        nibble, an unused last nibble 0.
    scale: (N, groups), float32 for 8 bits, bfloat16 for 4.
    zero_point: uint8 (N, groups) in 0..15, or None: 0 for 8 bits, 8 for 4.

    weight = (code - zero_point) * scale.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without the absent one."""
        named = {"qweight": self.qweight, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


class Ranges(NamedTuple):
    """How each group is rounded. scale: (N, groups) in its stored dtype; zero: (N, groups), float32 codes of 0."""

    scale: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, out_features: int, in_features: int, scheme: Scheme) -> Ranges:
        """Scales of 0, to be filled."""
        shape, dtype = portable_spec(scheme, out_features, in_features)["scale"]
        scale = torch.zeros(shape, dtype=dtype)
        return cls(scale, torch.full(shape, _middle(scheme)))

    @classmethod
    def of(cls, quantized: QuantizedWeight, scheme: Scheme) -> Ranges:
        """Those of a quantized weight."""
        zero = quantized.zero_point
        return cls(
            quantized.scale,
            torch.full_like(quantized.scale, _middle(scheme), dtype=torch.float32) if zero is None else zero.float(),
        )

    def spread_zeros(self, size: int, in_features: int) -> Tensor:
        """The code of 0 of each weight, float32 (N, in_features), in groups of size."""
        return _spread(self.zero, size, in_features)


# What codes of a whole byte or more are stored as; 16 bits are the weights themselves, and their scale is 1.
_STORED = {8: torch.int8, 16: torch.bfloat16}


def join_codes(codes: Tensor, ranges: Ranges, scheme: Scheme) -> QuantizedWeight:
    """Codes (N, K), as numbers, in the portable layout."""
    codes = codes.contiguous()
    if scheme.weight_bits != 4:
        return QuantizedWeight(codes.to(_STORED[scheme.weight_bits]), ranges.scale)
    zero = None if scheme.symmetric else ranges.zero.to(torch.uint8)
    return QuantizedWeight(pack_nibbles(codes), ranges.scale, zero)


def _middle(scheme: Scheme) -> float:
    """The code of 0 of symmetric weights."""
    return 8.0 if scheme.weight_bits == 4 else 0.0


def portable_spec(
    scheme: Scheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each portable tensor of an (out_features, in_features) weight."""
    groups = (out_features, scheme.groups(in_features))
    if scheme.weight_bits != 4:
        stored = _STORED[scheme.weight_bits]
        return {"qweight": ((out_features, in_features), stored), "scale": (groups, torch.float32)}
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((out_features, (in_features + 1) // 2), torch.uint8),
        "scale": (groups, torch.bfloat16),
    }
    if not scheme.symmetric:
        spec["zero_point"] = (groups, torch.uint8)
    return spec


def check_portable(quantized: QuantizedWeight, scheme: Scheme, out_features: int, in_features: int) -> None:
    """Raises ValueError, naming the tensor, where the tensors are not a weight of this scheme and shape."""
    tensors = quantized.tensors()
    spec = portable_spec(scheme, out_features, in_features)
    if tensors.keys() != spec.keys():
        raise ValueError(f"{scheme} needs the tensors {sorted(spec)}, got {sorted(tensors)}")
    for name, (shape, dtype) in spec.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, but {scheme} of ({out_features}, {in_features}) "
                f"needs {shape} {dtype}"
            )
    if quantized.qweight.is_meta:
        return
    scale = quantized.scale.float()
    if not torch.isfinite(scale).all() or (scale < 0).any():
        raise ValueError("scale: must be finite and not negative")
    if scheme.weight_bits == 8 and (quantized.qweight == -128).any():
        raise ValueError("qweight: code -128 is outside [-127, 127]")
    if scheme.weight_bits == 16 and not torch.isfinite(quantized.qweight).all():
        raise ValueError("qweight: must be finite")
    if scheme.weight_bits == 4 and in_features % 2 and (quantized.qweight[:, -1] > 15).any():
        raise ValueError("qweight: the nibble beyond the last input must be 0")
    if quantized.zero_point is not None and (quantized.zero_point > 15).any():
        raise ValueError("zero_point: must be in [0, 15]")
    if (scale == 0).any():
        unscaled = QuantizedWeight(quantized.qweight, (scale == 0).to(quantized.scale.dtype), quantized.zero_point)
        if dequantize_weight(unscaled, scheme, in_features).any():
            raise ValueError("scale: is 0 where codes are not")


def quantize_weight(weight: Tensor, scheme: Scheme, method: str = "rtn") -> QuantizedWeight:
    """Rounds a weight (N, K), float, to codes.

    Args:
        weight: finite values; any float dtype, on any device.
        scheme: see Scheme.
        method: "rtn" takes the range of each group; "mse" the share of it, in steps of 1 %, with the least error
            (2.4-norm), never worse than "rtn"; "hqq" the scale and zero point that half-quadratic splitting finds for
            the 0.7-norm, of which the same is true. The last is for 4-bit weights in groups.

    Raises:
        ValueError: an unknown method, a wrong shape, or values that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {METHODS}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: must be a float matrix (N, K), got {tuple(weight.shape)} {weight.dtype}")
    n, k = weight.shape
    scheme.check_shape(n, k)
    if method == "hqq":
        check_hqq(scheme)
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError("weight: has NaN or Inf")
    rows = max(1, _ROWS_AT_ONCE // k)
    parts = [_quantize_rows(weight[i : i + rows].float(), scheme, method) for i in range(0, n, rows)]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return join_codes(codes, Ranges(scales, zeros), scheme)


def dequantize_weight(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The float32 weight (N, in_features) that the codes stand for."""
    if scheme.weight_bits != 4:
        return quantized.qweight.float() * quantized.scale
    codes = unpack_nibbles(quantized.qweight, in_features).float()
    size = scheme.group_size or in_features
    zero = Ranges.of(quantized, scheme).spread_zeros(size, in_features)
    return (codes - zero) * _spread(quantized.scale.float(), size, in_features)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 (N, K) to bytes (N, ceil(K / 2)), even k in the low nibble."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_nibbles: uint8 (N, in_features)."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1)
    return both.flatten(1)[:, :in_features]


def _spread(per_group: Tensor, size: int, in_features: int) -> Tensor:
    """(N, groups) to (N, in_features): each group's value at its inputs."""
    return per_group.repeat_interleave(size, dim=1)[:, :in_features]


def group_ranges(weight: Tensor, scheme: Scheme, share: float = 1.0) -> Ranges:
    """How a share of the range of each group of a weight (N, K), float32, is rounded."""
    grouped = _grouped(weight, scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return Ranges(*group_scale(low * share, high * share, scheme))


def round_to(weight: Tensor, ranges: Ranges, scheme: Scheme) -> QuantizedWeight:
    """The nearest codes to a weight (N, K), float32, with scales and zero points that are given."""
    codes = group_codes(_grouped(weight, scheme), ranges.scale[..., None], ranges.zero[..., None], scheme)
    return join_codes(codes.flatten(1)[:, : weight.shape[1]], ranges, scheme)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight (N, K) as (N, groups, size); zeros beyond K never widen a range, since the range always includes 0."""
    n, k = weight.shape
    size, groups = scheme.group_size or k, scheme.groups(k)
    return torch.nn.functional.pad(weight, (0, groups * size - k)).view(n, groups, size)


def _quantize_rows(weight: Tensor, scheme: Scheme, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """float32 rows (n, K) to codes (n, K), scales (n, groups) as stored, zero points (n, groups)."""
    n, k = weight.shape
    grouped = _grouped(weight, scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    codes, scale, zero = _round(grouped, low, high, scheme)
    if method == "hqq":
        codes, scale, zero = _half_quadratic(grouped, (codes, scale, zero), scheme)
    if method == "mse":
        best = _error(grouped, codes, scale, zero, _CLIP_NORM)
        for step in range(1, _CLIP_STEPS):
            share = 1 - step / 100
            tried = _round(grouped, low * share, high * share, scheme)
            error = _error(grouped, *tried, _CLIP_NORM)
            better = error < best
            best = torch.where(better, error, best)
            codes = torch.where(better[..., None], tried[0], codes)
            scale = torch.where(better, tried[1], scale)
            zero = torch.where(better, tried[2], zero)
    return codes.view(n, -1)[:, :k], scale, zero


def group_scale(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Stored scales and zero points (float) of groups whose values lie in [low, high], which includes 0."""
    if scheme.weight_bits == 16:
        return torch.ones_like(low), torch.zeros_like(low)
    stored = torch.bfloat16 if scheme.weight_bits == 4 else torch.float32
    if scheme.weight_bits == 8:
        span, zero = torch.maximum(-low, high) / 127, torch.zeros_like(low)
    elif scheme.symmetric:
        # The largest magnitude takes the long side of [-8, 7] if it is negative, and fits the short one if not.
        span, zero = torch.maximum(-low / 8, high / 7), torch.full_like(low, 8)
    else:
        span = (high - low) / 15
        zero = (-low / torch.where(span > 0, span, 1)).round().clamp(0, 15)
    scale = span.to(stored)
    # A group whose scale is 0 as stored, or subnormal, holds nothing that the codes could tell apart.
    usable = scale.float() > torch.finfo(stored).tiny
    return torch.where(usable, scale, torch.zeros_like(scale)), zero


def group_codes(values: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The codes, as floats, that are nearest to values; scale and zero, as of group_scale, broadcast to them."""
    if scheme.weight_bits == 16:
        return values.to(torch.bfloat16).to(values.dtype)
    lowest, highest = (-127, 127) if scheme.weight_bits == 8 else (0, 15)
    usable = scale > 0
    divisor = torch.where(usable, scale.to(values.dtype), 1)
    codes = ((values / divisor).round() + zero).clamp(lowest, highest)
    return torch.where(usable, codes, zero)


def _round(grouped: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, stored scales and zero points for the ranges [low, high] of the groups (n, groups, size)."""
    scale, zero = group_scale(low, high, scheme)
    return group_codes(grouped, scale[..., None], zero[..., None], scheme), scale, zero


def check_hqq(scheme: Scheme) -> None:
    """Raises ValueError where the scheme has no groups: one scale for a whole row loses more by HQQ than it gains."""
    if scheme.group_size is None:
        raise ValueError(f"method='hqq', scheme={str(scheme)!r}: wants 4-bit weights in groups, such as 'w4a16g64'")


def _half_quadratic(
    grouped: Tensor, start: tuple[Tensor, Tensor, Tensor], scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a smaller 0.7-norm error of each group than those it starts from.

    Half-quadratic splitting (Badri and Shaji, HQQ, 2023): e, what errors may stay, by shrinkage, then what fits W - e
    best. The original moves a float zero point, which here is whole and moves nothing but the ends of the range; so the
    scale moves too, by least squares. (Of all shares of a range the best by this norm gives up far too much of it: the
    start is the whole.) A step counts for a group only where its codes, with scale and zero point as they are stored, have a smaller error.
    """
    largest = grouped.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1)
    values = grouped / unit
    stored = start[1].dtype
    codes, scale, zero = start
    current = scale.float() / unit[..., 0]
    best, beta = _error(grouped, *start, _HQQ_NORM), _HQQ_BETA
    tried_codes, tried_zero = codes, zero
    for _ in range(_HQQ_ROUNDS):
        error = values - (tried_codes - tried_zero[..., None]) * current[..., None]
        size = error.abs()
        # |e|^(p - 1) is infinite at 0, where the shrinkage is 0 all the same.
        kept = error.sign() * (size - size.clamp_min(torch.finfo(size.dtype).tiny).pow(_HQQ_NORM - 1) / beta).clamp_min(
            0
        )
        wanted = values - kept
        if not scheme.symmetric:
            divisor = torch.where(current > 0, current, 1)
            tried_zero = (tried_codes - wanted / divisor[..., None]).mean(-1).round().clamp(0, 15)
        steps = tried_codes - tried_zero[..., None]
        square = steps.square().sum(-1)
        current = torch.where(square > 0, (wanted * steps).sum(-1) / torch.where(square > 0, square, 1), current)
        tried_scale = (current * unit[..., 0]).to(stored)
        usable = tried_scale.float() > torch.finfo(stored).tiny
        tried_scale = torch.where(usable, tried_scale, scale)
        current = tried_scale.float() / unit[..., 0]
        tried_codes = group_codes(grouped, tried_scale[..., None], tried_zero[..., None], scheme)
        loss = _error(grouped, tried_codes, tried_scale, tried_zero, _HQQ_NORM)
        better = loss < best
        best = torch.where(better, loss, best)
        codes = torch.where(better[..., None], tried_codes, codes)
        scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
        beta *= _HQQ_RISE
    return codes, scale, zero


def _error(grouped: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, norm: float) -> Tensor:
    """The error of each group in a norm, relative to its largest value so that it neither under- nor overflows."""
    largest = grouped.abs().amax(-1, keepdim=True)
    restored = (codes - zero[..., None]) * scale.float()[..., None]
    return ((restored - grouped) / torch.where(largest > 0, largest, 1)).abs().pow(norm).sum(-1)
