"""The integer products that torch brings: quantized.dynamic, and operators that its own libraries build on."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .peer import Layer, Peer

_GROUP = 128


def _dynamic(weight: Tensor, dtype: torch.dtype, copies: int, engine: str) -> list[Layer]:
    """torch.ao.nn.quantized.dynamic.Linear, a scale an output channel, under one of torch's engines."""
    modules: Any = import_module("torch.ao.nn.quantized.dynamic")
    qconfig: Any = import_module("torch.ao.quantization.qconfig").per_channel_dynamic_qconfig
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # the engine that packs is the one that runs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of this path at every call
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            dense.weight = nn.Parameter(weight)
            dense.qconfig = qconfig
            return [modules.Linear.from_float(dense) for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = before


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 in [-127, 127] and float32 scales (rows, 1) of a matrix, row by row."""
    scale = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-20) / 127
    return (weight / scale).round().to(torch.int8), scale


def _int_mm(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    """torch._int_mm between activations rounded row by row and an int8 weight."""
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
    """torch._weight_int4pack_mm_for_cpu with 128 inputs a group: weight = (code - 8) * scale + zero."""
    n, k = weight.shape
    if k % _GROUP:
        raise ValueError(f"K={k} is not a multiple of its group of {_GROUP}")
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

PEERS = (
    Peer("torch dynamic x86", 8, "int8", _FLOAT, partial(_dynamic, engine="x86")),
    Peer("torch dynamic onednn", 8, "int8", _FLOAT, partial(_dynamic, engine="onednn")),
    Peer("torch int_mm", 8, "int8", _BF16_FIRST, _int_mm),
    Peer("torch int8pack", 8, "bf16", (torch.bfloat16,), _int8pack),
    Peer("torch int4pack g128", 4, "bf16", (torch.bfloat16,), _int4pack),
)
