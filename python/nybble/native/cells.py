"""LSTMs and GRUs."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .. import _C
from .base import DTYPES, Memory, memory

_RecurrentWeight: TypeAlias = tuple[_C.LinearPlan, Memory, tuple[int, int, int] | None]


def recurrent(
    rows: str,
    cell: str,
    directions: list[tuple[_RecurrentWeight | None, _RecurrentWeight]],
    sizes: list[int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """A layer of an LSTM or GRU, see csrc/recurrent.h.

    rows: name of the row kernels; cell: "lstm" or "gru"; directions: for each the weights of the input and of the state,
    as compiled plan, memory and vector; sizes: the rows of each step; tensors: x (rows, inputs) with unit stride along
    inputs, y (rows, directions * units), h (directions, batch, units) of the same dtype, and c, float32, as h. Without
    weights of the inputs, x are the products with them, float32.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    x, y, h, c = tensors
    _C.recurrent(
        rows,
        cell,
        dtype=DTYPES[y.dtype],
        directions=directions,
        sizes=sizes,
        x=memory(x),
        stride=x.stride(0),
        y=memory(y),
        h=memory(h),
        c=memory(c),
        threads=torch.get_num_threads(),
    )
