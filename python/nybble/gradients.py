"""Autograd for the torch ops of this package, in every mode of torch: ``backward()``, torch.compile, torch.func.

``torch.library.register_autograd`` cannot be used under ``torch.func.grad``, ``vjp`` or ``jacrev``. An autograd kernel
that handles one level of them at a time can: torch calls it for each level, and hands what is below on by its dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _any_requires_grad, _AutoDispatchBelowAutograd
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

_TENSOR_LISTS = ("List[Tensor]", "List[Optional[Tensor]]")


class _Call(NamedTuple):
    """What a call has besides its arguments; counts: the length of each argument that is a list of tensors, or None."""

    keyset: Any
    keywords: dict[str, Any]
    counts: tuple[int | None, ...]


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Registers the gradient of the op ``nybble::name``, as torch.library.register_autograd takes it.

    Args:
        library: in which the op is defined.
        backward: of (ctx, *gradients of the outputs) to a gradient, a list of them, or None for each argument by position.
        setup_context: keeps on ctx what it needs, of the keywords ``inputs`` and ``output``, and of
            ``keyword_only_inputs`` where the op has such.
    """
    op = getattr(torch.ops.nybble, name).default
    arguments = op._schema.arguments
    placed = [argument for argument in arguments if not argument.kwarg_only]
    named = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
    is_list = [str(argument.type) in _TENSOR_LISTS for argument in placed]
    gives_list = str(op._schema.returns[0].type) in _TENSOR_LISTS

    def below(keyset: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args, **keywords)

    def forward(ctx: Any, call: _Call, *flat: Any) -> Any:
        args = _nested(flat, call.counts)
        # Torch turns gradients off in here; an outer level of torch.func needs them.
        with torch.set_grad_enabled(peek_interpreter_stack() is not None):
            out = below(call.keyset, args, call.keywords)
        if setup_context is not None:
            more = {"keyword_only_inputs": {**named, **call.keywords}} if named else {}
            with _needs_of(ctx, call.counts):
                setup_context(ctx=ctx, inputs=tuple(args), output=out, **more)
        ctx._nybble_counts = call.counts
        return tuple(out) if gives_list else out

    def pull(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with _needs_of(ctx, ctx._nybble_counts):
            found = backward(ctx, *grads)
        return None, *_flat(found, ctx._nybble_counts)

    function: Any = type(
        f"Backward_nybble_{name}",
        (_SingleLevelFunction,),
        {"forward": staticmethod(forward), "backward": staticmethod(pull)},
    )

    def kernel(keyset: Any, *args: Any, **keywords: Any) -> Any:
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return below(keyset, args, keywords)
        # The dispatcher leaves out arguments that have their default.
        whole = [*args, *(argument.default_value for argument in placed[len(args) :])]
        counts = tuple(len(one) if listed else None for one, listed in zip(whole, is_list, strict=True))
        call = _Call(keyset, keywords, counts)
        if peek_interpreter_stack() is None:
            out = function.apply(call, *_flat(whole, counts))
        else:
            with enable_single_level_autograd_function():
                out = function.apply(call, *_flat(whole, counts))
        return list(out) if gives_list else out

    library.impl(name, kernel, "Autograd", with_keyset=True)


class _needs_of:
    """Makes ctx.needs_input_grad that of the op's arguments, for a while."""

    def __init__(self, ctx: Any, counts: tuple[int | None, ...]) -> None:
        self.ctx, self.counts, self.before = ctx, counts, ctx.needs_input_grad

    def __enter__(self) -> None:
        self.ctx.needs_input_grad = tuple(_nested(self.before[1:], self.counts))

    def __exit__(self, *_: object) -> None:
        self.ctx.needs_input_grad = self.before


def _flat(args: Sequence[Any], counts: tuple[int | None, ...]) -> Iterator[Any]:
    for one, count in zip(args, counts, strict=True):
        if count is None:
            yield one
        else:
            yield from one


def _nested(flat: Sequence[Any], counts: tuple[int | None, ...]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if count is None else [next(rest) for _ in range(count)] for count in counts]
