"""Time of a model outside its linear layers, measured with every linear layer replaced by a stub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..demo.breakdown import quiet_kineto

_TOP = 6  # number of operations reported


class _Stub(nn.Module):
    """Replaces a linear layer: returns zeros of the output's shape, at no cost after the first call."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.zeros = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if self.zeros.shape != shape or self.zeros.dtype != x.dtype:
            self.zeros = torch.zeros(shape, dtype=x.dtype)
        return self.zeros


@contextmanager
def without_linears(model: nn.Module) -> Iterator[None]:
    """While active, every linear layer, dense or quantized, is replaced by a stub."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "in_features") and hasattr(child, "out_features") and getattr(child, "takes_rows", True)
    ]
    for parent, name, child in found:
        setattr(parent, name, _Stub(cast(int, child.out_features)))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def op_ms(run: Callable[[], object], steps: int) -> dict[str, float]:
    """The operations with the most self time: name -> milliseconds per step, from torch.profiler."""
    run()
    with quiet_kineto(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total / 1e3 / steps for event in events[:_TOP]}
