"""Memory for what chains return, used again once nothing refers to it: the system fills new pages with zeros, which takes
the residual stream of a model with many tokens a good part of a layer's time."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEAST = 1 << 18  # bytes: the allocator keeps smaller ones itself
_KEPT = 4  # of each thread


def _first_free(arrays: list[Any], nbytes: int, references: int) -> Any:
    """The first of at least so many bytes, and at most twice as many, that has so many references; or None."""
    for array in arrays:
        if nbytes <= array.nbytes <= 2 * nbytes and sys.getrefcount(array) == references:
            return array
    return None


def _references() -> int:
    """How many an array has in that loop if no tensor reads it: versions of Python count differently. -1 if the counts say
    nothing, since threads run without a lock."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return -1
    arrays = [np.empty(1, np.uint8)]
    return next((count for count in range(1, 5) if _first_free(arrays, 1, count) is not None), -1)


_FREE = _references()


class _Held(threading.local):
    """The arrays of a thread."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def take(self, nbytes: int) -> Any:
        """One of at least so many bytes, and at most twice as many."""
        found = _first_free(self.arrays, nbytes, _FREE)
        if found is not None:
            return found
        self.arrays = [torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy(), *self.arrays[: _KEPT - 1]]
        return self.arrays[0]


_held = _Held()


def empty(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """As torch.empty."""
    nbytes = rows * width * dtype.itemsize
    if nbytes < _LEAST:
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(_held.take(nbytes), dtype=dtype, count=rows * width).view(rows, width)
