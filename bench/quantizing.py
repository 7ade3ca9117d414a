"""What quantizing costs, in presets: weights per second, time over torch's quantize_dynamic, memory, and measuring."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from ..evaluate.memory import peak_mb
from ..passes.quantize import quantize
from ..passes.sparsify import sparsify
from .apart import apart
from .figures import LARGE, Figure
from .shapes import SETS, Shape

LEAST_WEIGHTS_S, MOST_OVER_DYNAMIC = 60e6, 1.2
_DYNAMIC = "quantize_dynamic"
_LEAST_ROUNDS = 3
# Layers whose packed weights together are much larger than two of them.
_LAYERS = 24


class Layers(NamedTuple):
    """Layers of a model, and the most seconds that measuring their speeds may take."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    most_s: float


# Of the larger model each shape once.
MODELS: dict[str, Layers] = {
    "MiniLM": Layers(6 * (*(4 * SETS["minilm"][:1]), *SETS["minilm"][1:]), torch.float32, 3.0),
    "a Llama of 7 B": Layers(((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)), torch.bfloat16, 10.0),
}


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
            model = _stack([dense.clone()])
            start = time.perf_counter()
            way(model)
            times[name].append(time.perf_counter() - start)
    seconds = {name: median(found[1:]) for name, found in times.items()}  # the first round warms up
    for name in WAYS:
        speed, over = n * k / seconds[name], seconds[name] / seconds[_DYNAMIC]
        least, topic = LEAST_WEIGHTS_S / 1e6, "weights/s, pruned" if " " in name else "weights/s"
        yield Figure(f"quantize {n}x{k} {name}, weights/s", speed / 1e6, " million", least, False, topic)
        if " " not in name:
            topic = f"time over {_DYNAMIC}"
            yield Figure(f"quantize {n}x{k} {name} over {_DYNAMIC}, time", over, "x", MOST_OVER_DYNAMIC, topic=topic)


def memory(_: float) -> Iterator[Figure]:
    """The peak memory of quantizing a bfloat16 model without rollback, above the model; at most its two largest layers."""
    n, k = LARGE
    for scheme in ("w8a8", "w4a8g128"):
        found, two_largest = apart(_peak, scheme, torch.get_num_threads())
        name = f"quantize {_LAYERS} layers of {n}x{k} {scheme}, peak above the model"
        yield Figure(name, found, " MB", round(two_largest, 1), topic="peak memory above the model")


def _peak(scheme: str, threads: int, shape: Shape = LARGE) -> tuple[float, float]:
    """(peak above the model, bytes of its two largest layers), in 10^6 bytes."""
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"goal": "memory", "rollback": False, "progress": False}
    quantize(_stack([torch.ones(64, 64)]), scheme, **options)  # loads what it needs
    model = _stack(_equal_rows(shape, torch.bfloat16) for _ in range(_LAYERS))
    sizes = sorted(parameter.nbytes for parameter in model.parameters())
    peak_mb(reset=True)
    before = peak_mb()
    quantize(model, scheme, **options)
    return peak_mb() - before, sum(sizes[-2:]) / 1e6


def measuring(_: float) -> Iterator[Figure]:
    """The seconds that `quantize` measures speeds to choose for layers of the shapes of a model."""
    for name, layers in MODELS.items():
        found = apart(_measuring, name, torch.get_num_threads())
        topic = f"measuring for {name}"
        yield Figure(f"quantize the layers of {name}, measuring their speeds", found, " s", layers.most_s, topic=topic)


def _measuring(name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    layers = MODELS[name]
    model = _stack(_equal_rows(shape, layers.dtype) for shape in layers.shapes)
    return quantize(model, "w8a8", progress=False).timing_s


def _equal_rows(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A weight of one random row: drawing all of them would take longer than quantizing."""
    row = torch.empty(shape[1]).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return row.to(dtype).repeat(shape[0], 1)


def _stack(weights: Iterable[torch.Tensor]) -> nn.Module:
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return nn.Sequential(*layers)


QUANTIZING = (quantizing, memory, measuring)
