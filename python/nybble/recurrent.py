"""The torch ops ``nybble::lstm`` and ``nybble::gru``: a layer over whole sequences, in one call.

``by_steps`` computes the same from torch's functions, with any products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import batching, flops, gradients, native, ops
from .dispatch.registry import fastest
from .dispatch.selection import compiled_plan
from .dispatch.spec import FLOATS

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_WEIGHTS = "Tensor[] packed, Tensor?[] bias, str[] scheme, str[] layout"
_LIBRARY.define(f"lstm(Tensor x, int[]? sizes, Tensor h, Tensor c, {_WEIGHTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"gru(Tensor x, int[]? sizes, Tensor h, {_WEIGHTS}) -> (Tensor, Tensor)")

# Inputs or states (rows, columns) times a weight.
Product = Callable[[Tensor], Tensor]

# Rows of the weights for each unit.
GATES = {"lstm": 4, "gru": 3}


def lstm(
    x: Tensor,
    sizes: Sequence[int] | None,
    h: Tensor,
    c: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scheme: Sequence[str],
    layout: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the last state and the last cell of an LSTM layer with the weights of nybble::linear.

    Args:
        x: (steps, batch, inputs), float32, bfloat16 or float16; or (rows, inputs) with sizes, the rows of each step,
            none more than before: as torch packs sequences of unequal lengths.
        h, c: (directions, batch, units), the first state and cell, in x's dtype.
        packed: the weight of the input and that of the state, of each direction; the second runs backwards.
        bias, scheme, layout: an item for each weight. Where the weights of the input have the scheme "", x are the
            products with them, biases added, float32: (..., directions * 4 * units).

    The outputs are (steps, batch, directions * units) or (rows, directions * units). The cell and the sums are float32;
    the state is rounded to x's dtype after each step. The products are those of nybble::linear, and the result does not
    depend on the number of threads. A layer with a weight that has no compiled kernel, as on a GPU, is computed step by
    step. Gradients flow to x, h, c and bias; for them the layer is computed again, step by step.

    Raises:
        ValueError: what does not fit, by name.
        NoKernelError: no kernel accepts a weight.
    """
    call: Any = _lstm if _direct(x, h, packed, bias) else torch.ops.nybble.lstm.default
    y, last, cell = call(x, sizes, h, c, packed, bias, scheme, layout)
    return y, last, cell


