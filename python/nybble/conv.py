"""The torch op of convolutions, ``nybble::conv``: each sample is rounded once, then patches of it are multiplied.

The weight is a matrix (N, K): N output channels, and K = kernel positions, each with the input channels of a group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.grad import conv1d_input, conv2d_input

from . import batching, flops, gradients, native
from .dispatch import registry
from .dispatch.reference import quantize
from .dispatch.selection import compiled_plan
from .dispatch.spec import FLOATS
from .ops import _check_packed, _checked_bias, _refuse_tangents, _watched
from .weights.activations import split
from .weights.scheme import Scheme

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define(
    "conv(Tensor x, Tensor packed, Tensor? bias, str scheme, str layout, int out_channels, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
# From so many rows on, the number of rows does not change the kernel.
MANY_ROWS = 64


class Geometry(NamedTuple):
    """What a convolution is, besides its weight: one number of each for each of the dimensions, 1 or 2."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size of the output for an image of a size. Raises ValueError where the kernel is larger than the image."""
        parts = zip(
            size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
        if min(out) < 1:
            raise ValueError(
                f"x: an image of size {tuple(size)} with padding={self.padding} is smaller than the kernel of size "
                f"{self.kernel_size} with dilation={self.dilation}"
            )
        return out


class Epilogue(NamedTuple):
    """y = min(act(product + bias + residual), most). residual: of the output's shape, dtype and strides."""

    residual: Tensor | None = None
    act: str = ""
    most: float = float("inf")


_NO_EPILOGUE = Epilogue()


def conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_channels: int,
    geometry: Geometry,
) -> Tensor:
    """y (B, N, ...) of x (B, C, ...), one or two dimensions, as torch.nn.functional.conv1d or conv2d in x's dtype.

    x: float32, bfloat16 or float16; packed: from `ops.pack`, of the matrix (N, K); bias: (N,). Each sample of x is
    rounded with one scale, and padded with zeros. y is channels_last where x is. Gradients flow to x and bias as in
    `ops.linear`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by name.
        NotImplementedError: x or bias has a tangent of forward-mode AD.
    """
    if is_compiling() or _watched(x, packed, bias):
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(x=x, bias=bias)
        kernel_size, stride, padding, dilation, groups = geometry
        out: Tensor = torch.ops.nybble.conv.default(
            x,
            packed,
            bias,
            scheme,
            layout,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
        )
        return out
    return run(x, packed, bias, scheme, layout, out_channels, geometry)


def run(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_channels: int,
    geometry: Geometry,
    epilogue: Epilogue = _NO_EPILOGUE,
) -> Tensor:
    """As conv, without torch's dispatcher: for plain tensors that need no gradients."""
    size = _check(x, packed, geometry)
    if bias is not None:
        bias = _checked_bias(bias, x, out_channels)
    shape = (x.shape[0], out_channels, *size)
    k = inputs_of(x.shape[1], geometry)
    rows = min(shape[0] * size[0] * size[-1], MANY_ROWS)
    plan = compiled_plan(scheme, layout, (out_channels, k), x.dtype, max(rows, 1)) if x.is_cpu else None
    if plan is None:
        return _reference(x, packed, bias, scheme, layout, out_channels, geometry, epilogue)
    images, x_last = dense_image(x)
    y_last = _is_last(x)
    out = x.new_empty(shape)
    if y_last:
        out = x.new_empty(shape[0], *size, out_channels).movedim(-1, 1)
    sizes = sizes_of(shape[0], x.shape, size, geometry)
    call = native.conv_call(plan, kernel_name(), sizes, (images, x_last), packed, bias, (out, y_last), *epilogue)
    native.run_convs([call])
    return out


@lru_cache(maxsize=1)
def kernel_name() -> str:
    """The kernel of the op "conv" that runs here."""
    return registry.fastest("conv")


def inputs_of(channels: int, geometry: Geometry) -> int:
    """K: the columns of the weight's matrix."""
    k = channels // geometry.groups
    for n in geometry.kernel_size:
        k *= n
    return k


