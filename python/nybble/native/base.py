"""What all of them share: dtypes, and tensors as addresses and byte counts."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .. import _C, __version__

if _C.version != __version__:
    raise ImportError(f"nybble {__version__} found a compiled extension of version {_C.version}: reinstall it")

DTYPES: dict[torch.dtype, int] = {
    torch.float32: _C.F32,
    torch.bfloat16: _C.BF16,
    torch.float16: _C.F16,
    torch.int32: _C.S32,
}
# By the panel number of csrc/abi.h.
PANEL_DTYPES = (
    *(torch.float32, torch.int8, torch.int16, torch.uint8, torch.bfloat16, torch.uint8),
    torch.int8,  # pairs
    *(torch.uint8, torch.int8, torch.bfloat16),  # lines
)
BF16_LINES = 9
Memory: TypeAlias = tuple[int, int]
NOTHING = (0, 0)


def memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address of the first element, and the bytes from there to the end of the storage."""
    if tensor is None:
        return NOTHING
    if tensor.is_contiguous():
        return tensor.data_ptr(), int(tensor.nbytes)
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr(), int(tensor.untyped_storage().nbytes()) - offset


def vector(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """A contiguous vector of floats, as the steps of a chain take weights of norms and biases."""
    return None if tensor is None else (*memory(tensor), DTYPES[tensor.dtype])
