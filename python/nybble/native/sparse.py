"""Sparse weights as masks, values and blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..weights.rounding import portable_spec
from ..weights.scheme import Scheme
from ..weights.sparsity import NofM
from .base import memory
from .weights import weight_shape


def to_bitmask(qweight: Tensor, scheme: Scheme, in_features: int) -> tuple[Tensor, Tensor]:
    """The codes of a sparse weight as mask and values, see portable.py."""
    out_features = qweight.shape[0]
    shape, codes = (
        weight_shape(scheme, out_features, in_features),
        memory(qweight.contiguous()),
    )
    kept = _C.count_kept(shape, codes)
    mask = torch.empty(out_features, (in_features + 7) // 8, dtype=torch.uint8)
    kind = scheme.weight_type
    values = torch.empty(-(-kept // kind.per_byte), dtype=kind.stored)
    _C.to_bitmask(shape, codes, memory(mask), memory(values))
    return mask, values


def from_bitmask(mask: Tensor, values: Tensor, scheme: Scheme, out_features: int, in_features: int) -> Tensor:
    """The codes, with their zeros, of mask and values.

    Raises:
        ValueError: they do not belong together, or the mask breaks the scheme's n of m.
    """
    size, dtype = portable_spec(scheme, out_features, in_features)["qweight"]
    qweight = torch.empty(size, dtype=dtype)
    sparsity = scheme.sparsity
    most, of = (sparsity.n, sparsity.m) if isinstance(sparsity, NofM) else (0, 0)
    shape = weight_shape(scheme, out_features, in_features)
    _C.from_bitmask(
        shape,
        memory(mask.contiguous()),
        memory(values.contiguous()),
        most,
        of,
        memory(qweight),
    )
    return qweight


def check_blocks(start: Tensor, index: Tensor, width: int) -> None:
    """Raises ValueError unless int32 start (strips + 1,) and index (blocks,) are block rows of `width` blocks."""
    _C.check_blocks(memory(start.contiguous()), memory(index.contiguous()), width)
