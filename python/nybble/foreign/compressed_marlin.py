"""compressed-tensors' format marlin-24, which no version of it reads: 2:4 codes as a GPU kernel wants them.

weight_packed, int32: of the codes that are kept, (K / 2, N), tiles of 16 by 16, four of which, 1,024 codes, are in the order
of the kernel's threads. meta, int16: the places of the kept codes, two numbers of 2 bits for each four columns, in
the order that CUTLASS has for them. scale_packed (groups, N): columns of each 64 in another order, where groups are
smaller than K / 2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import Bytes, as_bytes, unpack_stream
from .compressed_setting import Context, Setting
from .weight import ForeignWeight, checked

_TILE, _THREADS = 16, 32
# The order of the codes in a word.
_INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each 8


def marlin24(name: str, context: Context) -> ForeignWeight:
    """A weight of the format marlin-24."""
    tensors = context.tensors
    words = tensors.typed(f"{name}.weight_packed", (torch.int32,), 2)
    scale = tensors.typed(f"{name}.scale_packed", (torch.float16,), 2)
    n, k = scale.shape[1], words.shape[0] * 2 * _TILE
    if not n or n % 64 or not k:
        raise CheckpointError(f"{name}.scale_packed: {n} outputs and {k} inputs: outputs must be a multiple of 64")

    def fits(setting: Setting) -> bool:
        width = n * _TILE * setting.bits // 32
        return setting.bits in _INTERLEAVED and words.shape[1] == width and scale.shape[0] == setting.groups(k)

    setting = context.setting(name, fits)
    meta = tensors.shaped(f"{name}.meta", (torch.int16,), (k // 32, 2 * n))
    kept = _kept(words, setting.bits, n, k)
    codes = np.full((n, k), 1 << (setting.bits - 1), np.uint8)
    np.put_along_axis(codes, _columns(meta, f"{name}.meta", n, k), kept, axis=1)
    size = setting.group_size or k
    scale = _in_order(scale) if size < k // 2 else scale
    weight = ForeignWeight(torch.from_numpy(codes), setting.bits, scale.T.contiguous(), 1 << (setting.bits - 1), size)
    return checked(weight, name, "scale_packed")


def _thread_order(bits: int) -> NDArray[np.int64]:
    """Place j of 1,024 codes holds the code that was at place [j] of four tiles."""
    thread = np.arange(_THREADS).reshape(-1, 1, 1, 1)
    column, block = np.arange(4).reshape(1, -1, 1, 1), np.arange(2).reshape(1, 1, -1, 1)
    row = 2 * (thread % 4) + np.array([0, 1, 8, 9]).reshape(1, 1, 1, -1)
    place = 16 * row + 256 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * block + column
    order = _INTERLEAVED[bits]
    result: NDArray[np.int64] = place.reshape(-1, len(order))[:, order].reshape(-1)
    return result


def _kept(words: Tensor, bits: int, n: int, k: int) -> Bytes:
    """The codes that are kept, (N, K / 2)."""
    stored = unpack_stream(as_bytes(words.numpy().view(np.uint32)), bits, n * _TILE).reshape(-1, 1024)
    tiles = np.empty_like(stored)
    tiles[:, _thread_order(bits)] = stored
    rows = tiles.reshape(k // 2 // _TILE, n // _TILE, _TILE, _TILE).transpose(0, 2, 1, 3).reshape(k // 2, n)
    return np.ascontiguousarray(rows.T)


def _columns(meta: Tensor, name: str, n: int, k: int) -> NDArray[np.int64]:
    """The column of each code that is kept, (N, K / 2)."""
    row, column = np.arange(n).reshape(-1, 1), np.arange(k // 16).reshape(1, -1)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = (column % 2) - (row % 2)  # 2 by 2 blocks are transposed
    row, column = row + swap, column - swap
    numbers = meta.flatten().numpy().view(np.uint16)[column // 2 * 2 * n + row * 2 + column % 2]
    pairs = (numbers[:, :, None] >> np.array([0, 4, 8, 12], np.uint16)) & np.uint16(15)
    first, second = pairs & np.uint16(3), pairs >> np.uint16(2)
    if (first >= second).any():
        raise CheckpointError(f"{name}: two places of four columns must be in ascending order")
    places = np.stack([first, second], axis=3).reshape(n, k // 4, 2).astype(np.int64)
    result: NDArray[np.int64] = (places + 4 * np.arange(k // 4).reshape(1, -1, 1)).reshape(n, k // 2)
    return result


def _in_order(scale: Tensor) -> Tensor:
    result = torch.empty_like(scale).reshape(-1, 8)
    result[:, list(_SCALES)] = scale.reshape(-1, 8)
    return result.reshape(scale.shape)
