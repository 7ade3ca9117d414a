"""Speedup of a replacement over its dense layer, measured once per shape and process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..nn.kinds import kind_of
from ..nn.module import QuantizedModule
from ..report.speed import Speed, mean_speed
from ..weights.sparsity import Unstructured
from . import paired

# The share of all seconds that one layer may take as long as neither it nor its replacement is faster.
_PATIENCE = 1 / 12
# Percentages of zeros that are tried when a sparse layer is slower than dense.
_ZEROS = (50, 60, 70, 80, 90, 95)
# The time of a sparse layer depends on its size. Sizes within 1/64 byte per dense weight share one measurement.
_SIZES = 64

Speeds = dict[int, Speed]
_memo: dict[object, Speeds] = {}


class Timer:
    """Measures the layers of one call of a pass.

    Args:
        seconds: for all measurements.
        tell: gets a line before each measurement.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self.seconds, self.spent = seconds, 0.0
        self._tell = tell

    def speeds(self, old: nn.Module, new: QuantizedModule, ms: Sequence[int], left: int) -> Speeds:
        """Time of ``old`` over that of ``new`` for each M, in the caller's grad mode.

        Both map (M, K) to (M, N). Results are cached for the process.

        Args:
            left: how many measurements share the seconds that are left, this one included.
        """
        key = (_described(old, ms), _described(new, ms), torch.get_num_threads(), self.seconds)
        if key not in _memo:
            self._tell(f"timing {new.out_features}x{new.in_features} {new.scheme}")
            there = max(0.0, self.seconds - self.spent)
            most = there / max(1, left)
            begin = time.perf_counter()
            limits = paired.Limits(most, min(most, _PATIENCE * self.seconds), least=there)
            _memo[key] = paired.decide({m: _pairs(old, new, m) for m in ms}, limits)
            self.spent += time.perf_counter() - begin
        return _memo[key]

    def pays_from(self, dense: nn.Module, layer: QuantizedModule, ms: Sequence[int], left: int) -> int | None:
        """The smallest of a few percentages of zeros at which a sparse layer of this shape is faster than ``dense``.

        Measured on random weights, since only the number of zeros matters. None if it is not faster even at 95 %.
        """
        for i, percent in enumerate(_ZEROS):
            other = _random_layer(layer, Unstructured(percent))
            if mean_speed(list(self.speeds(dense, other, ms, left + len(_ZEROS) - i).values())).is_faster:
                return percent
        return None


def _described(layer: nn.Module, ms: Sequence[int]) -> object:
    """Equal for layers that take the same time."""
    if isinstance(layer, QuantizedModule):
        n, k = layer.out_features, layer.in_features
        size = layer.nbytes * _SIZES // (n * k)
        kernels = tuple((m, layer.explain(m).kernel) for m in ms)
        return type(layer).__name__, (n, k), layer.bias is not None, layer.dtype, str(layer.scheme), size, kernels
    kind = kind_of(layer)
    weight = kind.parameter_of(layer)
    return type(layer).__name__, tuple(weight.shape), kind.bias_of(layer) is not None, weight.dtype


def _pairs(old: nn.Module, new: QuantizedModule, m: int) -> paired.Pairs:
    # A generator of its own, so that timing does not advance the global random state.
    x = torch.randn(m, new.in_features, generator=torch.Generator().manual_seed(0)).to(new.dtype)
    return paired.Pairs(lambda: old(x), lambda: new(x))


def _random_layer(layer: QuantizedModule, sparsity: Unstructured) -> QuantizedModule:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator)
    kept = torch.rand(weight.shape, generator=generator) >= sparsity.zeros
    scheme = replace(layer.scheme, sparsity=sparsity)
    act_range = (-1.0, 1.0) if scheme.static else None
    return type(layer).from_weight(weight * kept, layer.bias, scheme, dtype=layer.dtype, act_range=act_range)
