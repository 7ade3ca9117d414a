"""Measured time of a layer under each scheme at one M, on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import torch
from torch import nn

from ...model.eligible import dense_weight
from ...nn.kinds import settings_of
from ...nn.module import QuantizedModule
from ...paired import Limits, Pairs, decide
from ...report.speed import Speed

# Seconds for each candidate of a shape after its first pairs, and the width of its interval that ends the measurement
# before. The first pairs have no limit: a median of fewer would be worth nothing.
_SECONDS, _WIDTH = 0.3, 1.04

Times = dict[str, float]


class Stopwatch:
    """Milliseconds of a layer's candidates, each shape measured once.

    Args:
        m: rows of the activation.
    """

    def __init__(self, m: int) -> None:
        self._m = m
        self._known: dict[object, Times] = {}

    def times(self, candidates: Mapping[str, nn.Module], dense: nn.Module) -> Times:
        """Milliseconds by name, of an input of about M rows as the layer takes them (ids, an image).

        Each candidate is timed in pairs with ``dense``; the median of their ratios counts.
        """
        weight = dense_weight(dense)
        sizes = {name: getattr(layer, "nbytes", 0) for name, layer in candidates.items()}
        key = (settings_of(dense), weight.shape, weight.dtype, tuple(sizes.items()), torch.get_num_threads())
        if key not in self._known:
            x = self._example(candidates, weight)
            pairs = {name: _pairs(dense, layer, x) for name, layer in candidates.items() if layer is not dense}
            speeds = {name: decide({self._m: pair}, _LIMITS)[self._m] for name, pair in pairs.items()}
            seconds = median(one for pair in pairs.values() for one in pair.firsts)
            self._known[key] = {
                name: 1e3 * seconds / (speeds[name].ratio if name in speeds else 1) for name in candidates
            }
        return self._known[key]

    def _example(self, candidates: Mapping[str, nn.Module], weight: torch.Tensor) -> torch.Tensor:
        for layer in candidates.values():
            if isinstance(layer, QuantizedModule):
                return layer.example(self._m)
        return torch.randn(self._m, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def _pairs(dense: nn.Module, layer: nn.Module, x: torch.Tensor) -> Pairs:
    return Pairs(lambda: dense(x), lambda: layer(x))


def _is_narrow(speed: Speed) -> bool:
    return speed.high <= _WIDTH * speed.low


_LIMITS = Limits(math.inf, _SECONDS, _is_narrow)
