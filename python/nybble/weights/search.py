"""Searches for the scale and the zero point of each group, starting from those of its whole range.

mse: the clipped range with the least error (the search of GPTQ's quantizer: IST-DASLab/gptq, quant.py).
hqq: half-quadratic splitting (Badri and Shaji, HQQ, 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .scheme import Scheme
from .weight_type import WeightType

# Ranges that the MSE search tries: 100 % down to 21 %; and the norm of the error that it minimises.
_CLIP_STEPS = 80
_CLIP_NORM = 2.4
# HQQ: the norm of the error, the first penalty of the splitting, its growth per round, the number of rounds.
_HQQ_NORM = 0.7
_HQQ_BETA, _HQQ_RISE, _HQQ_ROUNDS = 10.0, 1.01, 20


class Rounded(NamedTuple):
    """Groups as rounded: codes (n, groups, size) as floats, scales (n, groups) as stored, zero points (n, groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def better_of(self, other: Rounded, better: Tensor) -> Rounded:
        """The other where better (n, groups) is true, this elsewhere."""
        return Rounded(
            torch.where(better[..., None], other.codes, self.codes),
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.zero, self.zero),
        )

    def error(self, grouped: Tensor, norm: float, kind: WeightType) -> Tensor:
        """The error of each group in a norm, relative to its largest value, so that it neither under- nor overflows."""
        restored = kind.steps(self.codes, self.zero[..., None]) * self.scale.float()[..., None]
        return ((restored - grouped) / _largest(grouped)).abs().pow(norm).sum(-1)


def round_range(grouped: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Rounded:
    """Rounds groups (n, groups, size) with the scales and zero points of the ranges [low, high] (n, groups)."""
    scale, zero = scheme.weight_type.scales(low, high, scheme.symmetric)
    return Rounded(scheme.weight_type.nearest(grouped, scale[..., None], zero[..., None]), scale, zero)


def clipped(grouped: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Rounded:
    """The share of each range [low, high], in steps of 1 %, with the least error in the 2.4-norm."""
    found = round_range(grouped, low, high, scheme)
    best = found.error(grouped, _CLIP_NORM, scheme.weight_type)
    for step in range(1, _CLIP_STEPS):
        share = 1 - step / 100
        tried = round_range(grouped, low * share, high * share, scheme)
        error = tried.error(grouped, _CLIP_NORM, scheme.weight_type)
        better = error < best
        best = torch.where(better, error, best)
        found = found.better_of(tried, better)
    return found


def check_hqq(scheme: Scheme) -> None:
    """Raises ValueError where the scheme has no groups: with one scale for a row, HQQ loses more than it gains."""
    if scheme.group_size is None:
        raise ValueError(f"method='hqq', scheme={str(scheme)!r}: HQQ needs 4-bit weights in groups, such as 'w4a16g64'")
    if scheme.book:
        raise ValueError(
            f"method='hqq', scheme={str(scheme)!r}: HQQ moves a zero point, which codes of a table have not, and those with "
            "levels only for all groups of a block"
        )


def half_quadratic(grouped: Tensor, start: Rounded, scheme: Scheme) -> Rounded:
    """Scales and zero points with a smaller error of each group, in the 0.7-norm, than those of start.

    Each round alternates two steps: shrink the current error, which leaves a few large outliers; then fit scale and
    zero point to the weight without them. The published method moves a float zero point only; here zero points are
    integers, so the scale moves too, by least squares. A round counts for a group only where its error, with scale and
    zero point as stored, is smaller than the best so far.
    """
    kind, unit = scheme.weight_type, _largest(grouped)
    values = grouped / unit
    found, tried = start, start
    current = start.scale.float() / unit[..., 0]
    best, beta = start.error(grouped, _HQQ_NORM, kind), _HQQ_BETA
    for _ in range(_HQQ_ROUNDS):
        error = values - (tried.codes - tried.zero[..., None]) * current[..., None]
        wanted = values - _shrunk(error, beta)
        zero = tried.zero
        if not scheme.symmetric:
            divisor = torch.where(current > 0, current, 1)
            zero = (tried.codes - wanted / divisor[..., None]).mean(-1).round().clamp(kind.lowest, kind.highest)
        steps = tried.codes - zero[..., None]
        square = steps.square().sum(-1)
        current = torch.where(square > 0, (wanted * steps).sum(-1) / torch.where(square > 0, square, 1), current)
        scale = (current * unit[..., 0]).to(kind.scale)
        scale = torch.where(scale.float() > torch.finfo(kind.scale).tiny, scale, found.scale)
        current = scale.float() / unit[..., 0]
        tried = Rounded(kind.nearest(grouped, scale[..., None], zero[..., None]), scale, zero)
        loss = tried.error(grouped, _HQQ_NORM, kind)
        better = loss < best
        best = torch.where(better, loss, best)
        found = found.better_of(tried, better)
        beta *= _HQQ_RISE
    return found


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """The proximal step of the 0.7-norm: errors moved towards 0, small ones to 0."""
    size = error.abs()
    # |e|^(p - 1) is infinite at 0, where the result is 0 all the same.
    by = size.clamp_min(torch.finfo(size.dtype).tiny).pow(_HQQ_NORM - 1) / beta
    return error.sign() * (size - by).clamp_min(0)


def _largest(grouped: Tensor) -> Tensor:
    """The largest magnitude of each group (n, groups, 1); 1 where that is 0."""
    largest = grouped.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1)
