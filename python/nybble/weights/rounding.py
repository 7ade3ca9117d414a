"""Weights to codes and back: the portable form of a weight, and rounding to nearest.

Formulas: the group-wise rounding of GPTQ (IST-DASLab/gptq, quant.py), with two differences: codes are computed with the
scale as it is stored, and no scale has an absolute minimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from .form import USUAL, Form
from .scheme import Scheme
from .search import Rounded, check_hqq, clipped, half_quadratic, round_range
from .weight_type import pack_codes, unpack_codes

METHODS = ("rtn", "mse", "hqq")

_ROWS_AT_ONCE = 1 << 22  # elements
_MOST_BOOK = 2.0**20


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in the portable layout. weight = (code - zero_point) * scale, code * scale + minimum, or book[code] * scale.

    qweight: (N, K) codes, int8, of which rounding makes [-127, 127]; or, with several codes in a byte, uint8
        (N, ceil(K / codes in a byte)), the first input in the lowest bits and unused bits 0. See WeightType.
    scale: (N, groups), of WeightType.scale or one of WeightType.other_scales.
    zero_point: (N, groups), or None where the weight is symmetric: then it is WeightType.middle.
    book: float32 (16,), the value of each code in units of the scale; None: that is code - zero_point.
    order: int32 (K,), a permutation: the input of each column of qweight; None: they are in the order of the inputs.
    minimum: (N, groups), of the dtype of the scales, in place of zero_point; see Form.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    order: Tensor | None = None
    minimum: Tensor | None = None
    book: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def rows(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some rows of the weight: those of a slice share its memory."""
        parts = {name: tensor[rows] for name, tensor in self.tensors().items() if name not in ("order", "book")}
        return QuantizedWeight(**parts, order=self.order, book=self.book)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


class Ranges(NamedTuple):
    """Scales and zero points of all groups. scale: (N, groups) as stored; zero: (N, groups), float32."""

    scale: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, out_features: int, in_features: int, scheme: Scheme) -> Ranges:
        """Scales of 0, to be filled in."""
        shape, dtype = portable_spec(scheme, out_features, in_features)["scale"]
        return cls(torch.zeros(shape, dtype=dtype), torch.full(shape, float(scheme.weight_type.middle)))

    @classmethod
    def of(cls, quantized: QuantizedWeight, scheme: Scheme) -> Ranges:
        """Those of a quantized weight. Raises ValueError if it has minimums."""
        if quantized.minimum is not None:
            raise ValueError("minimum: the weight has float minimums and no zero points")
        scale, zero, middle = quantized.scale, quantized.zero_point, scheme.weight_type.middle
        return cls(scale, torch.full_like(scale, middle, dtype=torch.float32) if zero is None else zero.float())

    def spread_zeros(self, size: int, in_features: int) -> Tensor:
        """The zero points, float32, as they broadcast to (N, in_features) in groups of size."""
        return _spread(self.zero, size, in_features)


def join_codes(codes: Tensor, ranges: Ranges, scheme: Scheme) -> QuantizedWeight:
    """Codes (N, K), as numbers, in the portable layout."""
    kind = scheme.weight_type
    zero = None if scheme.symmetric or kind.zero_point is None else ranges.zero.to(kind.zero_point)
    order = natural_order(codes.shape[1], codes.device) if scheme.ordered else None
    book = book_of(scheme, codes.device)
    return QuantizedWeight(kind.pack(codes.contiguous()), ranges.scale, zero, order, book=book)


def natural_order(in_features: int, device: torch.device | str | None = None) -> Tensor:
    """The `order` of a weight whose columns are in the order of the inputs."""
    return torch.arange(in_features, dtype=torch.int32, device=device)


def book_of(scheme: Scheme, device: torch.device | str | None = None) -> Tensor | None:
    """The `book` of weights that nybble rounds; None where codes are numbers."""
    table = scheme.weight_type.table
    return torch.tensor(table, dtype=torch.float32, device=device) if table else None


