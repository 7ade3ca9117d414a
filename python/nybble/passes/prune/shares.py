"""How sparse each layer is to be, so that all of them together are as sparse as was asked."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...model.inputs import Inputs
from .masks import magnitude_scores, share, smallest, wanda_scores

# Percent to either side of what was asked for, measured every so many.
REACH, _STEP = 10, 5


def harm(weight: Tensor, inputs: Inputs | None, percents: Sequence[int]) -> list[float]:
    """The squared output error of a weight (N, K) once so many percent of it are gone, by Wanda's scores.

    Relative to how far its outputs vary around their mean: what all of them have in common says little. Without inputs,
    the share of its squared weights that are gone.
    """
    w = weight.detach().float()
    scores = magnitude_scores(w) if inputs is None else wanda_scores(w, inputs.norms)
    x = None if inputs is None else inputs.held_out
    size = float((w if x is None else (x - x.mean(0)) @ w.T).double().square().sum()) or 1.0
    found = []
    for percent in percents:
        gone = w * smallest(scores, torch.full((len(w),), share(w.shape[1], percent / 100)))
        found.append(float((gone if x is None else x @ gone.T).double().square().sum()) / size)
    return found


def grid(percent: int) -> list[int]:
    """The percents at which ``harm`` is asked for, around the one that was asked for; within 1..99."""
    low, high = max(1, percent - REACH), min(99, percent + REACH)
    return sorted({low, high, *range(low, high, _STEP)})


def spread(harms: Mapping[str, Sequence[float]], sizes: Mapping[str, int], percent: int) -> dict[str, int]:
    """A percent for each layer, by harms at ``grid(percent)``; their mean, weighted by sizes, is about ``percent``.

    From the least of the grid, the layer that suffers least for the weights it loses goes up by 1 %, until all together
    have reached what was asked for: the last step may pass it by less than 1 % of one layer. 24 becomes 23, since 2:4
    has its name.
    """
    points = grid(percent)
    curves = {name: _curve(points, values) for name, values in harms.items()}
    found = dict.fromkeys(harms, points[0])
    left = (percent - points[0]) * sum(sizes.values())
    heap = [(_price(curves[name], points[0], sizes[name]), i, name) for i, name in enumerate(harms)]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, i, name = heapq.heappop(heap)
        found[name] += 1
        left -= sizes[name]
        if found[name] < points[-1]:
            heapq.heappush(heap, (_price(curves[name], found[name], sizes[name]), i, name))
    return {name: value - (value == 24) for name, value in found.items()}


def _curve(points: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """Harm at each percent, straight between the points."""
    curve = {points[0]: values[0]}
    for (a, b), (x, y) in zip(zip(points, values, strict=True), zip(points[1:], values[1:], strict=True), strict=False):
        curve |= {p: b + (y - b) * (p - a) / (x - a) for p in range(a + 1, x + 1)}
    return curve


def _price(curve: Mapping[int, float], at: int, size: int) -> float:
    """Harm of the next percent, for each weight that goes."""
    return (curve[at + 1] - curve[at]) / size
