"""The torch ops: the only place that checks tensors and allocates outputs.

``nybble::linear`` computes a layer, ``nybble::linear_part`` some of its outputs. ``nybble::dequantize`` computes its
dense weight, for gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling

from . import batching, flops, gradients, layouts, native
from .dispatch.selection import layout_for, part_plan, plan_for
from .dispatch.spec import FLOATS
from .weights.activations import ActScale, split
from .weights.form import Form
from .weights.rounding import QuantizedWeight, dequantize_weight
from .weights.scheme import Scheme

_BIAS_TYPES = (torch.nn.Parameter, Tensor, type(None))

_LIBRARY = torch.library.Library("nybble", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor packed, Tensor? bias, str scheme, str layout, int out_features, int in_features) -> Tensor"
)
_LIBRARY.define(
    "linear_part(Tensor x, Tensor packed, Tensor? bias, str scheme, str layout, int out_features, int in_features, "
    "int begin, int end) -> Tensor"
)
_LIBRARY.define("dequantize(Tensor packed, str scheme, str layout, int out_features, int in_features) -> Tensor")


def pack(
    quantized: QuantizedWeight, scheme: Scheme, in_features: int, act: ActScale | None = None
) -> tuple[Tensor, str]:
    """A portable weight packed for its device, and the name of the layout.

    act: the scale of static activations, which is put before the packed weight.
    """
    device = quantized.qweight.device.type
    form = Form.of(quantized.tensors(), scheme)
    layout = layout_for(scheme, quantized.qweight.shape[0], in_features, device, form)
    packed = pack_as(quantized, layout, scheme, in_features)
    return (packed if act is None else act.before(packed)), layout


def pack_as(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> Tensor:
    """A portable weight packed in a layout, on its device, without the scale of static activations."""
    return layouts.find(layout).pack(quantized, scheme, in_features)


def unpack(packed: Tensor, layout: str, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """The portable weight of a packed one; the exact inverse of pack. activations.split has the static scale."""
    return layouts.find(layout).unpack(split(packed, scheme)[1], scheme, out_features, in_features)


def settle(packed: Iterable[Tensor]) -> None:
    """Make reading packed weights fast where they lie now: see native.use_huge_pages."""
    native.use_huge_pages(weight for weight in packed if weight.device.type == "cpu")


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, scheme: str, layout: str, out_features: int, in_features: int
) -> Tensor:
    """y (..., out_features) = x (..., in_features) w^T + bias, in x's dtype.

    x: float32, bfloat16 or float16, any strides (a copy is made unless the last one is 1); packed: from `pack`;
    bias: (out_features,), any of the same dtypes. Gradients flow to x and bias. The gradient of rounding, and of
    clipping static activations to their range, is taken as that of the identity.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by name.
        NoKernelError: no kernel accepts the problem.
        NotImplementedError: x or bias has a tangent of forward-mode AD.
    """
    if is_compiling() or _watched(x, packed, bias):
        if forward_ad._current_level >= 0:
            _refuse_tangents(x=x, bias=bias)
        out: Tensor = torch.ops.nybble.linear.default(x, packed, bias, scheme, layout, out_features, in_features)
        return out
    return _linear(x, packed, bias, scheme, layout, out_features, in_features)


def linear_part(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_features: int,
    in_features: int,
    begin: int,
    end: int,
) -> Tensor:
    """The outputs [begin, end) of ``linear``, with its bits; with float activations the last one may be summed in another
    order. In dense layouts of the CPU the others are not computed, if begin is a multiple of 16.

    Raises:
        ValueError: as ``linear``, or not 0 <= begin < end <= out_features.
    """
    args = (x, packed, bias, scheme, layout, out_features, in_features, begin, end)
    if is_compiling() or _watched(x, packed, bias):
        if forward_ad._current_level >= 0:
            _refuse_tangents(x=x, bias=bias)
        out: Tensor = torch.ops.nybble.linear_part.default(*args)
        return out
    return _linear_part(*args)


def _watched(x: Tensor, packed: Tensor, bias: Tensor | None) -> bool:
    """Whether the call must go through torch's dispatcher.

    It must for autograd, tensor subclasses, modes, transforms, tracers and profilers, and for tensors whose memory does
    not hold their values: on other devices, or negated lazily. Otherwise the kernel is called directly, which saves the
    time of the dispatcher: more than a small layer takes.
    """
    return (
        type(x) is not Tensor
        or type(packed) is not Tensor
        or type(bias) not in _BIAS_TYPES
        or not ((x.is_cpu and packed.is_cpu) or (x.is_cuda and packed.is_cuda))
        or x.is_neg()
        or (bias is not None and bias.is_neg())
        or (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


def _refuse_tangents(**tensors: Tensor | None) -> None:
    """Raises for a tangent: without gradients, torch would silently drop that of an op defined in Python."""
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: has a tangent, but nybble::linear has no forward-mode derivative")


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, scheme: str, layout: str, out_features: int, in_features: int
) -> Tensor:
    shape, dtype = x.shape, x.dtype
    bias = _checked(x, packed, bias, out_features, in_features)
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    # Slicing a shape takes as long as reading an attribute of a tensor, so the usual case avoids it.
    out = x.new_empty(shape[0], out_features) if len(shape) == 2 else x.new_empty(*shape[:-1], out_features)
    plan_for(scheme, layout, out_features, in_features, dtype, device)(_rows(x), packed, bias, out)
    return out


def _linear_part(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_features: int,
    in_features: int,
    begin: int,
    end: int,
) -> Tensor:
    _check_part(begin, end, out_features)
    bias = _checked(x, packed, bias, out_features, in_features)
    size, m = (out_features, in_features), x.numel() // in_features
    plan = part_plan(scheme, layout, size, x.dtype, max(m, 1), (begin, end)) if x.is_cpu else None
    if plan is None:
        return _linear(x, packed, bias, scheme, layout, *size)[..., begin:end].contiguous()
    out = x.new_empty(*x.shape[:-1], end - begin)
    plan(_rows(x), packed, None if bias is None else bias[begin:end], out)
    return out


def _check_part(begin: int, end: int, out_features: int) -> None:
    if not 0 <= begin < end <= out_features:
        raise ValueError(f"begin={begin}, end={end}: must be ascending and in [0, out_features={out_features}]")


def _checked(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor | None:
    """The bias as kernels take it."""
    shape, dtype = x.shape, x.dtype
    if not shape or shape[-1] != in_features:
        raise ValueError(f"x: shape {tuple(shape)}, the last dimension must be in_features={in_features}")
    if dtype not in FLOATS:
        raise ValueError(f"x: {dtype}, must be one of {FLOATS}")
    _check_packed(packed)
    return None if bias is None else _checked_bias(bias, x, out_features)


def _rows(x: Tensor) -> Tensor:
    """x, or its rows (M, K), as kernels take them."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x.contiguous() if x.stride(1) != 1 or 0 < x.stride(0) < x.shape[1] else x


