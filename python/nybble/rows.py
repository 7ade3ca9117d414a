"""Ops of rows on CPUs: norms, activations, and several linear layers of one input in one call.

``nybble::norm``, ``nybble::activate`` and ``nybble::linears``, in float32, bfloat16 or float16, with sums in float32.
They have no gradients; `nybble.fuse` uses the same kernels in longer chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from . import batching, flops, gradients, native
from .dispatch import registry
from .dispatch.selection import compiled_plan, plan_for
from .dispatch.spec import FLOATS

# Activations by name: what they compute.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps, float weight_offset) -> "
    "(Tensor, Tensor)"
)
_LIBRARY.define("activate(Tensor x, Tensor? other, str act) -> Tensor")
_LIBRARY.define(
    "linears(Tensor x, Tensor[] packed, Tensor?[] bias, str[] scheme, str[] layout, int[] out_features, str[] act, "
    "Tensor?[] other, Tensor?[] residual, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor[]"
)


def norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual along the last dimension, and that sum; the sum is empty without a residual.

    kind: "layer"; "rms", times (weight + weight_offset); or "none". Raises ValueError for what does not fit, by name.
    """
    y, total = torch.ops.nybble.norm.default(x, residual, weight, bias, kind, eps, weight_offset)
    return y, total


def activate(x: Tensor, other: Tensor | None = None, act: str = "") -> Tensor:
    """act(x), or act(x) * other. act: "", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu" or "tanh"."""
    y: Tensor = torch.ops.nybble.activate.default(x, other, act)
    return y


def linears(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scheme: Sequence[str],
    layout: Sequence[str],
    out_features: Sequence[int],
    act: Sequence[str] = (),
    other: Sequence[Tensor | None] = (),
    residual: Sequence[Tensor | None] = (),
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Tensor]:
    """For each weight act(norm(x) w^T + bias) * other + residual, with the products of nybble::linear bit for bit.

    x is quantized once for all weights that take it alike. act, other, residual: empty, or an item for each weight.
    """
    outs: list[Tensor] = torch.ops.nybble.linears.default(
        x, packed, bias, scheme, layout, out_features, act, other, residual, norm, norm_weight, norm_bias, eps
    )
    return outs


def _rows(name: str, tensor: Tensor, like: Tensor | None = None, width: int | None = None) -> Tensor:
    """The tensor as a contiguous matrix; it must have the rows and the dtype of another."""
    if tensor.dtype not in FLOATS or tensor.dim() < 1 or not tensor.is_cpu:
        raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, must be one of {FLOATS} on the CPU")
    if like is not None:
        shape = (*like.shape[:-1], like.shape[-1] if width is None else width)
        if tensor.shape != shape or tensor.dtype is not like.dtype:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, must be {tuple(shape)} {like.dtype}")
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _vector(name: str, tensor: Tensor | None, width: int) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != (width,) or tensor.dtype not in FLOATS or not tensor.is_cpu:
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, must be ({width},), one of {FLOATS}, on the CPU"
        )
    return tensor.contiguous()


