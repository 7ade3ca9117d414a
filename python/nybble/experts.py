"""The torch op ``nybble::experts``: the experts of a layer on CPUs, in one call.

For each token the sum, over its experts, of weight * down(act(gate) * up), where gate and up are the outputs of the
expert's first weight. Tokens are sorted by expert, each is rounded once for all of its experts, and the weights of
experts that get no token are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import batching, flops, gradients, native, ops
from .dispatch import registry
from .dispatch.selection import compiled_plan, row_starts
from .dispatch.spec import FLOATS
from .native import Gate
from .rows import ACTIVATIONS
from .weights.scheme import Scheme

__all__ = ["Experts", "Gate", "Side", "between", "experts"]

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define(
    "experts(Tensor x, Tensor index, Tensor weight, "
    "Tensor[] up, Tensor?[] up_bias, str up_scheme, str up_layout, int up_out, int up_in, "
    "Tensor[] down, Tensor?[] down_bias, str down_scheme, str down_layout, int down_out, int down_in, "
    "str act, bool gated, bool interleaved, float limit, float other_offset) -> Tensor"
)


class Side(NamedTuple):
    """One of the two weights of all experts: packed, with biases, by expert, of one scheme, layout and shape."""

    packed: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    scheme: str
    layout: str
    out_features: int
    in_features: int


def between(gate: Gate, x: Tensor) -> Tensor:
    """What experts compute between their two products, in torch."""
    if not gate.gated:
        return ACTIVATIONS[gate.act](x)
    first, up = (x[..., ::2], x[..., 1::2]) if gate.interleaved else x.chunk(2, -1)
    if gate.limit:
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit) + gate.other_offset
    return ACTIVATIONS[gate.act](first) * up


def why_not(scheme: Scheme) -> str | None:
    """Why experts of a scheme cannot run in one call, or None. Their Linear layers run one by one then."""
    if scheme.static:
        return "static activations have a scale for each expert, so a token cannot be rounded once for all"
    if scheme.ordered:
        return "each expert has an order of the inputs of its own, so a token cannot be rounded once for all"
    return None


class Experts:
    """The experts of a layer, made ready for the packed weights that they have now.

    Raises:
        ValueError: shapes or schemes do not fit, or no compiled kernel serves them.
    """

    def __init__(self, up: Side, down: Side, gate: Gate) -> None:
        self.up, self.down, self.gate = up, down, gate
        self._made: dict[torch.dtype, native.Experts] = {}
        self._packed, self._bias = [*up.packed, *down.packed], [*up.bias, *down.bias]
        self._places: list[tuple[int, int]] | None = None  # of the packed weights and biases, once they are used

    def serves(self, number: int, packed: Tensor | None, bias: Tensor | None) -> bool:
        """Whether these are the weights of a layer, where they were. Layers are numbered, those of up first."""
        if packed is None or packed is not self._packed[number] or bias is not self._bias[number]:
            return False
        return self._places is not None and _place(packed, bias) == self._places[number]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x (T, K), float32, bfloat16 or float16; index (T, top_k), integers: the experts of each token, of which the
        number of experts stands for none; weight (T, top_k), floats -> (T, N) in x's dtype.

        Raises:
            ValueError: a shape, dtype or device that does not fit, by name, or an index of no expert.
            NotImplementedError: a tensor requires a gradient.
        """
        if is_compiling() or ops._watched(x, self.up.packed[0], None) or weight.requires_grad:
            up, down, op = self.up, self.down, torch.ops.nybble.experts.default
            out: Tensor = op(x, index, weight, *up, *down, *self.gate)
            return out
        return self.run(x, index, weight)

    def run(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """As a call, without torch's dispatcher."""
        _check(x, index, weight, self.up.in_features)
        made = self._made.get(x.dtype)
        if made is None:
            made = self._made.setdefault(x.dtype, self._make(x.dtype))
        out = x.new_empty(len(x), self.down.out_features)
        if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
            x = x.contiguous()
        made(x, index.to(torch.int64).contiguous(), weight.to(torch.float32).contiguous(), out)
        return out

    def _make(self, dtype: torch.dtype) -> native.Experts:
        places = list(map(_place, self._packed, self._bias))
        if places != self._places:
            self._made.clear()
            self._places = places
        sides = [native.ExpertsSide(_plans(side, dtype), side.packed, side.bias) for side in (self.up, self.down)]
        return native.Experts(dtype, registry.fastest("rows"), sides[0], sides[1], self.gate)


def _place(packed: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return packed.data_ptr(), 0 if bias is None else bias.data_ptr()


def experts(x: Tensor, index: Tensor, weight: Tensor, up: Side, down: Side, gate: Gate) -> Tensor:
    """As ``Experts``, for one call."""
    return Experts(up, down, gate)(x, index, weight)


def _plans(side: Side, dtype: torch.dtype) -> list[tuple[int, native.LinearPlan]]:
    """The kernels of a weight, from so many rows on each."""
    scheme = Scheme.parse(side.scheme)
    if reason := why_not(scheme):
        raise ValueError(f"scheme={side.scheme!r}: {reason}")
    size, found = (side.out_features, side.in_features), []
    for least in (1, *row_starts(scheme, dtype)):
        plan = compiled_plan(side.scheme, side.layout, size, dtype, least)
        if plan is None:
            raise ValueError(
                f"scheme={side.scheme!r}, layout={side.layout!r}: no compiled kernel for {least} rows here"
            )
        found.append((least, plan))
    return found


def _check(x: Tensor, index: Tensor, weight: Tensor, in_features: int) -> None:
    if x.dim() != 2 or x.shape[1] != in_features or x.dtype not in FLOATS or not x.is_cpu:
        rule = f"must be (T, {in_features}), one of {FLOATS}, on the CPU"
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype} on {x.device}, {rule}")
    if index.dim() != 2 or len(index) != len(x) or index.is_floating_point() or not index.is_cpu:
        rule = f"must be ({len(x)}, top_k) integers on the CPU"
        raise ValueError(f"index: {tuple(index.shape)} {index.dtype} on {index.device}, {rule}")
    if weight.shape != index.shape or not weight.is_floating_point() or not weight.is_cpu:
        rule = f"must be {tuple(index.shape)}, floats, on the CPU"
        raise ValueError(f"weight: {tuple(weight.shape)} {weight.dtype} on {weight.device}, {rule}")


def _experts(x: Tensor, index: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return Experts(Side(*rest[:6]), Side(*rest[6:12]), Gate(*rest[12:])).run(x, index, weight)


def _refuse_gradients(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "nybble::experts has no gradients: run it under torch.no_grad(), or call the experts' layers one by one"
    )


_LIBRARY.impl("experts", _experts, "CompositeExplicitAutograd")
gradients.register(_LIBRARY, "experts", _refuse_gradients)
batching.register(_LIBRARY, "experts", batching.merged({0: 0, 1: 0, 2: 0}))
flops.register("experts")


@torch.library.register_fake("nybble::experts", lib=_LIBRARY)
def _experts_fake(x: Tensor, index: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    inputs, outputs = rest[5], rest[10]
    torch._check(x.dim() == 2, lambda: "x: must have two dimensions")
    torch._check(x.shape[1] == inputs, lambda: f"x: the last dimension must be {inputs}")
    return x.new_empty(x.shape[0], outputs)
