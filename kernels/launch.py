"""What every launch of a Triton kernel needs: the device to be current, and the dtype that its products are computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes bf16 products silently wrong, so there they are widened first.
INTERPRETED: bool = triton.knobs.runtime.interpret

_PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Multiprocessors where none can be asked: the interpreter's, and of what is compiled for another machine (an H100's).
_NO_DEVICE = 132


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What the operands of a product are held in, for activations of a dtype."""
    return tl.float32 if INTERPRETED else _PRODUCTS[dtype]


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on that one's current stream."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def machine(device: torch.device) -> tuple[str, int]:
    """The target ("sm90") whose configurations a device takes, and how many multiprocessors it has."""
    if device.type != "cuda":
        return "sm90", _NO_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return ("sm90" if properties.major >= 9 else "sm80"), properties.multi_processor_count
