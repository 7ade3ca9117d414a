"""Chains of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from .base import DTYPES, memory

ChainWeight = _C.ChainWeight


def chain(
    dtype: torch.dtype,
    widths: Sequence[int],
    externals: int,
    *,
    rows: str,
    attention: str,
) -> _C.Chain:
    """Steps between matrices (rows, width) of one dtype that run in one call, see csrc/chain.h. rows, attention: names of kernels."""
    return _C.Chain(DTYPES[dtype], list(widths), externals, rows=rows, attention=attention)


_TABLE_DTYPES = DTYPES | {torch.int8: _C.S8, torch.bool: _C.BOOL}


def table(
    tensor: Tensor | None,
) -> tuple[int, int, int, int, int, int, int, int, int, int, int] | None:
    """A tensor of four dimensions, as a run of a chain takes it."""
    if tensor is None:
        return None
    kind = _TABLE_DTYPES[tensor.dtype]
    s0, s1, s2, s3 = tensor.shape
    t0, t1, t2, t3 = tensor.stride()
    return (*memory(tensor), kind, s0, s1, s2, s3, t0, t1, t2, t3)
