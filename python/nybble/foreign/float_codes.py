"""Codes that are small floats: what each stands for, and scales that are powers of two.

float8_e4m3fn: a sign, 4 bits of an exponent and 3 of a fraction; float4_e2m1: a sign, 2 bits and 1. Exponents (E8M0): a byte e
stands for 2 ** (e - 127). Both are of the Open Compute Project's formats of 8 bits and of microscaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT4 = (*_HALF, *(-value for value in _HALF))


def float8_codes(stored: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Codes, uint8, of a tensor of float8_e4m3fn, and the value of each of 256. Raises CheckpointError for one that is NaN."""
    codes = stored.view(torch.uint8)
    if ((codes & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{name}: must be finite")
    values = torch.arange(256, dtype=torch.uint8).view(stored.dtype).float()
    return codes, values.nan_to_num(0.0)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Scales, float32, of bytes of exponents; that of 255 is infinite."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)


def block_of(told: object, where: str) -> tuple[int, int]:
    """The rows and columns of blocks of weights that have one scale.

    Raises CheckpointError for other than powers of 2: where blocks are not whole, others fit the shape of the scales too.
    """
    if isinstance(told, list) and len(told) == 2 and all(type(size) is int and size > 0 for size in told):
        rows, columns = told
        if rows & (rows - 1) == 0 and columns & (columns - 1) == 0:
            return rows, columns
    raise CheckpointError(f"{where} {told!r}: must be two powers of 2, of rows and columns")
