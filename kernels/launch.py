"""What every launch of a Triton kernel needs: the device to be current, and the dtype that its products are computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Gpu

# The interpreter computes bf16 products silently wrong, so there they are widened first.
INTERPRETED: bool = triton.knobs.runtime.interpret

_PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# An H100's: what the interpreter takes, and what is compiled for another machine.
_NO_DEVICE = Gpu("sm90", 132, 227 << 10)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What the operands of a product are held in, for activations of a dtype."""
    return tl.float32 if INTERPRETED else _PRODUCTS[dtype]


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on that one's current stream."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def machine(device: torch.device) -> Gpu:
    """What configurations are chosen for on a device."""
    if device.type != "cuda":
        return _NO_DEVICE
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack shared_memory_per_block_optin
    target = "sm90" if (found.major, found.minor) == (9, 0) else "sm80"
    return Gpu(target, found.multi_processor_count, found.shared_memory_per_block_optin)
