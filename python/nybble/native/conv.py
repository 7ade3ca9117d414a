"""Convolutions and pools."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .. import _C
from .base import DTYPES, NOTHING, memory
from .linear import LinearPlan

_Image: TypeAlias = tuple[Tensor, bool]  # whether its channels are last in memory
Code: TypeAlias = tuple[float, int, int, int] | None
_Codes: TypeAlias = tuple[Code, Code, Code]
_IMAGE_DTYPES = DTYPES | {torch.uint8: _C.U8}


def conv_call(
    plan: LinearPlan,
    kernel: str,
    sizes: tuple[int, ...],
    x: _Image,
    packed: Tensor,
    bias: Tensor | None,
    y: _Image,
    residual: Tensor | None = None,
    act: str = "",
    most: float = float("inf"),
    scale: Tensor | None = None,
    ranges: tuple[Tensor | None, Tensor | None] = (None, None),
    codes: _Codes = (None, None, None),
) -> _C.ConvCall:
    """A call y = min(act(conv(x) + bias + residual), most) for dense images, see csrc/conv.h, which `run_convs` runs. The
    caller keeps the tensors alive.

    plan: of the weight (N, K). kernel: the name of a kernel of the op "conv". sizes: batch, channels; then height and
    width of x, of y, of the kernel, the stride, the padding and the dilation; groups. y: of x's dtype, or int32 for the
    accumulators of w8a8. residual: as y. scale: float32, of N rounded up to a multiple of 16, in place of the scales of
    an 8-bit weight. ranges: of x, as found before, and of y, to be written; float32 (batch, 3). codes: of x, y and the
    residual, those that are bytes of code + 128 in frames: scale, zero point, and padding of the frame in pixels; only for
    a call that runs_direct. 64 bytes after their frames belong to the tensors.
    """
    images = [((t.data_ptr(), t.nbytes), _IMAGE_DTYPES[t.dtype], last) for t, last in (x, y)]
    added = (
        (NOTHING, _C.F32)
        if residual is None
        else ((residual.data_ptr(), residual.nbytes), _IMAGE_DTYPES[residual.dtype])
    )
    return _C.ConvCall(
        plan.compiled,
        kernel,
        sizes,
        images[0],
        memory(packed),
        memory(scale),
        memory(bias),
        _C.F32 if bias is None else DTYPES[bias.dtype],
        images[1],
        added,
        act,
        most,
        memory(ranges[0]),
        memory(ranges[1]),
        codes,
    )


def pool_call(
    kernel: str,
    sizes: tuple[int, ...],
    pool: str,
    x: Tensor,
    y: Tensor,
    ranges: tuple[Tensor | None, Tensor | None],
    codes: tuple[Code, Code] = (None, None),
) -> _C.ConvCall:
    """A call of `run_convs` that writes the "max" or the "mean" of each window of x, both channels_last. sizes: as of
    conv_call, with a dilation of 1. ranges, codes: as of conv_call; both images are codes or none, and only of "max"."""
    image = ((x.data_ptr(), x.nbytes), _IMAGE_DTYPES[x.dtype], True)
    held = (y.data_ptr(), y.nbytes)
    return _C.pool_call(kernel, sizes, pool, image, held, memory(ranges[0]), memory(ranges[1]), codes)


def run_convs(calls: list[_C.ConvCall]) -> None:
    """Runs convolutions one after the other.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    _C.run_convs(calls, torch.get_num_threads())
