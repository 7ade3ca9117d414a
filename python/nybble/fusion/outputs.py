"""Memory for what chains return, used again once nothing refers to it: the system fills new pages with zeros, which takes
the residual stream of a model with many tokens a good part of a layer's time."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

_LEAST = 1 << 18  # bytes: the allocator keeps smaller ones itself
_KEPT = 4  # of each thread
_FREE = 3  # references to an array that no tensor reads: of the list, the loop, and the call that counts them


class _Held(threading.local):
    """The arrays of a thread."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def take(self, nbytes: int) -> Any:
        """One of at least so many bytes, and at most twice as many."""
        for array in self.arrays:
            if nbytes <= array.nbytes <= 2 * nbytes and sys.getrefcount(array) == _FREE:
                return array
        self.arrays = [torch.empty(nbytes, dtype=torch.uint8).numpy(), *self.arrays[: _KEPT - 1]]
        return self.arrays[0]


_held = _Held()


def empty(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """As torch.empty."""
    nbytes = rows * width * dtype.itemsize
    if nbytes < _LEAST:
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(_held.take(nbytes), dtype=dtype, count=rows * width).view(rows, width)
