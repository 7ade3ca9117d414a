"""torch's own dense layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from .peer import Layer, Peer


def _make(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    return [partial(linear, weight=weight.to(dtype, copy=True)) for _ in range(copies)]


BF16 = "torch bf16"
FP32 = "torch fp32"

PEERS = (
    Peer(FP32, 32, "fp32", (torch.float32,), _make),
    Peer(BF16, 16, "bf16", (torch.bfloat16,), _make),
)
