"""The arguments of a call: what kind of call it is, and how to get at a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor

from .nodes import Path
from .watch import caches_in, tensors_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Bytes of a cache up to which a call is copied, to be run again.
_MOST_CACHED = 1 << 26

_CONSTANTS = (bool, int, float, str)


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Calls of one kind are computed alike: they have the same arguments, each None or of the same type. Of tensors the
    dtype, the number of dimensions and whether they are one object count, of constants their values."""
    kind = (*[_kind(one) for one in args], *[(key, _kind(one)) for key, one in kwargs.items()])
    tensors = [id(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    return kind if len(set(tensors)) == len(tensors) else (kind, *map(tensors.index, tensors))


def _kind(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([_kind(one) for one in value])
    return type(value)


def get(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The part of the arguments that a path leads to."""
    first, *rest = path
    value = args[first] if isinstance(first, int) else kwargs[first]
    for key in rest:
        value = value[key] if isinstance(key, int) else getattr(value, key)
    return value


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The arguments of a call, those in tuples and lists one by one, each with its path."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, (tuple, list)):
            yield from (((key, i), part) for i, part in enumerate(value))
        else:
            yield (key,), value


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], new: Callable[[Any], Any]) -> Arguments:
    """The arguments with new(value) in place of each value."""
    return tuple(new(one) for one in args), {key: new(one) for key, one in kwargs.items()}


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with copies of the caches, which a run changes."""
    return replaced(args, kwargs, lambda value: deepcopy(value) if any(caches_in(value)) else value)


def large_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the caches of a call hold too much to be copied."""
    held = [tensor for value in (*args, *kwargs.values()) for _, cache in caches_in(value) for tensor in _held(cache)]
    return sum(tensor.nbytes for tensor in held) > _MOST_CACHED


def _held(cache: Any) -> Iterator[Tensor]:
    """The tensors of a cache: its own attributes, and those of its layers."""
    for value in vars(cache).values():
        parts = value if isinstance(value, (list, tuple)) else [value]
        for part in parts:
            yield from (
                tensors_of(part)
                if isinstance(part, Tensor)
                else tensors_of(list(getattr(part, "__dict__", {}).values()))
            )
