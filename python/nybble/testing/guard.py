"""Tensors next to a page that faults: a kernel that reads or writes out of bounds crashes or leaves a mark."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

CANARY = 0xCD


@dataclass
class Guarded:
    """A tensor next to a page that faults, with canary bytes on its other side."""

    tensor: Tensor
    canaries: Tensor

    def intact(self) -> bool:
        """Whether the canary bytes are unchanged."""
        return bool((self.canaries == CANARY).all())


@contextmanager
def guarded(shape: tuple[int, ...], dtype: torch.dtype, flush: str) -> Iterator[Guarded]:
    """A tensor that ends (flush="right") or starts ("left") at a page that faults, with canaries on the other side."""
    page = mmap.PAGESIZE
    nbytes = dtype.itemsize * int(torch.Size(shape).numel())
    body = max(1, -(-(nbytes + 64) // page)) * page
    region = mmap.mmap(-1, body + 2 * page)
    anchor = ctypes.c_char.from_buffer(region)
    base = ctypes.addressof(anchor)
    for at in (0, page + body):
        _protect(base + at, page, 0)
    try:
        memory = torch.frombuffer(memoryview(region)[page : page + body], dtype=torch.uint8)
        memory.fill_(CANARY)
        data = memory[body - nbytes :] if flush == "right" else memory[:nbytes]
        canaries = memory[: body - nbytes] if flush == "right" else memory[nbytes:]
        yield Guarded(data.view(dtype).view(shape), canaries)
    finally:
        for at in (0, page + body):
            _protect(base + at, page, mmap.PROT_READ | mmap.PROT_WRITE)
        del anchor


def _protect(address: int, nbytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
