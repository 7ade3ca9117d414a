"""A small model as torch has it and as nybble saves it, for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import nybble


def dense(seed: int = 0, **kwargs: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(40, 24, **kwargs), nn.BatchNorm1d(24), nn.Sequential(nn.Linear(24, 16, bias=False)), nn.LayerNorm(16)
    )


def quantized(scheme: str = "w4a16g32asym", seed: int = 0) -> nn.Sequential:
    model = dense(seed)
    nybble.quantize(model, scheme, goal="memory")
    return model.eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
