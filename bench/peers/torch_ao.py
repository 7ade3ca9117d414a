"""torchao's quantized linear layers in eager mode. Compiled ones need a C++ compiler, and are slower than torch's own."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .peer import Layer, Peer


def _make(weight: Tensor, dtype: torch.dtype, copies: int, module: str, config: str) -> list[Layer]:
    options: dict[str, Any] = {"set_inductor_config": False}  # True would change torch's settings for the process
    quantization: Any = import_module("torchao.quantization")
    if "Int4" in config and weight.shape[1] % 128:
        raise ValueError(f"K={weight.shape[1]}: must be a multiple of the group size 128")
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    model = nn.Sequential(dense)
    quantization.quantize_(model, getattr(import_module(module), config)(**options))
    return [model[0], *(deepcopy(model[0]) for _ in range(copies - 1))]


def _peer(name: str, weight_bits: int, multiply: str, config: str, module: str = "torchao.quantization") -> Peer:
    make = partial(_make, module=module, config=config)
    return Peer(name, weight_bits, multiply, (torch.bfloat16, torch.float32), make, needs=("torchao",))


PEERS = (
    _peer("torchao int8 weight-only", 8, "bf16", "Int8WeightOnlyConfig"),
    _peer("torchao int8 dynamic", 8, "int8", "Int8DynamicActivationInt8WeightConfig"),
    _peer(
        "torchao int4 g128", 4, "bf16", "PrototypeInt4WeightOnlyConfig", module="torchao.prototype.quantization.int4"
    ),
)