def sizes_of(batch: int, x: torch.Size, out: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """The numbers that native.conv takes; one dimension is the second of two."""
    kernel_size, stride, padding, dilation, groups = geometry
    pairs = [x[2:], out, kernel_size, stride, padding, dilation]
    if len(out) == 1:
        pairs = [(one, *pair) for one, pair in zip((1, 1, 1, 1, 0, 1), pairs, strict=True)]
    return (batch, x[1], *(number for pair in pairs for number in pair), groups)


def _is_last(x: Tensor) -> bool:
    """Whether torch takes the memory format of x as channels_last."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense_image(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a contiguous copy, and whether its channels are last in memory."""
    if x.is_contiguous():
        return x, False
    return (x, True) if x.movedim(1, -1).is_contiguous() else (x.contiguous(), False)


def _check(x: Tensor, packed: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The size of the output."""
    dims = len(geometry.kernel_size)
    if x.dim() != dims + 2:
        raise ValueError(f"x: {x.dim()} dimensions, must have a batch, channels and {dims}: {dims + 2}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x: {x.dtype}, must be one of {FLOATS}")
    if x.shape[1] % geometry.groups:
        raise ValueError(f"x: {x.shape[1]} channels, must be a multiple of groups={geometry.groups}")
    _check_packed(packed)
    return geometry.out_size(tuple(x.shape[2:]))


def _weight(
    packed: Tensor,
    scheme: str,
    layout: str,
    out_channels: int,
    channels: int,
    geometry: Geometry,
) -> Tensor:
    """The dense weight (N, C / groups, kernel positions), float32."""
    matrix = torch.ops.nybble.dequantize(packed, scheme, layout, out_channels, inputs_of(channels, geometry))
    weight: Tensor = matrix.view(out_channels, *geometry.kernel_size, -1).movedim(-1, 1)
    return weight


def _dense_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    function = functional.conv1d if x.dim() == 3 else functional.conv2d
    return function(
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )


def _reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_channels: int,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Tensor:
    """The convolution in float64, rounded once: for devices and schemes without a kernel, and for tests."""
    parsed, real = Scheme.parse(scheme), x.double()
    scale = x.new_ones(x.shape[0], dtype=torch.float64)
    if parsed.act_type.quantized:
        codes, scales, zero = quantize(x.reshape(x.shape[0], -1), split(packed, parsed)[0], parsed.act_type)
        real, scale = (
            (codes.double() - zero.double()[:, None]).view(x.shape),
            scales.double(),
        )
    weight = _weight(packed, scheme, layout, out_channels, x.shape[1], geometry).double()
    ones = [1] * len(geometry.kernel_size)
    y = _dense_conv(real, weight, geometry) * scale.view(-1, 1, *ones)
    if bias is not None:
        y = y + bias.double().view(-1, *ones)
    if epilogue.residual is not None:
        y = y + epilogue.residual
    act = {"": lambda v: v, "relu": torch.relu, "silu": functional.silu}[epilogue.act]
    found: Tensor = act(y).clamp(max=epilogue.most).to(x.dtype)
    return found


def _conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    return run(x, packed, bias, scheme, layout, out_channels, geometry)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, *rest = inputs
    ctx.save_for_backward(packed)
    ctx.rest, ctx.size = rest, x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    scheme, layout, out_channels, kernel_size, stride, padding, dilation, groups = ctx.rest
    geometry = Geometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _weight(packed, scheme, layout, out_channels, ctx.size[1], geometry).to(grad.dtype)
        function: Any = conv1d_input if grad.dim() == 3 else conv2d_input
        grad_x = function(
            ctx.size,
            weight,
            grad,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        )
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())]).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *[None] * 8


_LIBRARY.impl("conv", _conv, "CompositeExplicitAutograd")
gradients.register(_LIBRARY, "conv", _backward, _setup_context)
batching.register(_LIBRARY, "conv", batching.merged({0: 0}))
flops.register("conv")


@torch.library.register_fake("nybble::conv", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _conv_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    torch._check(
        packed.device == x.device,
        lambda: f"packed: on {packed.device}, x is on {x.device}",
    )
    torch._check(
        x.dim() == len(kernel_size) + 2,
        lambda: f"x: must have {len(kernel_size) + 2} dimensions",
    )
    parts = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts]
    if _is_last(x):
        return x.new_empty((x.shape[0], *size, out_channels)).movedim(-1, 1)
    return x.new_empty((x.shape[0], out_channels, *size))
