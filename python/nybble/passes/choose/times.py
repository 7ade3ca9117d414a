"""Measured time of a layer under each scheme at one M, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn

from ...model.eligible import dense_weight
from ..measure import interleaved

# Measurements of all candidates of a shape, and the seconds of each measurement.
_ROUNDS, BUDGET_S = 5, 0.06

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
        """Milliseconds by name; each candidate maps (M, K) to (M, N), and ``dense`` gives K and the dtype.

        The candidates run in turns, in several measurements. Each candidate counts with its second-worst ratio to the
        fastest one, so that none is chosen because of one lucky measurement.
        """
        weight = dense_weight(dense)
        sizes = {name: getattr(layer, "nbytes", 0) for name, layer in candidates.items()}
        key = (weight.shape, weight.dtype, tuple(sizes.items()), torch.get_num_threads())
        if key not in self._known:
            x = torch.randn(self._m, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            self._known[key] = self._measure({name: _call(layer, x) for name, layer in candidates.items()})
        return self._known[key]

    def _measure(self, fns: Mapping[str, Callable[[], object]]) -> Times:
        rounds = [interleaved(fns, BUDGET_S) for _ in range(_ROUNDS)]
        fastest = median(min(times.values()) for times in rounds)
        ratios = {name: sorted(times[name] / min(times.values()) for times in rounds)[-2] for name in fns}
        return {name: 1e3 * fastest * ratio for name, ratio in ratios.items()}


def _call(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)
