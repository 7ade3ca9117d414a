"""Watching a module run: which torch functions and which leaf modules computed which tensors from which."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..nn.packing import PackedModule

MODULE, CONTAINER, CACHE = "module", "container", "cache"


@dataclass(eq=False)
class Event:
    """A call that was seen. ``name`` is that of the torch function, MODULE for a leaf module, CONTAINER for
    one with modules inside, CACHE for the update of a key and value cache. ``first`` is the number of the first event inside the call, for a module."""

    number: int
    name: str
    what: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]
    first: int = -1

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


@dataclass(eq=False)
class Call:
    """A call of a module: its arguments, what it returned, and the events of its run in their order."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    events: list[Event] = field(default_factory=list)
    looks: list[tuple[int, str]] = field(
        default_factory=list
    )  # functions that gave values of tensors to Python, and when


# Functions that give values of tensors to Python, where they may decide what is computed.
_LOOKS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}


class _Functions(TorchFunctionMode):
    def __init__(self, events: list[Event], looks: list[tuple[int, str]]) -> None:
        super().__init__()
        self.events, self.looks, self.quiet = events, looks, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.quiet:
            outputs, name = tensors_of(result), getattr(func, "__name__", type(func).__name__)
            if name in _LOOKS:
                self.looks.append((len(self.events), name))
            if outputs:
                self.events.append(Event(len(self.events), name, func, args, kwargs, outputs))
        return result


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, nested in any way."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def caches_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The key and value caches in an argument, each with the path that leads to it.

    A cache is what has the methods ``update(keys, values, layer, ...)`` and ``get_seq_length``, such as transformers'.
    A cache of two parts, for self-attention and cross-attention, has caches as its attributes.
    """
    if value is None or isinstance(value, (Tensor, nn.Module, str, int, float, list, tuple, dict)):
        return
    parts = {name: part for name, part in getattr(value, "__dict__", {}).items() if _is_cache(part)}
    if parts:
        yield from (((*path, name), part) for name, part in parts.items())
    elif _is_cache(value):
        yield path, value


def _is_cache(value: Any) -> bool:
    return (
        not isinstance(value, (nn.Module, type))
        and callable(getattr(value, "update", None))
        and callable(getattr(value, "get_seq_length", None))
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no modules inside it."""
    return not any(True for _ in module.children())


@contextmanager
def _watched_modules(module: nn.Module, functions: _Functions) -> Iterator[None]:
    """Records an event for each call of a module inside that returns a tensor, after those of the functions in it."""
    events, owner = functions.events, threading.get_ident()  # other threads may call the same modules
    starts: list[int] = []

    def enter(inside: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == owner:
            starts.append(len(events))

    def leave(inside: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if threading.get_ident() != owner:
            return
        first = starts.pop()
        if isinstance(result, Tensor):
            name = MODULE if is_leaf(inside) else CONTAINER
            events.append(Event(len(events), name, inside, args, kwargs, [result], first))

    with ExitStack() as stack:
        for inside in module.modules():
            if inside is not module:
                stack.callback(inside.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(inside.register_forward_hook(leave, with_kwargs=True).remove)
        yield


@contextmanager
def _watched_cache(cache: Any, functions: _Functions) -> Iterator[None]:
    """Records an event for each update of a cache, and none of the functions inside it."""
    update: Callable[..., Any] = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        functions.quiet += 1
        try:
            result = update(*args, **kwargs)
        finally:
            functions.quiet -= 1
        events = functions.events
        events.append(Event(len(events), CACHE, cache, args, kwargs, tensors_of(result)))
        return result

    cache.update = watched
    try:
        yield
    finally:
        del cache.update


def watch(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[..., Any]) -> Call:
    """Runs ``run``, the forward of a module, on its arguments, without gradients, and records what it computes.

    Tensors are kept as long as the result is, so that no memory is used twice. Weights are packed before: that looks at
    values, which is no part of the call.
    """
    for inner in module.modules():
        if isinstance(inner, PackedModule):
            inner.pack()
    call = Call(module, tuple(args), dict(kwargs))
    functions = _Functions(call.events, call.looks)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for value in (*args, *kwargs.values()):
            for _, cache in caches_in(value):
                stack.enter_context(_watched_cache(cache, functions))
        stack.enter_context(_watched_modules(module, functions))
        stack.enter_context(functions)
        call.result = run(*args, **kwargs)
    return call
