"""Speedup of a replacement over its dense layer, measured once per shape and process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .. import paired
from ..nn.kinds import kind_of, settings_of
from ..nn.module import QuantizedModule
from ..report.speed import Speed, mean_speed
from ..weights.sparsity import Unstructured

# The share of all seconds that one layer may take, after its first pairs, as long as neither it nor its replacement is
# faster.
_PATIENCE = 1 / 12
# Percentages of zeros that are tried when a sparse layer is slower than dense.
_ZEROS = (50, 60, 70, 80, 90, 95)
# The time of a sparse layer depends on its size. Sizes within 1/64 byte per dense weight share one measurement.
_SIZES = 64

Speeds = dict[int, Speed]


class _Known(NamedTuple):
    """Speeds, and for how many ``seconds`` in all the call measured that found them."""

    speeds: Speeds
    seconds: float

    def holds(self, seconds: float) -> bool:
        """Whether a call that measures for these seconds would find the same: it is decided, or was given as long."""
        mean = mean_speed(list(self.speeds.values()))
        return mean.is_faster or mean.is_slower or seconds <= self.seconds


_memo: dict[object, _Known] = {}


class Timer:
    """Measures the layers of one call of a pass.

    No measurement begins when the seconds are spent; one that has begun gets a pair of calls for each M.

    Args:
        seconds: for all measurements.
        tell: gets a line before each measurement.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self.seconds, self.spent = seconds, 0.0
        self._tell = tell
        self._found: dict[object, Speeds] = {}

    @property
    def is_spent(self) -> bool:
        """Whether there is no time left."""
        return self.spent >= self.seconds

    def speeds(self, old: nn.Module, new: QuantizedModule, ms: Sequence[int], left: int) -> Speeds:
        """Time of ``old`` over that of ``new`` for each M, in the caller's grad mode; empty if the time is spent.

        Both get ``new.example(M)``. Results are cached for the process, except those that more time would have decided.

        Args:
            left: how many measurements share the seconds that are left, this one included.
        """
        key = _key(old, new, ms)
        if key not in self._found:
            known = _memo.get(key)
            if known is not None and known.holds(self.seconds):
                self._found[key] = known.speeds
            elif self.is_spent:
                return {}
            else:
                self._tell(f"timing {new.out_features}x{new.in_features} {new.scheme}")
                self._found[key] = self._measured(key, {m: _pairs(old, new, m) for m in ms}, left)
        return self._found[key]

    def put(self, old: nn.Module, new: QuantizedModule, speeds: Speeds) -> None:
        """Set what ``speeds`` gives for these layers in this call, since it follows from other measurements."""
        self._found[_key(old, new, list(speeds))] = speeds

    def _measured(self, key: object, pairs: dict[int, paired.Pairs], left: int) -> Speeds:
        begin = time.perf_counter()
        there, patience = self.seconds - self.spent, _PATIENCE * self.seconds
        most = there / max(1, left)
        speeds = paired.decide(pairs, paired.Limits(most, min(most, patience), least=there))
        self.spent += time.perf_counter() - begin
        # One that was cut off is as if it had been given no time.
        is_whole = most >= patience and all(speed.pairs >= paired.FEW for speed in speeds.values())
        _memo[key] = _Known(speeds, self.seconds if is_whole else 0.0)
        return speeds

    def pays_from(self, dense: nn.Module, layer: QuantizedModule, ms: Sequence[int], left: int) -> float | None:
        """The smallest of a few percentages of zeros at which a sparse layer of this shape is faster than ``dense``.

        Measured on random weights, since only the number of zeros matters. Infinite if it is not faster even at 95 %;
        None if the time is spent before that is known.
        """
        for i, percent in enumerate(_ZEROS):
            if self.is_spent:
                return None
            begin = time.perf_counter()
            other = _random_layer(layer, Unstructured(percent))
            self.spent += time.perf_counter() - begin
            speeds = self.speeds(dense, other, ms, left + len(_ZEROS) - i)
            if not speeds:
                return None
            if mean_speed(list(speeds.values())).is_faster:
                return percent
        return math.inf


def _key(old: nn.Module, new: QuantizedModule, ms: Sequence[int]) -> object:
    return _described(old, ms), _described(new, ms), tuple(ms), torch.get_num_threads()


def _described(layer: nn.Module, ms: Sequence[int]) -> object:
    """Equal for layers that take the same time."""
    if isinstance(layer, QuantizedModule):
        n, k = layer.out_features, layer.in_features
        size = layer.nbytes * _SIZES // (n * k)
        kernels = tuple((m, layer.explain(m).kernel) for m in ms)
        return settings_of(layer), (n, k), layer.bias is not None, layer.dtype, str(layer.scheme), size, kernels
    kind = kind_of(layer)
    weight = kind.parameter_of(layer)
    return settings_of(layer), tuple(weight.shape), kind.bias_of(layer) is not None, weight.dtype


def _pairs(old: nn.Module, new: QuantizedModule, m: int) -> paired.Pairs:
    x = new.example(m)
    return paired.Pairs(lambda: old(x), lambda: new(x))


def _random_layer(layer: QuantizedModule, sparsity: Unstructured) -> QuantizedModule:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator)
    kept = torch.rand(weight.shape, generator=generator) >= sparsity.zeros
    scheme = replace(layer.scheme, sparsity=sparsity)
    act_range = (-1.0, 1.0) if scheme.static else None
    other = type(layer).from_weight(weight * kept, layer.bias, scheme, dtype=layer.dtype, act_range=act_range)
    return other.adopt(layer)
