"""torch's sparse products on the CPU: CSR and block CSR."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from .peer import Layer, Peer

_BLOCK = 32


def csr_bytes(weight: Tensor) -> int:
    """Bytes of a CSR weight: float32 values, int32 columns, int32 row starts."""
    return 8 * int(weight.count_nonzero()) + 4 * (weight.shape[0] + 1)


def _bsr_bytes(weight: Tensor) -> int:
    padded = pad(weight, (0, -weight.shape[1] % _BLOCK, 0, -weight.shape[0] % _BLOCK))
    strips, columns = (size // _BLOCK for size in padded.shape)
    blocks = padded.view(strips, _BLOCK, columns, _BLOCK).abs().amax((1, 3)).count_nonzero()
    return int(blocks) * (4 * _BLOCK * _BLOCK + 4) + 4 * (strips + 1)


def _csr(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    sparse = _quietly(weight.to(dtype).to_sparse_csr)
    return [partial(_product, _int32(torch.sparse_csr_tensor, sparse)) for _ in range(copies)]


def _bsr(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    sparse = _quietly(partial(weight.to(dtype).to_sparse_bsr, (_BLOCK, _BLOCK)))
    return [partial(_product, _int32(torch.sparse_bsr_tensor, sparse)) for _ in range(copies)]


def _int32(make: Callable[..., Tensor], sparse: Tensor) -> Tensor:
    """A copy with int32 indices, which MKL uses without conversion."""
    starts, columns = sparse.crow_indices().int(), sparse.col_indices().int()
    return make(starts, columns, sparse.values().clone(), size=sparse.shape, check_invariants=True)


def _quietly(make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the format is in beta
        return make()


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.t()).t()


_FLOAT = (torch.float32,)

PEERS = (
    Peer("torch csr", 32, "fp32", _FLOAT, _csr, sparse="sp", size=csr_bytes),
    Peer("torch bsr", 32, "fp32", _FLOAT, _bsr, sparse="bs32x32", size=_bsr_bytes),
)
