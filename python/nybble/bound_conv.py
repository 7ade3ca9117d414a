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
_Codes = tuple["native.Code", "native.Code", "native.Code"]  # of x, y and the residual, likewise
_NO_CODES: _Codes = (None, None, None)


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
        self.packed, self.bias, self.epilogue, self.outputs = packed, bias, epilogue, out_channels
        self.scale: Tensor | None = None
        act, codes = split(packed, parsed)
        # The static scale and zero point, or None.
        self.given = None if act is None else (float(act.scale), int(act.zero_point))
        self.channels, self.geometry = shape[1] if geometry.groups == 1 else 4, geometry
        if affine is not None:
            factor, shift = affine
            scale = layouts.find(layout).unpack(codes, parsed, out_channels, k).scale.flatten()
            self.scale = functional.pad(scale * factor, (0, -out_channels % 16))
            self.bias = shift if bias is None else bias.float() * factor + shift

    @property
    def reads_codes(self) -> bool:
        """Whether its image may be codes."""
        return self.channels % 4 == 0 and self.writes_codes

    @property
    def writes_codes(self) -> bool:
        """Whether its residual and its output may be codes."""
        nothing = (torch.empty(0), True)
        call = native.conv_call(self.plan, kernel_name(), self.sizes, nothing, self.packed, None, nothing)
        return call.runs_direct

    @property
    def adds(self) -> bool:
        """Whether its call may be added to another's, and another's to its: see csrc/conv.h."""
        whole = self.geometry.groups == 1 and self.outputs % 32 == 0
        return whole and self.reads_codes and self.epilogue.act in ("", "relu")

    def call(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges, codes: _Codes = _NO_CODES) -> Any:
        """A call for native.run_convs that writes to ``out``. All are channels_last; x may also be contiguous. codes: as
        native.conv_call; images of codes are frames."""
        _, act, most = self.epilogue
        image = (x, True) if codes[0] else dense_image(x)
        parts = (image, self.packed, self.bias, (out, True), residual, act, most, self.scale, ranges, codes)
        return native.conv_call(self.plan, kernel_name(), self.sizes, *parts)

    def __call__(
        self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges, codes: _Codes = _NO_CODES
    ) -> None:
        """Writes to ``out``, which is channels_last. residual: as out. ranges, codes: as native.conv_call."""
        if residual is not None and codes[1] and not codes[2]:
            residual = residual.contiguous(memory_format=torch.channels_last)
        elif residual is not None and not codes[2]:
            alike = residual.stride() == out.stride() and residual.dtype is out.dtype
            residual = residual if alike else torch.empty_like(out).copy_(residual)
        x = x if codes[0] or dense_image(x)[0] is x else x.contiguous()
        native.run_convs([self.call(x, out, residual, ranges, codes)])


class BoundPool:
    """The "max" or the "mean" of windows of images of one shape, channels_last, on the CPU."""

    def __init__(self, pool: str, geometry: Geometry, shape: torch.Size) -> None:
        self.pool, self.sizes = (
            pool,
            sizes_of(shape[0], shape, geometry.out_size(tuple(shape[2:])), geometry),
        )

    adds = False  # as BoundConv.adds

    @property
    def writes_codes(self) -> bool:
        """Whether both images may be codes of one scale and zero point."""
        return self.pool == "max"

    def call(self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges, codes: _Codes = _NO_CODES) -> Any:
        """As BoundConv.call; both are channels_last and of one dtype."""
        return native.pool_call(kernel_name(), self.sizes, self.pool, x, out, ranges, codes[:2])

    def __call__(
        self, x: Tensor, out: Tensor, residual: Tensor | None, ranges: Ranges, codes: _Codes = _NO_CODES
    ) -> None:
        """Writes to ``out``."""
        native.run_convs([self.call(x, out, residual, ranges, codes)])


def run_calls(calls: list[Any]) -> None:
    """Runs calls of bound convolutions one after the other."""
    native.run_convs(calls)
