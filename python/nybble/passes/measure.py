"""Speedup of a replacement over its dense layer, timed once per shape and process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..nn.kinds import kind_of
from ..nn.module import QuantizedModule
from ..report.data import geometric_mean
from ..weights.sparsity import Unstructured

BUDGET_S = 0.03
# Percentages of zeros that are tried when a sparse layer is slower than dense.
_ZEROS = (50, 60, 70, 80, 90, 95)

_Key = tuple[str, tuple[int, int], bool, torch.dtype, str, int, int, int, str]
# The time of a sparse layer depends on its size. Sizes within 1/64 byte per dense weight share one measurement.
_SIZES = 64
_memo: dict[_Key, float] = {}


def interleaved(fns: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    """Median seconds of each function. They are called in turns (A B A B ...), so clock drift affects all alike.

    Samples above twice a function's fastest are dropped, since another process ran meanwhile. The first round is a
    warm-up and is not counted, unless it alone takes ``budget_s``: then it is the measurement.
    Raises ValueError if there are no functions or ``budget_s`` is not positive.
    """
    if not fns or not budget_s > 0:
        raise ValueError(f"fns has {len(fns)} functions, budget_s={budget_s!r}: must be at least one, and above 0")
    clock = time.perf_counter

    def one_round() -> list[float]:
        times = []
        for fn in fns.values():
            start = clock()
            fn()
            times.append(clock() - start)
        return times

    rounds = [one_round()]
    if sum(rounds[0]) < budget_s:
        end = clock() + budget_s
        rounds = [one_round()]
        while clock() < end:
            rounds.append(one_round())
    return {name: _undisturbed(times) for name, times in zip(fns, zip(*rounds, strict=True), strict=True)}


def _undisturbed(times: Sequence[float]) -> float:
    limit = 2 * min(times)
    kept = sorted(seconds for seconds in times if seconds <= limit)
    return (kept[(len(kept) - 1) // 2] + kept[len(kept) // 2]) / 2


def speedups(dense: nn.Module, layer: QuantizedModule, kernels: Mapping[int, str]) -> dict[int, float]:
    """Dense time / nybble time for each M, in the caller's grad mode.

    ``dense`` maps (M, K) to (M, N) in its own dtype; ``kernels`` maps each M to the kernel that ``layer`` uses there.
    Results are cached for the process by layer kind, shape, bias, dtype, scheme, size, threads, M and kernel.
    """
    dtype, bias = kind_of(dense).parameter_of(dense).dtype, kind_of(dense).bias_of(dense) is not None
    shape = (layer.out_features, layer.in_features)
    size = layer.nbytes * _SIZES // (shape[0] * shape[1])
    result = {}
    for m, kernel in kernels.items():
        kind, threads = type(dense).__name__, torch.get_num_threads()
        key = (kind, shape, bias, dtype, str(layer.scheme), size, threads, m, kernel)
        if key not in _memo:
            _memo[key] = _measure(dense, layer, m, dtype)
        result[m] = _memo[key]
    return result


def pays_from(dense: nn.Module, layer: QuantizedModule, ms: Sequence[int]) -> int | None:
    """The smallest of a few percentages of zeros at which a sparse layer of this shape is faster than ``dense``.

    Measured on random weights, since only the number of zeros matters. None if it is slower even at 95 %.
    """
    for percent in _ZEROS:
        other = _random_layer(layer, Unstructured(percent))
        kernels = {m: other.explain(m).kernel or "" for m in ms}
        if geometric_mean(tuple(speedups(dense, other, kernels).values())) > 1:
            return percent
    return None


def _random_layer(layer: QuantizedModule, sparsity: Unstructured) -> QuantizedModule:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator)
    kept = torch.rand(weight.shape, generator=generator) >= sparsity.zeros
    scheme = replace(layer.scheme, sparsity=sparsity)
    act_range = (-1.0, 1.0) if scheme.static else None
    return type(layer).from_weight(weight * kept, layer.bias, scheme, dtype=layer.dtype, act_range=act_range)


def _measure(dense: nn.Module, layer: QuantizedModule, m: int, dtype: torch.dtype) -> float:
    # A generator of its own, so that timing does not advance the global random state.
    x = torch.randn(m, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = interleaved({"dense": lambda: dense(x), "nybble": lambda: layer(x)}, BUDGET_S)
    return times["dense"] / times["nybble"]


def slower_at(speedup: Mapping[int, float]) -> tuple[int, ...]:
    """The values of M at which the replacement is slower than the dense layer."""
    return tuple(m for m, ratio in speedup.items() if ratio < 1)
