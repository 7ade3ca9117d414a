"""How fast layers are quantized, in presets: weights per second, and the time over that of torch's quantize_dynamic."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import nn

from ..passes.quantize import quantize
from ..passes.sparsify import sparsify
from .figures import LARGE, Figure

LEAST_WEIGHTS_S, MOST_OVER_DYNAMIC = 60e6, 1.2
_DYNAMIC = "quantize_dynamic"
_LEAST_ROUNDS = 3


def _dynamic(model: nn.Module) -> None:
    convert: Any = import_module("torch.ao.quantization").quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the deprecation at every call
        convert(model, {nn.Linear}, torch.qint8, inplace=True)


def _rounded(scheme: str) -> Callable[[nn.Module], object]:
    return lambda model: quantize(model, scheme, goal="memory", progress=False)


def _pruned(pattern: str, scheme: str) -> Callable[[nn.Module], object]:
    return lambda model: sparsify(
        model, pattern, method="magnitude", scheme=scheme, calibration=None, goal="memory", progress=False
    )


WAYS: dict[str, Callable[[nn.Module], object]] = {
    **{name: _rounded(name) for name in ("w8a8", "w8a16", "w4a8g128", "w4a8", "w4a16g32asym")},
    **{f"{pattern} {scheme}": _pruned(pattern, scheme) for pattern, scheme in (("50%", "w8a8"), ("2:4", "w4a16g128"))},
}


def quantizing(budget_s: float) -> Iterator[Figure]:
    """Of a float32 layer, all ways in turns; a pruned one also counts the choice of its zeros."""
    n, k = LARGE
    dense = torch.empty(n, k).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[nn.Module], object]] = {_DYNAMIC: _dynamic, **WAYS}
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + budget_s
    while len(times[_DYNAMIC]) <= _LEAST_ROUNDS or time.perf_counter() < end:
        for name, way in ways.items():
            times[name].append(_seconds(way, dense))
    seconds = {name: median(found[1:]) for name, found in times.items()}  # the first round warms up
    for name in WAYS:
        speed, over = n * k / seconds[name], seconds[name] / seconds[_DYNAMIC]
        yield Figure(
            f"quantize {n}x{k} {name}, weights/s", speed / 1e6, " million", LEAST_WEIGHTS_S / 1e6, at_most=False
        )
        if " " not in name:
            yield Figure(f"quantize {n}x{k} {name} over {_DYNAMIC}, time", over, "x", MOST_OVER_DYNAMIC)


def _seconds(way: Callable[[nn.Module], object], dense: torch.Tensor) -> float:
    layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(dense.clone(), requires_grad=False)
    model = nn.Sequential(layer)
    start = time.perf_counter()
    way(model)
    return time.perf_counter() - start
