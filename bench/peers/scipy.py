"""scipy's CSR product, on one thread."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .peer import Layer, Peer
from .torch_sparse import csr_bytes


def _csr(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    sparse: Any = import_module("scipy.sparse")
    one = sparse.csr_array(weight.numpy())
    return [partial(_product, one.copy()) for _ in range(copies)]


def _product(weight: Any, x: Tensor) -> object:
    return (weight @ x.numpy().T).T


PEERS = (Peer("scipy csr", 32, "fp32", (torch.float32,), _csr, needs=("scipy",), sparse="sp", size=csr_bytes),)
