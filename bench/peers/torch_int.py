"""torch's quantized products: quantized.dynamic, and the private operators that torch's libraries use."""

from __future__ import annotations

import platform
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .peer import Layer, Peer

_GROUP = 128


def _dynamic(weight: Tensor, dtype: torch.dtype, copies: int, engine: str) -> list[Layer]:
    """torch.ao.nn.quantized.dynamic.Linear, one scale per output channel, with one of torch's engines."""
    modules: Any = import_module("torch.ao.nn.quantized.dynamic")
    qconfig: Any = import_module("torch.ao.quantization.qconfig").per_channel_dynamic_qconfig
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # the engine at packing time also runs the layer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the deprecation at every call
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            dense.weight = nn.Parameter(weight)
            dense.qconfig = qconfig
            return [modules.Linear.from_float(dense) for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = before


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes in [-127, 127] and float32 scales (rows, 1) of a matrix, per row."""
    scale = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-20) / 127
    return (weight / scale).round().to(torch.int8), scale


def _int_mm(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    """torch._int_mm of per-token quantized activations and an int8 weight."""
    codes, scale = int8_rows(weight)
    scale_row = scale.t().to(dtype)

    def layer(x: Tensor, transposed: Tensor) -> Tensor:
        rows, row_scale = int8_rows(x)
        return torch._int_mm(rows, transposed).to(dtype) * (row_scale.to(dtype) * scale_row)

    return [partial(layer, transposed=codes.clone().t()) for _ in range(copies)]


def _int8pack(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    codes, scale = int8_rows(weight)
    scales = scale.flatten().to(dtype)
    return [partial(_call_int8pack, codes=codes.clone(), scales=scales) for _ in range(copies)]


def _call_int8pack(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, codes, scales)


def _int4pack(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    """torch._weight_int4pack_mm_for_cpu with groups of 128: weight = (code - 8) * scale + zero."""
    n, k = weight.shape
    if k % _GROUP:
        raise ValueError(f"K={k}: must be a multiple of the group size {_GROUP}")
    groups = weight.view(n, -1, _GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-20)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    scale_and_zero = torch.stack((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous().to(dtype)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return [partial(_call_int4pack, packed=packed.clone(), scale_and_zero=scale_and_zero) for _ in range(copies)]


def _call_int4pack(x: Tensor, packed: Tensor, scale_and_zero: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, _GROUP, scale_and_zero)


_FLOAT, _BF16_FIRST = (torch.float32,), (torch.bfloat16, torch.float32)
# On Arm, onednn is wrong with scales by channel where the rows are not as many as in the first call (pytorch/pytorch#145216).
_ENGINES = ("qnnpack",) if platform.machine() in ("aarch64", "arm64") else ("x86", "onednn")

PEERS = (
    *(Peer(f"torch dynamic {engine}", 8, "int8", _FLOAT, partial(_dynamic, engine=engine)) for engine in _ENGINES),
    Peer("torch int_mm", 8, "int8", _BF16_FIRST, _int_mm),
    Peer("torch int8pack", 8, "bf16", (torch.bfloat16,), _int8pack),
    Peer("torch int4pack g128", 4, "bf16", (torch.bfloat16,), _int4pack),
)