def gru(
    x: Tensor,
    sizes: Sequence[int] | None,
    h: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scheme: Sequence[str],
    layout: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The outputs and the last state of a GRU layer; as ``lstm``."""
    call: Any = _gru if _direct(x, h, packed, bias) else torch.ops.nybble.gru.default
    y, last = call(x, sizes, h, packed, bias, scheme, layout)
    return y, last


def _direct(x: Tensor, h: Tensor, packed: Sequence[Tensor], bias: Sequence[Tensor | None]) -> bool:
    """Whether the call need not go through torch's dispatcher."""
    if is_compiling():
        return False
    return not any(ops._watched(x, weight, shift) for weight, shift in zip(packed, bias, strict=False)) and not (
        ops._watched(h, packed[0], None)
    )


def by_steps(
    x: Tensor, sizes: Sequence[int], states: Sequence[Tensor], products: Sequence[tuple[Product, Product]]
) -> list[Tensor]:
    """A layer, step by step: the outputs, and the last of each state.

    x: (steps, batch, inputs) or (rows, inputs), of which a step has so many as `sizes` says; states: (directions, batch,
    units), h and of an LSTM c; products: for each direction, of the input and of the state with their weights, biases
    added. Sums are float32, or float64.
    """
    rows, outputs, ends = x.reshape(-1, x.shape[-1]), [], []
    for i, pair in enumerate(products):
        y, *last = _direction(rows, sizes, [state[i] for state in states], pair, backwards=i == 1)
        outputs.append(y)
        ends.append([end.to(state.dtype) for end, state in zip(last, states, strict=True)])
    y = torch.cat(outputs, -1)
    return [y.view(*x.shape[:-1], y.shape[-1]), *(torch.stack(parts) for parts in zip(*ends, strict=True))]


def _direction(
    x: Tensor, sizes: Sequence[int], states: list[Tensor], products: tuple[Product, Product], backwards: bool
) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = list(zip(products[0](x).split(list(sizes)), sizes, strict=True))
    h, c = states[0], states[1].to(wide) if len(states) > 1 else None
    outputs: list[Tensor] = []
    for inputs, rows in reversed(steps) if backwards else steps:
        hidden = products[1](h[:rows]).to(wide)
        if c is None:
            new = _gru_cell(inputs.to(wide), hidden, h[:rows].to(wide))
        else:
            new, cells = _lstm_cell(inputs.to(wide) + hidden, c[:rows])
            c = _replaced(c, cells)
        outputs.append(new.to(h.dtype))
        h = _replaced(h, outputs[-1])
    y = torch.cat(outputs[::-1] if backwards else outputs)
    return [y, h] if c is None else [y, h, c]


def _lstm_cell(sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    enter, forget, candidate, leave = sums.chunk(4, -1)
    c = forget.sigmoid() * c + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * c.tanh(), c


def _gru_cell(inputs: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    units = before.shape[-1]
    reset, update = (inputs[..., : 2 * units] + hidden[..., : 2 * units]).sigmoid().chunk(2, -1)
    candidate = (inputs[..., 2 * units :] + reset * hidden[..., 2 * units :]).tanh()
    return candidate + update * (before - candidate)


def _replaced(state: Tensor, first: Tensor) -> Tensor:
    """The state with other first rows."""
    return first if len(first) == len(state) else torch.cat((first, state[len(first) :]))


def _lstm(x: Tensor, sizes: Sequence[int] | None, h: Tensor, c: Tensor, *weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    if c.shape != h.shape or c.dtype is not h.dtype or c.device != h.device:
        raise ValueError(f"c: {tuple(c.shape)} {c.dtype} on {c.device}, must be as h, {tuple(h.shape)} {h.dtype}")
    cell = c.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    y, last = _run("lstm", x, sizes, h, cell, *weights)
    return y, last, cell.to(c.dtype)


def _gru(x: Tensor, sizes: Sequence[int] | None, h: Tensor, *weights: Any) -> tuple[Tensor, Tensor]:
    return _run("gru", x, sizes, h, None, *weights)


def _run(
    cell: str,
    x: Tensor,
    sizes: Sequence[int] | None,
    h: Tensor,
    c: Tensor | None,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scheme: Sequence[str],
    layout: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The outputs and the last state; the last cell is written into c."""
    sizes = _sizes(x, sizes)
    directions, units, columns = _checked_state(h, x, sizes[0]), h.shape[2], GATES[cell] * h.shape[2]
    for name, items in {"packed": packed, "bias": bias, "scheme": scheme, "layout": layout}.items():
        if len(items) != 2 * directions:
            raise ValueError(f"{name}: has {len(items)} items, must have two for each of {directions} directions of h")
    multiplied = _checked_products(x, h, scheme, directions * columns)
    shifts = [None if shift is None else ops._checked_bias(shift, x, columns) for shift in bias]
    weights = list(zip(packed, shifts, scheme, layout, strict=True))
    inputs = [None] * directions if multiplied else [_compiled(one, x, columns) for one in weights[::2]]
    hidden = [_compiled(one, h[0], columns) for one in weights[1::2]]
    if any(one is None for one in hidden) or (not multiplied and any(one is None for one in inputs)):
        y, *last = _by_linear(cell, x, sizes, [h] if c is None else [h, c], weights)
        if c is not None:
            c.copy_(last[1])
        return y, last[0]
    rows, state = x.reshape(-1, x.shape[-1]), h.clone(memory_format=torch.contiguous_format)
    if rows.stride(1) != 1 or 0 < rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    out = h.new_empty(*x.shape[:-1], directions * units)
    pairs = [(one, other) for one, other in zip(inputs, hidden, strict=True) if other is not None]
    native.recurrent(_kernel(), cell, pairs, sizes, (rows, out, state, c))
    return out, state


_Weight = tuple[Tensor, "Tensor | None", str, str]  # packed, bias, scheme, layout


def _checked_products(x: Tensor, h: Tensor, scheme: Sequence[str], columns: int) -> bool:
    """Whether x are products with the input already."""
    given = [name == "" for name in scheme[::2]]
    if not any(given):
        if h.dtype is not x.dtype:
            raise ValueError(f"h: {h.dtype}, must be {x.dtype} as x")
        return False
    if not all(given) or x.dtype is not torch.float32 or x.shape[-1] != columns:
        raise ValueError(
            f"x: {tuple(x.shape)} {x.dtype} with scheme={list(scheme)}: products with the inputs must be for all "
            f"directions, float32, and have {columns} columns"
        )
    return True


def _compiled(weight: _Weight, x: Tensor, columns: int) -> Any:
    """A weight as native.recurrent takes it, for the rows of x; None if it has no compiled kernel here."""
    packed, bias, scheme, layout = weight
    ops._check_packed(packed)
    k = x.shape[-1]
    plan = compiled_plan(scheme, layout, (columns, k), x.dtype, max(x.numel() // k, 1)) if x.is_cpu else None
    return None if plan is None else (plan.compiled, native.memory(packed), native.vector(bias))


@lru_cache
def _kernel() -> str:
    return fastest("rows")


def _sizes(x: Tensor, sizes: Sequence[int] | None) -> list[int]:
    """The rows of each step."""
    if x.dtype not in FLOATS:
        raise ValueError(f"x: {x.dtype}, must be one of {FLOATS}")
    if x.dim() != (3 if sizes is None else 2) or x.shape[0] < 1:
        raise ValueError(
            f"x: shape {tuple(x.shape)}, must be (steps, batch, inputs) of at least one step, or (rows, inputs) with sizes"
        )
    if sizes is None:
        return [x.shape[1]] * x.shape[0]
    if sum(sizes) != x.shape[0]:
        raise ValueError(f"sizes: sum to {sum(sizes)}, must be the {x.shape[0]} rows of x")
    return list(sizes)


def _checked_state(h: Tensor, x: Tensor, batch: int) -> int:
    """The number of directions."""
    if h.dim() != 3 or h.shape[0] not in (1, 2) or h.shape[1] != batch or h.dtype not in FLOATS:
        raise ValueError(f"h: {tuple(h.shape)} {h.dtype}, must be (1 or 2, {batch}, units), one of {FLOATS}")
    if h.device != x.device:
        raise ValueError(f"h: on {h.device}, x is on {x.device}")
    return h.shape[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, sizes, *states, packed, bias, scheme, layout = inputs
    ctx.save_for_backward(x, *states, *packed, *bias)
    ctx.rest = sizes, scheme, layout


def _backward(cell: str, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradients, by computing the layer again step by step."""
    sizes, scheme, layout = ctx.rest
    count, states = len(scheme), 2 if cell == "lstm" else 1
    x, *rest = ctx.saved_tensors
    packed, needs = rest[states : states + count], ctx.needs_input_grad
    inputs = [x, *rest[:states], *rest[states + count :]]
    wanted = [needs[0], *needs[2 : 2 + states], *needs[3 + states]]

    def layer(*changed: Tensor) -> tuple[Tensor, ...]:
        given = iter(changed)
        x, *more = [next(given) if is_wanted else one for one, is_wanted in zip(inputs, wanted, strict=True)]
        weights: list[_Weight] = list(zip(packed, more[states:], scheme, layout, strict=True))
        return tuple(_by_linear(cell, x, _sizes(x, sizes), more[:states], weights))

    pull: Any = torch.func.vjp(layer, *(one for one, is_wanted in zip(inputs, wanted, strict=True) if is_wanted))[1]
    found = iter(pull(tuple(grads)))
    of_x, *of_more = [next(found) if is_wanted else None for is_wanted in wanted]
    return of_x, None, *of_more[:states], [None] * count, of_more[states:], None, None


def _by_linear(
    cell: str, x: Tensor, sizes: list[int], states: list[Tensor], weights: Sequence[_Weight]
) -> list[Tensor]:
    """The layer step by step, with nybble::linear and its gradients."""
    columns = GATES[cell] * states[0].shape[2]
    multiply = [partial(_product, weight, columns, i // 2) for i, weight in enumerate(weights)]
    return by_steps(x, sizes, states, list(zip(multiply[::2], multiply[1::2], strict=True)))


def _product(weight: _Weight, columns: int, direction: int, x: Tensor) -> Tensor:
    if not weight[2]:  # x are the products
        return x[:, direction * columns : (direction + 1) * columns]
    out: Tensor = torch.ops.nybble.linear(x, *weight, columns, x.shape[-1])
    return out


def _batched(op: Any, info: Any, in_dims: Sequence[Any], x: Tensor, sizes: Any, *rest: Any) -> tuple[Any, Any]:
    """The rule of vmap: its batch becomes part of that of the layer. Packed sequences are looped over."""
    places = range(2, 4 if op is torch.ops.nybble.lstm.default else 3)
    rule = batching.one_by_one if sizes is not None else batching.merged({0: 1, **dict.fromkeys(places, 1)})
    return rule(op, info, in_dims, x, sizes, *rest)


for _name, _function in (("lstm", _lstm), ("gru", _gru)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    gradients.register(_LIBRARY, _name, partial(_backward, _name), _setup_context)
    batching.register(_LIBRARY, _name, _batched)
    flops.register(_name)


@torch.library.register_fake("nybble::lstm", lib=_LIBRARY)
def _lstm_fake(x: Tensor, sizes: Any, h: Tensor, c: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_output(x, h), h.new_empty(h.shape), c.new_empty(c.shape)


@torch.library.register_fake("nybble::gru", lib=_LIBRARY)
def _gru_fake(x: Tensor, sizes: Any, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(x, h), h.new_empty(h.shape)


def _fake_output(x: Tensor, h: Tensor) -> Tensor:
    torch._check(h.dim() == 3, lambda: f"h: has {h.dim()} dimensions, must have 3")
    torch._check(x.device == h.device, lambda: f"h: on {h.device}, x is on {x.device}")
    return h.new_empty((*x.shape[:-1], h.shape[0] * h.shape[2]))
