"""Convolutions and pools of images of one shape, made ready to run again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import layouts, native
from .conv import MANY_ROWS, Epilogue, Geometry, dense_image, inputs_of, kernel_name, sizes_of
from .dispatch.selection import compiled_plan
from .weights.activations import split
from .weights.scheme import Scheme

Ranges = tuple["Tensor | None", "Tensor | None"]  # of x and of y, see native.conv_call


class BoundConv:
    """A convolution for images of one shape and dtype, on the CPU, with what follows it.

    affine: factors and shifts (N,), float32, of a batch norm after it, for a weight of 8 bits: they change its scales and
    its bias.

    Raises:
        ValueError: no compiled kernel computes it.
    """

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None,
        scheme: str,
        layout: str,
        out_channels: int,
        geometry: Geometry,
        shape: torch.Size,
        dtype: torch.dtype,
        epilogue: Epilogue,
        affine: tuple[Tensor, Tensor] | None,
    ) -> None:
        k, parsed = inputs_of(shape[1], geometry), Scheme.parse(scheme)
        size = geometry.out_size(tuple(shape[2:]))
        rows = min(shape[0] * size[0] * size[-1], MANY_ROWS)
        plan = compiled_plan(scheme, layout, (out_channels, k), dtype, rows)
        if plan is None:
            raise ValueError(f"scheme={scheme!r}, layout={layout!r}: no compiled kernel here")
        self.plan, self.sizes = plan, sizes_of(shape[0], shape, size, geometry)
        self.packed, self.bias, self.epilogue = packed, bias, epilogue
        self.scale: Tensor | None = None
        if affine is not None:
            factor, shift = affine
            scale = layouts.find(layout).unpack(split(packed, parsed)[1], parsed, out_channels, k).scale.flatten()
            self.scale = functional.pad(scale * factor, (0, -out_channels % 16))
            self.bias = shift if bias is None else bias.float() * factor + shift

    def call(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges) -> Any:
        """A call for native.run_convs that writes to ``out``. All are channels_last; x may also be contiguous."""
        _, act, most = self.epilogue
        images, packed, bias, scale = (
            (dense_image(x), (out, True)),
            self.packed,
            self.bias,
            self.scale,
        )
        return native.conv_call(
            self.plan,
            kernel_name(),
            self.sizes,
            images[0],
            packed,
            bias,
            images[1],
            residual,
            act,
            most,
            scale,
            ranges,
        )

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges) -> None:
        """Writes to ``out``, which is channels_last. residual: as out. ranges: as native.conv_call."""
        if residual is not None and (residual.stride() != out.stride() or residual.dtype is not out.dtype):
            residual = torch.empty_like(out).copy_(residual)
        x = x if dense_image(x)[0] is x else x.contiguous()
        native.run_convs([self.call(x, out, residual, ranges)])


class BoundPool:
    """The "max" or the "mean" of windows of images of one shape, channels_last, on the CPU."""

    def __init__(self, pool: str, geometry: Geometry, shape: torch.Size) -> None:
        self.pool, self.sizes = (
            pool,
            sizes_of(shape[0], shape, geometry.out_size(tuple(shape[2:])), geometry),
        )

    def call(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges) -> Any:
        """As BoundConv.call; both are channels_last and of one dtype."""
        return native.pool_call(kernel_name(), self.sizes, self.pool, x, out, ranges[1])

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges) -> None:
        """Writes to ``out``."""
        native.run_convs([self.call(x, out, residual, ranges)])


def run_calls(calls: list[Any]) -> None:
    """Runs calls of bound convolutions one after the other."""
    native.run_convs(calls)