class _Call:
    """A chain of one step between tensors."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []

    def slot(self, matrix: Tensor | None) -> int:
        if matrix is None:
            return -1
        self.matrices.append(matrix)
        return len(self.matrices) - 1

    def chain(self) -> Any:
        widths = [matrix.shape[1] for matrix in self.matrices]
        names = {op: registry.fastest(op) for op in ("rows", "attention")}
        return native.chain(self.matrices[0].dtype, widths, len(widths), **names)

    def run(self, chain: Any) -> None:
        external = [(*native.memory(matrix), matrix.shape[1]) for matrix in self.matrices]
        chain.run(1, len(self.matrices[0]), external, [], torch.get_num_threads())


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    rows, call = _rows("x", x), _Call()
    y = torch.empty_like(rows)
    total = torch.empty_like(rows) if residual is not None else None
    more = None if residual is None else _rows("residual", residual, x)
    slots = [call.slot(matrix) for matrix in (rows, y, more, total)]
    scale, shift = (_vector(name, vector, x.shape[-1]) for name, vector in (("weight", weight), ("bias", bias)))
    chain, held = call.chain(), (native.vector(scale), native.vector(shift))
    chain.add_norm(slots[0], slots[1], kind, *held, eps, residual=slots[2], sum=slots[3], weight_offset=weight_offset)
    call.run(chain)
    return y.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape)


def _activate(x: Tensor, other: Tensor | None, act: str) -> Tensor:
    rows, call = _rows("x", x), _Call()
    y = torch.empty_like(rows)
    slots = [call.slot(matrix) for matrix in (rows, y, None if other is None else _rows("other", other, x))]
    chain = call.chain()
    chain.add_activate(slots[0], slots[1], act, other=slots[2])
    call.run(chain)
    return y.view(x.shape)


def _linears(
    x: Tensor,
    packed: list[Tensor],
    bias: list[Tensor | None],
    scheme: list[str],
    layout: list[str],
    out_features: list[int],
    act: list[str],
    other: list[Tensor | None],
    residual: list[Tensor | None],
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> list[Tensor]:
    count, k = len(packed), x.shape[-1] if x.dim() else 0
    act, other, residual = act or [""] * count, other or [None] * count, residual or [None] * count
    named: dict[str, Sequence[Any]] = {"bias": bias, "scheme": scheme, "layout": layout, "out_features": out_features}
    for name, items in {**named, "act": act, "other": other, "residual": residual}.items():
        if len(items) != count:
            raise ValueError(f"{name}: has {len(items)} items, must have one for each of {count} weights")
    rows, call = _rows("x", x), _Call()
    here = call.slot(rows)
    made, held, outs = [], [], []
    for i, n in enumerate(out_features):
        outs.append(rows.new_empty(len(rows), n))
        extra = [(name, all_[i]) for name, all_ in (("other", other), ("residual", residual))]
        more = {name: None if one is None else _rows(f"{name}[{i}]", one, x, n) for name, one in extra}
        shift = _vector(f"bias[{i}]", bias[i], n)
        slots = {name: call.slot(matrix) for name, matrix in more.items()}
        held += [shift, packed[i]]
        plan = _plan(scheme[i], layout[i], (n, k), rows)
        made.append(
            native.ChainWeight(
                plan, native.memory(packed[i]), native.vector(shift), call.slot(outs[i]), act[i], **slots
            )
        )
    scale, shift = (_vector(f"norm_{name}", one, k) for name, one in (("weight", norm_weight), ("bias", norm_bias)))
    chain = call.chain()
    before = None if norm == "none" else (norm, native.vector(scale), native.vector(shift), eps, 0.0)
    chain.add_linears(here, made, norm=before)
    call.run(chain)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def _plan(scheme: str, layout: str, size: tuple[int, int], rows: Tensor) -> Any:
    plan: Any = plan_for(scheme, layout, *size, rows.dtype, "cpu")
    if not isinstance(plan, native.LinearPlan):
        plan = compiled_plan(scheme, layout, size, rows.dtype, max(len(rows), 1))
    if plan is None:
        raise ValueError(f"scheme={scheme!r}, layout={layout!r}: no compiled kernel here; call nybble::linear instead")
    return plan.compiled


def _refuse_gradients(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "nybble::norm, nybble::activate and nybble::linears have no gradients: run them under torch.no_grad(), or use "
        "torch's functions and nybble::linear"
    )


def _batched_norm(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """The rule of vmap: rows are rows. The sum is empty without a residual, and has no batch then."""
    (y, total), dims = batching.leading(0, 1)(op, info, in_dims, *args)
    return (y, total), (dims[0], dims[1] if total.dim() > 1 else None)


_RULES = {
    "norm": _batched_norm,
    "activate": batching.leading(0, 1),
    "linears": batching.leading(0, 7, 8),
}
for _name, _function in (("norm", _norm), ("activate", _activate), ("linears", _linears)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    gradients.register(_LIBRARY, _name, _refuse_gradients)
    batching.register(_LIBRARY, _name, _RULES[_name])
flops.register("linears")


@torch.library.register_fake("nybble::norm", lib=_LIBRARY)
def _norm_fake(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@torch.library.register_fake("nybble::activate", lib=_LIBRARY)
def _activate_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("nybble::linears", lib=_LIBRARY)
def _linears_fake(
    x: Tensor, packed: list[Tensor], bias: Any, scheme: Any, layout: Any, out_features: list[int], *_: Any
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]