def portable_spec(
    scheme: Scheme, out_features: int, in_features: int, form: Form = USUAL
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each portable tensor of an (out_features, in_features) weight."""
    kind, groups = scheme.weight_type, (out_features, scheme.groups(in_features))
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((out_features, -(-in_features // kind.per_byte)), kind.stored),
        "scale": (groups, form.scale or kind.scale),
    }
    if form.minimum:
        spec["minimum"] = spec["scale"]
    elif not scheme.symmetric and kind.zero_point is not None:
        spec["zero_point"] = (groups, kind.zero_point)
    if scheme.ordered:
        spec["order"] = ((in_features,), torch.int32)
    if kind.table:
        spec["book"] = ((len(kind.table),), torch.float32)
    return spec


def check_portable(quantized: QuantizedWeight, scheme: Scheme, out_features: int, in_features: int) -> None:
    """Raises ValueError, naming the tensor, where the tensors are not a weight of this scheme and shape."""
    tensors, kind = quantized.tensors(), scheme.weight_type
    spec = portable_spec(scheme, out_features, in_features, Form.of(tensors, scheme))
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
    if quantized.book is not None:
        _check_book(quantized.book, scale)
    elif not torch.isfinite(scale).all() or (scale < 0).any():
        raise ValueError("scale: must be finite and not negative")
    kind.check(quantized.qweight, in_features)
    zero = quantized.zero_point
    lowest, highest = kind.ends
    if zero is not None and ((zero > highest).any() or (zero < lowest).any()):
        raise ValueError(f"zero_point: must be in [{lowest}, {highest}]")
    if quantized.order is not None:
        _check_order(quantized.order)
    if quantized.minimum is not None:
        if not torch.isfinite(quantized.minimum).all():
            raise ValueError("minimum: must be finite")
        return
    if quantized.book is None and (scale == 0).any():
        unscaled = replace(quantized, scale=(scale == 0).to(quantized.scale.dtype))
        if dequantize_weight(unscaled, scheme, in_features).any():
            raise ValueError("scale: is 0 for weights that are not 0")


def _check_order(order: Tensor) -> None:
    if not torch.equal(order.sort().values, natural_order(len(order), order.device)):
        raise ValueError(f"order: must have each number from 0 to {len(order) - 1} once")


def _check_book(book: Tensor, scale: Tensor) -> None:
    # Products of values and scales stay finite.
    if not (book.abs() <= _MOST_BOOK).all():
        raise ValueError(f"book: must be finite, and at most {_MOST_BOOK:g}")
    if not (scale.abs() <= torch.finfo(torch.float32).max / _MOST_BOOK).all():
        raise ValueError(f"scale: must be finite, and {_MOST_BOOK:g} times it too")


def quantize_weight(weight: Tensor, scheme: Scheme, method: str = "rtn") -> QuantizedWeight:
    """Rounds a weight (N, K), float, to codes.

    Args:
        weight: finite values; any float dtype, on any device.
        scheme: see Scheme.
        method: "rtn" (round to nearest) uses the whole range of each group. "mse" clips the range, in steps of 1 %, to
            the least error in the 2.4-norm. "hqq" finds scale and zero point by half-quadratic splitting for the
            0.7-norm; it needs groups. Neither is worse than "rtn" in its own norm.

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


def _quantize_rows(weight: Tensor, scheme: Scheme, method: str) -> Rounded:
    """Rounds float32 rows (n, K); the codes of the result are (n, K)."""
    grouped = _grouped(weight, scheme)
    low, high = _range(grouped)
    if method == "mse":
        found = clipped(grouped, low, high, scheme)
    else:
        found = round_range(grouped, low, high, scheme)
        if method == "hqq":
            found = half_quadratic(grouped, found, scheme)
    return found._replace(codes=found.codes.flatten(1)[:, : weight.shape[1]])


def dequantize_weight(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The float32 weight (N, in_features) of the codes, its columns in the order of the inputs."""
    kind, size = scheme.weight_type, scheme.group_size or in_features
    codes, zero = kind.unpack(quantized.qweight, in_features), quantized.zero_point
    weight = codes.to(torch.float32, copy=True) if quantized.book is None else quantized.book[codes.int()]
    # A view by groups where they are whole, so that what they share broadcasts.
    whole = in_features % size == 0
    grouped = weight.unflatten(1, (-1, size)) if whole else weight

    def shared(value: Tensor) -> Tensor:
        return value.float()[..., None] if whole else _spread(value.float(), size, in_features)

    if quantized.book is None and zero is not None:
        grouped -= shared(zero)
    elif quantized.book is None and kind.middle and quantized.minimum is None:
        grouped -= kind.middle
    grouped *= shared(quantized.scale)
    if quantized.minimum is not None:
        grouped += shared(quantized.minimum)
    if quantized.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, quantized.order.long(), weight)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 (N, K) to bytes (N, ceil(K / 2)), even k in the low nibble."""
    return pack_codes(codes, 2)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_nibbles: uint8 (N, in_features)."""
    return unpack_codes(packed, 2, in_features)


def group_ranges(weight: Tensor, scheme: Scheme, share: float = 1.0) -> Ranges:
    """Scales and zero points for a share of the range of each group of a weight (N, K), float32."""
    low, high = _range(_grouped(weight, scheme))
    return Ranges(*scheme.weight_type.scales(low * share, high * share, scheme.symmetric))


def round_to(weight: Tensor, ranges: Ranges, scheme: Scheme) -> QuantizedWeight:
    """Rounds a weight (N, K), float32, to nearest with given scales and zero points."""
    grouped = _grouped(weight, scheme)
    codes = scheme.weight_type.nearest(grouped, ranges.scale[..., None], ranges.zero[..., None])
    return join_codes(codes.flatten(1)[:, : weight.shape[1]], ranges, scheme)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight (N, K) as (N, groups, size), padded with 0, which is in every range already."""
    n, k = weight.shape
    size, groups = scheme.group_size or k, scheme.groups(k)
    return zero_pad(weight, (0, groups * size - k)).view(n, groups, size)


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, and 0."""
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _spread(per_group: Tensor, size: int, in_features: int) -> Tensor:
    """The value of each group at its inputs, (N, groups) to (N, in_features); one group stays (N, 1) and broadcasts."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(size, dim=1)[:, :in_features]
