"""Experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .base import DTYPES, memory, vector
from .linear import LinearPlan


class ExpertsSide(NamedTuple):
    """One of the two weights of all experts: packed, with biases, by expert; and the kernels that serve it, from so many
    rows on each, ascending."""

    plans: Sequence[tuple[int, LinearPlan]]
    packed: Sequence[Tensor]
    bias: Sequence[Tensor | None]


class Gate(NamedTuple):
    """What experts compute between their two products: act(gate) * up, or act(up) if not gated.

    The outputs of the first product are gates, then ups; or, interleaved, a gate and an up in turns. With a limit that
    is not 0, gates are at most that, ups are clamped to [-limit, limit], and other_offset is added to them.
    """

    act: str
    gated: bool = True
    interleaved: bool = False
    limit: float = 0.0
    other_offset: float = 0.0


class Experts:
    """The experts of a layer in one call, see csrc/experts.h. It holds addresses, so the packed weights must stay."""

    def __init__(self, dtype: torch.dtype, rows: str, up: ExpertsSide, down: ExpertsSide, gate: Gate) -> None:
        sides = [
            (
                [(least, plan.compiled) for least, plan in side.plans],
                [memory(packed) for packed in side.packed],
                [vector(bias) for bias in side.bias],
            )
            for side in (up, down)
        ]
        self._run = _C.Experts(DTYPES[dtype], rows, sides[0], sides[1], gate).run

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (T, N) from x (T, K) with unit stride along K, index (T, top_k) int64 and weight (T, top_k) float32.

        All but x are contiguous.

        Raises:
            ValueError: a tensor is smaller than its shape says, or index names no expert.
        """
        tokens, top_k = index.shape
        sizes = tokens, x.stride(0), top_k
        self._run(sizes, memory(x), memory(index), memory(weight), memory(out), torch.get_num_threads())
