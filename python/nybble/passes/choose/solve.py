"""The multiple-choice knapsack problem: one option for each layer, with the least harm within a budget.

Two solvers: dynamic programming, exact on a grid of costs (Dudzinski and Walukiewicz 1987), and a Lagrange multiplier
found by bisection, followed by local search (Sinha and Zoltners 1979). ``best`` returns the better of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

GRID = 1 << 12
_HALVINGS, _SWEEPS = 60, 50


class Option(NamedTuple):
    """Cost, in the budget's unit, and harm of one option of a layer; both finite, cost >= 0."""

    cost: float
    harm: float


Choice = tuple[int, ...]  # the index of the option of each layer
Layers = Sequence[Sequence[Option]]


def total(layers: Layers, choice: Sequence[int]) -> Option:
    """Total cost and harm of a choice."""
    picked = [options[index] for options, index in zip(layers, choice, strict=True)]
    return Option(math.fsum(option.cost for option in picked), math.fsum(option.harm for option in picked))


def least_cost(layers: Layers) -> float:
    """The smallest feasible budget."""
    return math.fsum(min(option.cost for option in options) for options in layers)


def best(layers: Layers, budget: float, count: int = 1) -> list[Choice]:
    """Up to ``count`` choices of least harm that cost at most ``budget``, the best first.

    Raises:
        ValueError: no choice is within the budget; the message gives the cost of the cheapest.
    """
    found = {*exact(layers, budget, count), priced(layers, budget)}
    return sorted(found, key=lambda choice: (total(layers, choice).harm, choice))[:count]


def exact(layers: Layers, budget: float, count: int = 1, grid: int = GRID) -> list[Choice]:
    """The best choices by dynamic programming, with costs rounded up to a grid, so that the budget is never exceeded.

    Exact if all costs above each layer's cheapest are multiples of (budget - least_cost) / grid, or if they are
    integers and budget - least_cost is at most ``grid``. Raises ValueError as ``best``.
    """
    _check(layers, budget)
    spare = budget - least_cost(layers)
    cheapest = [min(option.cost for option in options) for options in layers]
    whole = all(float(option.cost).is_integer() for options in layers for option in options) and spare <= grid
    unit = 1.0 if whole else spare / grid or 1.0
    width = math.floor(spare / unit + 1e-9) + 1
    # harms[j, b]: the j-th smallest harm of the layers so far at a cost of at most b grid steps
    harms = np.full((count, width), np.inf)
    harms[0] = 0.0
    moves: list[np.ndarray] = []
    for options, low in zip(layers, cheapest, strict=True):
        steps = [math.ceil((option.cost - low) / unit - 1e-9) for option in options]
        rows = np.full((len(options) * count, width), np.inf)
        for k, (option, step) in enumerate(zip(options, steps, strict=True)):
            if step < width:
                rows[k * count : (k + 1) * count, step:] = harms[:, : width - step] + option.harm
        order = np.argsort(rows, axis=0, kind="stable")[:count]
        harms = np.take_along_axis(rows, order, axis=0)
        moves.append(order)
    ends = [rank for rank in range(count) if np.isfinite(harms[rank, -1])]
    found = [_walk_back(layers, cheapest, moves, rank, unit) for rank in ends]
    # Rounding of the float sum may exceed the budget by its last bit.
    return [choice for choice in found if total(layers, choice).cost <= budget]


def _walk_back(
    layers: Layers, cheapest: Sequence[float], moves: Sequence[np.ndarray], rank: int, unit: float
) -> Choice:
    """The choice whose path ends at this rank of the last column of the table."""
    count, column = moves[-1].shape[0], moves[-1].shape[1] - 1
    picked = []
    for options, low, order in zip(reversed(layers), reversed(cheapest), reversed(moves), strict=True):
        k, rank = divmod(int(order[rank, column]), count)
        column -= math.ceil((options[k].cost - low) / unit - 1e-9)
        picked.append(k)
    return tuple(reversed(picked))


def at_price(layers: Layers, price: float) -> Choice:
    """The options of least harm + price * cost; of equal ones, the cheaper."""
    return tuple(
        min(range(len(options)), key=lambda k: (options[k].harm + price * options[k].cost, options[k].cost))
        for options in layers
    )


def priced(layers: Layers, budget: float) -> Choice:
    """The choice at the smallest multiplier that meets the budget, then improved. Raises ValueError as ``best``."""
    _check(layers, budget)
    low, high = 0.0, 1.0
    choice = at_price(layers, low)
    if total(layers, choice).cost > budget:
        while total(layers, at_price(layers, high)).cost > budget and high < 1e300:
            high *= 16
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(layers, at_price(layers, middle)).cost <= budget else (middle, high)
        choice = at_price(layers, high)
    if total(layers, choice).cost > budget:  # no multiplier meets the budget: the harms are equal
        choice = tuple(min(range(len(options)), key=lambda k: options[k].cost) for options in layers)
    return improved(layers, choice, budget)


def improved(layers: Layers, choice: Choice, budget: float) -> Choice:
    """Local search: change one layer, or two at once, while that lowers the harm within the budget."""
    for _ in range(_SWEEPS):
        better = _best_move(layers, choice, budget)
        if better is None:
            break
        choice = better
    return choice


def _best_move(layers: Layers, choice: Choice, budget: float) -> Choice | None:
    spent, best_gain, found = total(layers, choice), 0.0, None
    spare = budget - spent.cost
    deltas = [
        [(k, o.cost - options[now].cost, o.harm - options[now].harm) for k, o in enumerate(options) if k != now]
        for options, now in zip(layers, choice, strict=True)
    ]
    singles = [((i, k),) for i, own in enumerate(deltas) for k, cost, harm in own if cost <= spare and harm < 0]
    pairs = (
        ((i, k), (j, n))
        for i, j in combinations(range(len(layers)), 2)
        for (k, c1, h1), (n, c2, h2) in product(deltas[i], deltas[j])
        if c1 + c2 <= spare and h1 + h2 < -best_gain
    )
    for moves in (*singles, *pairs):
        changed = list(choice)
        for layer, option in moves:
            changed[layer] = option
        now = total(layers, changed)
        if now.cost <= budget and spent.harm - now.harm > max(best_gain, 1e-12 * abs(spent.harm)):
            best_gain, found = spent.harm - now.harm, tuple(changed)
    return found


def _check(layers: Layers, budget: float) -> None:
    for options in layers:
        if not options or not all(math.isfinite(o.cost) and math.isfinite(o.harm) and o.cost >= 0 for o in options):
            raise ValueError(f"options={list(options)!r}: must be at least one, with finite harm and finite cost >= 0")
    least = least_cost(layers)
    if not budget >= least:
        raise ValueError(f"budget={budget:g}: no choice is within it; the cheapest costs {least:g}")
