"""The method fp8 of transformers, and of DeepSeek's and Qwen's own files: float8 weights with scales of blocks.

weight, float8_e4m3fn (N, K), and weight_scale_inv, float32, with a number for each block of weight_block_size, or a single one.
In spite of its name it is multiplied with. Activations, which that method rounds to float8, stay floats.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .float_codes import block_of, float8_codes
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked

_SCALE = "weight_scale_inv"


def detect(source: Source) -> bool:
    return source.method == "fp8"


def read_file(source: Source) -> Opened:
    tensors = Tensors(source.path)
    modules = modules_of(tensors.entries, (_SCALE,), ("activation_scale",))
    if not modules:
        raise CheckpointError(f"{source.path}: says fp8, but has no tensor *.{_SCALE}")
    for name, parts in modules.items():
        parts["weight"] = f"{name}.weight"
    told = source.quantization.get("weight_block_size", [128, 128])
    block = None if told is None else block_of(told, f"{source.path}: weight_block_size")
    return opened(source, tensors, modules, functools.partial(_read, tensors=tensors, block=block))


def _read(name: str, tensors: Tensors, block: tuple[int, int] | None) -> ForeignWeight:
    codes, book = float8_codes(tensors.typed(f"{name}.weight", (torch.float8_e4m3fn,), 2), f"{name}.weight")
    n, k = codes.shape
    rows, columns = block or (max(n, 1), max(k, 1))
    scale = _scales(tensors, name, -(-n // rows), -(-k // columns))
    spread = scale.repeat_interleave(rows, dim=0)[:n]
    return checked(ForeignWeight(codes, 8, spread, 0, columns, book=book), name, _SCALE)


def _scales(tensors: Tensors, name: str, rows: int, columns: int) -> Tensor:
    """One of each block; a single one may be there in any number of dimensions."""
    scale = tensors.read(f"{name}.{_SCALE}")
    single = rows * columns == scale.numel() == 1
    if scale.dtype not in FLOATS or not (single or tuple(scale.shape) == (rows, columns)):
        told = f"is {tuple(scale.shape)} {scale.dtype}"
        raise CheckpointError(f"{name}.{_SCALE}: {told}, must be floats ({rows}, {columns}), one for each block")
    return scale.reshape(rows, columns)
