"""What a layer takes under each scheme at one M, measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn

from ...model.eligible import dense_weight
from ..measure import interleaved

# Races of all candidates of a shape, and seconds that each may take.
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
        """Milliseconds by name; a candidate maps (M, K) to (M, N), ``dense`` says K and the dtype.

        All run in turns, several times over; of each, the ratio to the fastest of a race is taken at its worst but one,
        so that a candidate is not chosen for a lucky race.
        """
        weight = dense_weight(dense)
        sizes = {name: getattr(layer, "nbytes", 0) for name, layer in candidates.items()}
        key = (weight.shape, weight.dtype, tuple(sizes.items()), torch.get_num_threads())
        if key not in self._known:
            x = torch.randn(self._m, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            self._known[key] = self._race({name: _call(layer, x) for name, layer in candidates.items()})
        return self._known[key]

    def _race(self, fns: Mapping[str, Callable[[], object]]) -> Times:
        races = [interleaved(fns, BUDGET_S) for _ in range(_ROUNDS)]
        unit = median(min(race.values()) for race in races)
        careful = {name: sorted(race[name] / min(race.values()) for race in races)[-2] for name in fns}
        return {name: 1e3 * unit * ratio for name, ratio in careful.items()}


def _call(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)
