"""bitsandbytes' 4-bit layer: NF4 in blocks of 64 inputs."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .peer import Layer, Peer


def _nf4(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    nn: Any = import_module("bitsandbytes.nn")
    n, k = weight.shape
    layer = nn.LinearNF4(k, n, bias=False, compute_dtype=dtype, compress_statistics=False)
    layer.weight = nn.Params4bit(weight.to(dtype), requires_grad=False, compress_statistics=False, quant_type="nf4")
    layer = layer.to("cpu").eval()  # .to() quantizes
    return [layer, *(deepcopy(layer) for _ in range(copies - 1))]


# Its fused kernel supports only bf16.
PEERS = (Peer("bitsandbytes nf4", 4, "bf16", (torch.bfloat16,), _nf4, needs=("bitsandbytes",)),)
