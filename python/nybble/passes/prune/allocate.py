"""Choose the percentage of zeros of each layer by its output error, with a given mean over all layers."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...compiled.ranking import smallest
from ...model.inputs import Inputs
from .masks import magnitude_scores, share, wanda_scores

# A layer's percentage is within REACH of the requested one; errors are measured every _STEP percent.
REACH, _STEP = 10, 5


def output_harm(weight: Tensor, inputs: Inputs | None, percents: Sequence[int]) -> list[float]:
    """The squared output error of a weight (N, K) at each percentage of zeros, pruned by Wanda's scores.

    Relative to the variance of its outputs. Without inputs: pruned by magnitude, and the share of the squared weight
    that is removed.
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
    """The percentages, around the requested one and within 1..99, at which ``output_harm`` is measured."""
    low, high = max(1, percent - REACH), min(99, percent + REACH)
    return sorted({low, high, *range(low, high, _STEP)})


def allocate(harms: Mapping[str, Sequence[float]], sizes: Mapping[str, int], percent: int) -> dict[str, int]:
    """The percentage of zeros of each layer; their mean, weighted by ``sizes``, is ``percent``.

    harms: each layer's harm at ``grid(percent)``. Greedy: all layers start at the smallest percentage; the layer with the
    least additional harm per removed weight goes up by 1 % until the mean is reached. The last step may exceed it by
    less than 1 % of one layer. 24 becomes 23, since the scheme name ``sp24`` means 2:4.
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
    """Harm at each percentage, interpolated linearly between the points."""
    curve = {points[0]: values[0]}
    for (a, b), (x, y) in zip(zip(points, values, strict=True), zip(points[1:], values[1:], strict=True), strict=False):
        curve |= {p: b + (y - b) * (p - a) / (x - a) for p in range(a + 1, x + 1)}
    return curve


def _price(curve: Mapping[int, float], at: int, size: int) -> float:
    """The additional harm of one more percent, per removed weight."""
    return (curve[at + 1] - curve[at]) / size
