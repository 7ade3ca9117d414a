"""compressed-tensors' layouts of sparse weights, which its versions since 0.15 do not read: values and a bit mask.

bitmask, uint8 (N, ceil(K / 8)): bit i of a byte is column 8 * byte + i. The values are those of the set bits, row by row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .compressed_dense import shape_of, signed_weight
from .compressed_setting import Context
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight

FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")


def _mask(tensors: Tensors, name: str, n: int, k: int) -> NDArray[np.bool_]:
    stored = tensors.shaped(f"{name}.bitmask", (torch.uint8,), (n, -(-k // 8))).numpy()
    bits = np.unpackbits(stored, axis=1, bitorder="little")
    if bits[:, k:].any():
        raise CheckpointError(f"{name}.bitmask: bits beyond column {k} are set")
    return bits[:, :k].astype(bool)


def _finite(weight: Tensor, name: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise CheckpointError(f"{name}.compressed: must be finite")
    return weight


def _filled(mask: NDArray[np.bool_], values: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[torch.from_numpy(mask)] = values.flatten()
    return dense


def _dense24(name: str, context: Context, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The weight (N, K) of the format sparse-24-bitmask: two of four columns are stored."""
    tensors = context.tensors
    n, k = shape_of(tensors, f"{name}.shape")
    values = tensors.shaped(f"{name}.compressed", dtypes, (n, k // 2))
    mask = _mask(tensors, name, n, k)
    if k % 4 or (mask.reshape(n, -1, 4).sum(2) != 2).any():
        raise CheckpointError(f"{name}.bitmask: must have two set bits in each four columns")
    return _filled(mask, values)


def codes24(name: str, context: Context) -> ForeignWeight:
    """int8 codes of the format sparse-24-bitmask."""
    return signed_weight(name, _dense24(name, context, (torch.int8,)), context)


def floats24(name: str, context: Context) -> Tensor:
    """A float weight of the format sparse-24-bitmask."""
    return _finite(_dense24(name, context, FLOATS), name)


def bitmask_floats(name: str, context: Context) -> Tensor:
    """A float weight of the format sparse-bitmask; ``name`` is the weight's own."""
    tensors = context.tensors
    n, k = shape_of(tensors, f"{name}.shape")
    values = tensors.typed(f"{name}.compressed", FLOATS, 1)
    mask = _mask(tensors, name, n, k)
    counts = mask.sum(1)
    offsets = tensors.shaped(f"{name}.row_offsets", (torch.int64,), (n,)).numpy()
    if not np.array_equal(offsets, np.cumsum(counts) - counts):
        raise CheckpointError(f"{name}.row_offsets: are not the sums of the set bits of the rows before")
    if values.shape[0] != counts.sum():
        raise CheckpointError(f"{name}.compressed: has {values.shape[0]} values, the bitmask {counts.sum()} set bits")
    return _finite(_filled(mask, values), name)
