"""Scales and minimums of two levels, as in the K-quants of GGUF: weight = code * (scale * first) - minimum * second.

``first`` and ``second`` are the levels of a group, 6 bits each; ``scale`` and ``minimum`` are float16, and BLOCK groups
share one of each. Products of the two are exact in float32: 11 by 6 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, MOST = 8, 63


class Levels(NamedTuple):
    """scale, minimum: (N, blocks), float16. levels: (N, 2 * groups), uint8: first and second of each group."""

    scale: Tensor
    minimum: Tensor
    levels: Tensor

    @property
    def products(self) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of each group, (N, groups) float32, such that weight = code * scale + minimum."""
        first, second = self.levels.float().unflatten(1, (-1, 2)).unbind(-1)
        return first * _spread(self.scale, first.shape[1]), -(second * _spread(self.minimum, first.shape[1]))

    @property
    def zeros(self) -> Tensor:
        """The minimums as zero points that are no integers, (N, groups) float32; 0 where the scale is."""
        scale, minimum = self.products
        return torch.where(scale != 0, -minimum / torch.where(scale != 0, scale, 1), 0)

    @classmethod
    def nearest(cls, scale: Tensor, zero: Tensor) -> Levels:
        """Those nearest to positive scales and zero points of groups, (N, groups) float32: the largest of a block has the
        level 63."""
        pairs = [_two_levels(of) for of in (scale, zero * scale)]
        levels = torch.stack([level for _, level in pairs], dim=-1).flatten(1)
        return cls(pairs[0][0], pairs[1][0], levels.to(torch.uint8))


def blocks_of(groups: int) -> int:
    """The number of blocks of so many groups; the last may be short."""
    return -(-groups // BLOCK)


def _spread(per_block: Tensor, groups: int) -> Tensor:
    return per_block.float().repeat_interleave(BLOCK, dim=1)[:, :groups]


def _two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (N, groups) from 0 on as float16 (N, blocks), and levels (N, groups)."""
    room = -values.shape[1] % BLOCK
    most = torch.nn.functional.pad(values, (0, room)).unflatten(1, (-1, BLOCK)).amax(-1)
    unit = (most / MOST).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    spread = _spread(unit, values.shape[1])
    levels = (values / torch.where(spread > 0, spread, 1)).round().clamp(0, MOST)
    return unit, torch.where(spread > 0, levels, 0)
