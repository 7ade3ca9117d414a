"""Shared by all Triton launches: making the device current, the GPU's properties, the dtype of the products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Gpu

# Triton's interpreter computes wrong bf16 products without an error, so operands are widened to float32 there.
INTERPRETED: bool = triton.knobs.runtime.interpret

_PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# An H100, used by the interpreter and when compiling for another machine.
_NO_DEVICE = Gpu("sm90", 132, 227 << 10)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the multiplied operands, for activations of a dtype."""
    return tl.float32 if INTERPRETED else _PRODUCTS[dtype]


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current; Triton launches on its current stream."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def machine(device: torch.device) -> Gpu:
    """The properties of a device that decide the configuration."""
    if device.type != "cuda":
        return _NO_DEVICE
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack shared_memory_per_block_optin
    target = "sm90" if (found.major, found.minor) == (9, 0) else "sm80"
    return Gpu(target, found.multi_processor_count, found.shared_memory_per_block_optin)
