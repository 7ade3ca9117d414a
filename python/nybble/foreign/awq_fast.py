"""AWQ's layout gemv_fast, which is that of llm-awq too: codes as its kernels for small batches read them.

qweight, int16 (N / 4, K): a word has four codes. Its rows are of four rows of the weight: each 64 words hold 64 columns of the
first row, then of the second and so on; of each 32 columns, in the order below. scales, and zeros times scales with the sign
changed, are floats (groups, N), filled up with zeros: weight = code * scale + zeros.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import halves
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked

_ROWS, _COLUMNS, _ORDERED = 4, 64, 32


def _order() -> Tensor:
    """Which of 32 columns each code is of: blocks of 8 are dealt out in pairs, and each 8 has its even places first."""
    pairs = torch.arange(_ORDERED).reshape(4, 4, 2).permute(1, 0, 2)
    return pairs.reshape(4, 4, 2).permute(0, 2, 1).reshape(-1)


def read_fast(name: str, tensors: Tensors, group_size: int, zeros: str) -> ForeignWeight:
    """A layer. ``zeros``: what its tensor of zero points is called."""
    words = tensors.typed(f"{name}.qweight", (torch.int16,), 2)
    n, k = words.shape[0] * _ROWS, words.shape[1]
    size = k if group_size == -1 else group_size
    if not n or not k or k % _COLUMNS or k % size:
        raise CheckpointError(f"{name}.qweight: {k} inputs: must be a multiple of {_COLUMNS}, and of group_size {size}")
    groups = k // size
    scales = tensors.typed(f"{name}.scales", FLOATS, 2)
    if scales.shape[1] != n or scales.shape[0] < groups:
        raise CheckpointError(f"{name}.scales: is {tuple(scales.shape)}, must be ({groups}, {n}) or longer")
    shifts = tensors.shaped(f"{name}.{zeros}", (scales.dtype,), tuple(scales.shape))
    for part, values in (("scales", scales), (zeros, shifts)):
        if values[groups:].any():
            raise CheckpointError(f"{name}.{part}: must be 0 beyond the last group; is group_size right?")
    nibbles = torch.from_numpy(halves(np.ascontiguousarray(words.numpy()).view(np.uint8)))
    rows = nibbles.reshape(n // _ROWS, k // _COLUMNS, _ROWS, _COLUMNS).transpose(1, 2).reshape(n, -1, _ORDERED)
    codes = rows[:, :, _order().argsort()].reshape(n, k)
    weight = ForeignWeight(codes, 4, scales[:groups].T.contiguous(), 0, size, minimum=shifts[:groups].T.contiguous())
    return checked(weight, name, "scales")
