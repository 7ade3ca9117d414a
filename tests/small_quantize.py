"""A small model, quantize without timing, and a report's rows by name, for the tests of quantize and sparsify."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import nybble
from nybble.report.data import LayerReport
from nybble.report.report import Report


def mlp(**kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24, **kwargs), nn.ReLU(), nn.Sequential(nn.Linear(24, 8, **kwargs)))


def small(model: nn.Module, scheme: str = "w8a8", **kwargs: Any) -> Report:
    return nybble.quantize(model, scheme, goal="memory", **kwargs)


def rows(report: Report) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}
