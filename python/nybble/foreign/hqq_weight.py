"""A weight of HQQ: (code - zero) * scale, in float16 or bfloat16, which rounds twice, since zeros are no whole numbers.

The weight (N, K) is regrouped to (N * K / group_size, group_size), a group in each row; or, with axis 0, to (group_size, N * K /
group_size), a group in each column. The rows of that matrix are cut into equal parts, which are packed above each other: the first
part in the highest bits of a byte, or, of 3 bits, of a word of 30 bits, where rows are filled up to a multiple of 10.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import pairs
from .hqq_fields import Fields
from .weight import ForeignWeight, checked

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PACKED_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class _Packing(NamedTuple):
    """``bits`` of a code, ``parts`` of the matrix above each other in an element of ``stored``."""

    bits: int
    parts: int
    stored: torch.dtype


_PACKINGS = {
    "8bit_u8": _Packing(8, 1, torch.uint8),
    "4bit_u8": _Packing(4, 2, torch.uint8),
    "3bit_32": _Packing(3, 10, torch.int32),
    "2bit_u8": _Packing(2, 4, torch.uint8),
    "1bit_u8": _Packing(1, 8, torch.uint8),
}


def weight_of(fields: Fields, name: str) -> ForeignWeight:
    """The weight of a layer. Raises CheckpointError for settings that are not known, or tensors that do not fit them."""
    return _weight(fields, fields.tensor("W_q"), name, inner=False)


def _weight(fields: Fields, packed: Tensor, name: str, inner: bool) -> ForeignWeight:
    n, k = _shape(fields, name)
    size, axis = _group_size(fields, name, n, k), fields.plain("axis")
    if axis not in (0, 1):
        raise CheckpointError(f"{name}.axis {axis!r}: must be 0 or 1")
    rows, columns = (n, k) if size is None else (n * k // size, size) if axis == 1 else (size, n * k // size)
    packing, bits, packed = _packed(fields, packed, name, rows, columns)
    kind = _DTYPES.get(fields.plain("compute_dtype") or "float16")
    if kind is None:
        raise CheckpointError(f"{name}.compute_dtype: must be one of {', '.join(_DTYPES)}")
    groups = rows if axis == 1 else columns
    scale, zero = (_numbers(fields, key, name, groups, kind, inner) for key in ("scale", "zero"))
    two = axis == 1 and packing.bits == bits == 4 and k % 2 == 0 and packed.numel() % 2 == 0  # a byte, kept so
    codes = _pairs(packed) if two else _codes(packing, packed, rows, bits, name)
    if axis == 0:  # each weight of a row of the matrix is of another group
        scale, zero = (one.expand(rows, columns).reshape(n, k) for one in (scale, zero))
        weight = ForeignWeight(codes.reshape(n, k), bits, scale, zero, 1, arithmetic=kind)
    else:
        flat = ForeignWeight(codes.reshape(1, -1), bits, scale, zero, columns, per_byte=2 if two else 1)
        flat = replace(flat, arithmetic=kind, flat_shape=(n, k))
        weight = flat.by_rows(n, k) or flat
    return checked(weight, name, "scale", zero_scales=True)


def _shape(fields: Fields, name: str) -> tuple[int, int]:
    shape = fields.plain("shape")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"{name}.shape {shape!r}: must be two numbers above 0")
    return shape


def _group_size(fields: Fields, name: str, n: int, k: int) -> int | None:
    size = fields.plain("group_size")
    if size is not None and (type(size) is not int or size < 1 or n * k % size):
        raise CheckpointError(
            f"{name}.group_size {size!r}: must be a number above 0 that divides the {n} * {k} weights"
        )
    return size


def _packed(fields: Fields, packed: Tensor, name: str, rows: int, columns: int) -> tuple[_Packing, int, Tensor]:
    """How the codes are packed, the bits of one, and the tensor of them, in its own dtype."""
    word, bits = fields.plain("packing"), fields.plain("nbits")
    packing = _PACKINGS.get(word) if isinstance(word, str) else None
    if packing is None:
        raise CheckpointError(f"{name}.packing {word!r}: must be one of {', '.join(_PACKINGS)}")
    if not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 1 <= bits <= packing.bits:
        raise CheckpointError(f"{name}.nbits {bits!r}: must be 1 to {packing.bits} with {word}")
    shape = (-(-rows // packing.parts), columns)
    as_float = fields.plain("view_as_float") and packed.dtype in _PACKED_FLOATS
    if as_float and packed.dim() == 2 and packed.nbytes == math.prod(shape) * packing.stored.itemsize:
        packed = packed.contiguous().view(torch.uint8).reshape(-1).view(packing.stored).reshape(shape)
    if packed.dtype != packing.stored or tuple(packed.shape) != shape or (packing.bits != 3 and rows % packing.parts):
        told = f"{tuple(packed.shape)} {packed.dtype}"
        raise CheckpointError(
            f"{name}.W_q: is {told}, must be {shape} {packing.stored} for {word} of ({rows}, {columns})"
        )
    return packing, math.ceil(bits), packed  # 1.58 bits are kept in 2


def _codes(packing: _Packing, packed: Tensor, rows: int, bits: int, name: str) -> Tensor:
    """The codes of the matrix (rows, columns), uint8."""
    codes = torch.empty(packing.parts, *packed.shape, dtype=torch.uint8)
    for i, part in enumerate(codes):
        part.copy_((packed >> packing.bits * (packing.parts - 1 - i)) & ((1 << packing.bits) - 1))
    codes = codes.reshape(-1, packed.shape[1])[:rows]
    if int(codes.max()) >> bits:
        raise CheckpointError(f"{name}.W_q: code {int(codes.max())}: must have {bits} bits")
    return codes


def _pairs(packed: Tensor) -> Tensor:
    """The codes of 4 bits of the matrix, row after row, two a byte: those of the high halves are first."""
    low, high = pairs(packed.reshape(1, -1).numpy()).reshape(2, -1)
    return torch.from_numpy(np.concatenate([high, low]))


def _numbers(fields: Fields, key: str, name: str, groups: int, kind: torch.dtype, inner: bool) -> Tensor:
    """The scale, or the zero point, of each group, (1, groups)."""
    both, quantized = fields.plain("zero_scale") is not None, bool(fields.plain(f"quant_{key}")) and not inner
    if both:
        raise CheckpointError(f"{name}.zero_scale: scales that were moved to other memory are not read")
    if quantized:
        found = _weight(
            fields.inner(f"meta_{key}"), fields.tensor(f"{key}_q"), f"{name}.meta_{key}", inner=True
        ).dequantize()
    else:
        found = fields.tensor(key)
    if not found.is_floating_point() or found.numel() != groups:
        raise CheckpointError(f"{name}.{key}: is {tuple(found.shape)} {found.dtype}, must be {groups} floats")
    return found.reshape(1, groups).to(kind)
