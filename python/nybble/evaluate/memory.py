"""Memory: bytes that a model holds, and the peak memory of the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors or arrays that a module keeps as plain attributes."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for value in vars(module).values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, np.ndarray):
                yield torch.from_numpy(item)


def held_bytes(model: nn.Module) -> int:
    """Bytes of every distinct storage that the model's modules hold.

    torch keeps the weights of `quantize_dynamic` in an opaque object. Its unpacked int8 weights, scales and fp32 bias
    are counted; its padding and column sums are not visible and not counted.
    """
    storages: dict[int, int] = {}
    hidden = 0
    for module in model.modules():
        for tensor in _tensors(module):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        if type(module).__name__ == "LinearPackedParams":
            unpack: Any = module._weight_bias
            weight, bias = unpack()
            scales = 1 if weight.qscheme() == torch.per_tensor_affine else weight.shape[0]
            hidden += weight.nbytes + 12 * scales + (0 if bias is None else bias.nbytes)  # fp64 scale, int32 zero
    return sum(storages.values()) + hidden


def has_peak() -> bool:
    """Whether the system reports the peak memory of a process."""
    return sys.platform == "linux"


def peak_mb(reset: bool = False) -> float:
    """The peak memory of this process since the last reset, in 10^6 bytes; Linux only."""
    peak = _status_mb("VmHWM")
    if reset:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    return peak


def resident_mb() -> float:
    """The memory of this process now, in 10^6 bytes; Linux only."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) * 1024 / 1e6