def _checked_bias(bias: Tensor, x: Tensor, out_features: int) -> Tensor:
    if bias.dtype not in FLOATS or bias.numel() != out_features or bias.dim() != 1:
        raise ValueError(f"bias: {tuple(bias.shape)} {bias.dtype}, must be ({out_features},) and one of {FLOATS}")
    if not (bias.is_cpu if x.is_cpu else bias.get_device() == x.get_device()):
        raise ValueError(f"bias: on {bias.device}, x is on {x.device}")
    return bias if bias.is_contiguous() else bias.contiguous()


def _check_packed(packed: Tensor) -> None:
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(f"packed: {tuple(packed.shape)} {packed.dtype}, must be a contiguous uint8 vector")


def _dequantize(packed: Tensor, scheme: str, layout: str, out_features: int, in_features: int) -> Tensor:
    _check_packed(packed)
    parsed = Scheme.parse(scheme)
    return dequantize_weight(unpack(packed, layout, parsed, out_features, in_features), parsed, in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, *rest = inputs
    ctx.save_for_backward(packed)
    ctx.rest, ctx.part = rest[:4], rest[4:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.nybble.dequantize(packed, *ctx.rest)
        grad_x = grad @ (weight[slice(*ctx.part)] if ctx.part else weight).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        if ctx.part:
            begin, end = ctx.part
            grad_bias = torch.nn.functional.pad(grad_bias, (begin, ctx.rest[2] - end))
    return grad_x, None, grad_bias, *(None,) * (4 + len(ctx.part))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_part", _linear_part, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
for _name in ("linear", "linear_part"):
    gradients.register(_LIBRARY, _name, _backward, _setup_context)
    batching.register(_LIBRARY, _name, batching.leading(0))
    flops.register(_name)
batching.register(_LIBRARY, "dequantize", batching.one_by_one)


@torch.library.register_fake("nybble::linear", lib=_LIBRARY)
def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, scheme: str, layout: str, out_features: int, in_features: int
) -> Tensor:
    torch._check(packed.device == x.device, lambda: f"packed: on {packed.device}, x is on {x.device}")
    if bias is not None:
        where = bias.device
        torch._check(where == x.device, lambda: f"bias: on {where}, x is on {x.device}")
    torch._check(x.dim() > 0, lambda: "x: needs at least one dimension")
    torch._check(x.shape[-1] == in_features, lambda: f"x: the last dimension must be in_features={in_features}")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("nybble::linear_part", lib=_LIBRARY)
def _linear_part_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scheme: str,
    layout: str,
    out_features: int,
    in_features: int,
    begin: int,
    end: int,
) -> Tensor:
    _check_part(begin, end, out_features)
    whole: Tensor = _linear_fake(x, packed, bias, scheme, layout, out_features, in_features)
    return whole[..., begin:end].contiguous()


@torch.library.register_fake("nybble::dequantize", lib=_LIBRARY)
def _dequantize_fake(packed: Tensor, scheme: str, layout: str, out_features: int, in_features: int) -> Tensor:
    torch._check(packed.dtype == torch.uint8, lambda: f"packed: {packed.dtype}, must be uint8")
    return packed.new_empty((out_features, in_features), dtype=torch.float32)
