"""Time of a model by operation, from torch.profiler: linear layers, and torch's own operations around them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from .model import Batch, embed

_WHOLE, _LINEAR = "nybble_demo::whole", "nybble_demo::linear"
# The profiler's names of torch's own operations. Linear layers are marked by hooks, since kernels of an extension may not
# pass through torch's dispatcher.
_RANGES = {
    "linears": _LINEAR,
    "attention": "aten::scaled_dot_product_attention",
    "GELU": "aten::gelu",
    "LayerNorm": "aten::layer_norm",
}


@contextmanager
def quiet_kineto() -> Iterator[None]:
    """Keep the profiler's C++ log lines off stderr; the environment is restored afterwards."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "6"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _marked_linears(model: nn.Module) -> Iterator[None]:
    """Within the context, every module with in_features and out_features runs in a profiler range."""
    open_ranges: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        open_range: Any = record_function(_LINEAR)
        open_ranges.append(open_range.__enter__())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def breakdown(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Shares of the time to embed `batches`, which sum to 1: linears, attention, GELU, LayerNorm, rest."""
    embed(model, batches[0])
    with _marked_linears(model), quiet_kineto(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            with record_function(_WHOLE):
                embed(model, batch)
    totals = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    shares = {name: totals.get(key, 0.0) / totals[_WHOLE] for name, key in _RANGES.items()}
    return {**shares, "rest": 1.0 - sum(shares.values())}
