"""Search a permutation of a layer's inputs with which an n:m pattern keeps more magnitude.

Kept score: the sum of the n largest |W| of each row in each group of m. Exchanging inputs i and j changes only their two
groups. Let t_r be the n-th largest magnitude of the other inputs of i's group in row r. If j takes i's place, the group
scores the sum of these n plus relu(|w_rj| - t_r). So one (K, K) matrix holds the score of every replacement, and each
sweep makes the best exchanges of disjoint pairs of groups. The idea is that of Pool and Yu, NeurIPS 2021; the search
differs.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...weights.sparsity import NofM

_SWEEPS = 100
_LEAST_GAIN = 1e-6  # of one exchange, relative to the whole score
_ALL_PARTITIONS_OF = 8  # up to this many inputs, try all partitions: 35 for two groups of 2:4


def kept_score(weight: Tensor, form: NofM) -> float:
    """The sum of the n largest magnitudes of each m consecutive inputs of each row of a weight (N, K); m divides K."""
    groups = weight.detach().double().abs().reshape(-1, form.m)
    return groups.topk(form.n, dim=1).values.sum().item()


def search(weight: Tensor, form: NofM) -> Tensor:
    """A permutation of the inputs, int64 (K,), such that weight[:, order] keeps as much or more.

    Deterministic. The optimum for up to 8 inputs, else a local optimum under exchanges of two inputs.

    Raises:
        ValueError: K is not a multiple of m.
    """
    k = weight.shape[1]
    if k % form.m:
        raise ValueError(f"weight has {k} inputs: must be a multiple of m={form.m}")
    magnitude = weight.detach().float().abs()
    order = torch.arange(k)
    if k == form.m:
        return order
    if k == 2 * form.m <= _ALL_PARTITIONS_OF:
        return _best_halves(magnitude, form)
    scores = torch.empty(k, k)  # [i, j]: score of i's group if j takes i's place
    _replace(scores, magnitude, order, torch.arange(k // form.m), form)
    least = _LEAST_GAIN * kept_score(magnitude, form)
    for _ in range(_SWEEPS):
        changed = _exchange(scores, order, least, form.m)
        if not len(changed):
            break
        _replace(scores, magnitude, order, changed, form)
    return order


def _best_halves(magnitude: Tensor, form: NofM) -> Tensor:
    others = range(1, 2 * form.m)
    best, found = -1.0, torch.arange(2 * form.m)
    for rest in itertools.combinations(others, form.m - 1):
        order = torch.tensor([0, *rest, *(i for i in others if i not in rest)])
        score = kept_score(magnitude[:, order], form)
        if score > best:
            best, found = score, order
    return found


def _replace(scores: Tensor, magnitude: Tensor, order: Tensor, groups: Tensor, form: NofM) -> None:
    """Update the rows of ``scores`` of the inputs in these groups."""
    for group in groups.tolist():
        members = order[group * form.m : (group + 1) * form.m]
        largest = magnitude[:, members].topk(form.n + 1, dim=1).values
        kept, last, next_one = largest[:, :-1].sum(1), largest[:, -2], largest[:, -1]
        for i in members.tolist():
            # Without i, the next largest is kept in rows where i was kept.
            held = magnitude[:, i] >= last
            others = torch.where(held, kept - magnitude[:, i] + next_one, kept).sum()
            scores[i] = others + (magnitude - torch.where(held, next_one, last)[:, None]).relu_().sum(0)


def _exchange(scores: Tensor, order: Tensor, least: float, m: int) -> Tensor:
    """Make the best exchanges of disjoint pairs of groups, in ``order``. Returns the groups that changed."""
    k = len(order)
    group = torch.empty(k, dtype=torch.int64)
    group[order] = torch.arange(k) // m
    place = torch.empty(k, dtype=torch.int64)
    place[order] = torch.arange(k)
    current = scores.diagonal()
    gain = scores + scores.T - current[:, None] - current[None, :]
    gain.masked_fill_(group[:, None] == group[None, :], 0)
    best, partner = gain.max(1)
    touched: set[int] = set()
    for i in best.argsort(descending=True, stable=True).tolist():
        j = int(partner[i])
        pair = {int(group[i]), int(group[j])}
        if best[i] <= least:
            break
        if not pair & touched:
            touched |= pair
            order[place[i]], order[place[j]] = j, i
    return torch.tensor(sorted(touched), dtype=torch.int64)
