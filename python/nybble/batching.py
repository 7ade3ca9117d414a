"""``torch.vmap`` of this package's ops: the batch becomes more rows, so that one call computes all of them.

Arguments to which an op is applied row by row, or sample by sample, take the batch as one more dimension of theirs, or as
part of one. Where another argument has the batch, such as a stack of weights, the op is called once for each item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

# (info, in_dims, *args) -> (outputs, out_dims), as torch.library.register_vmap takes it.
Rule: TypeAlias = "Callable[..., tuple[Any, Any]]"


def register(library: torch.library.Library, name: str, rule: Rule) -> None:
    """Registers the batching rule of the op ``nybble::name``, which the library defines."""
    torch.library.register_vmap(f"nybble::{name}", partial(rule, getattr(torch.ops.nybble, name).default), lib=library)


def leading(*places: int) -> Rule:
    """The rule of an op that takes any leading dimensions in the arguments at some places, and gives them to its outputs."""
    return partial(_fold, dict.fromkeys(places, 0), False)


def merged(dims: Mapping[int, int]) -> Rule:
    """The rule of an op whose arguments have samples along a dimension: place -> dimension, which is that of the outputs too."""
    return partial(_fold, dims, True)


def one_by_one(op: Any, info: Any, in_dims: Sequence[Any], *args: Any, **keywords: Any) -> tuple[Any, Any]:
    """The rule of any op: a call for each item of the batch.

    Raises:
        ValueError: the batch is empty, so that no call tells what the outputs are.
    """
    if not info.batch_size:
        raise ValueError(f"{op.name()}: a batch of 0 over its weights or sizes, must have at least one item")
    found = [op(*_map(partial(_select, i), args, in_dims), **keywords) for i in range(info.batch_size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return type(found[0])(stacked), type(found[0])([0] * len(stacked))


def _fold(
    dims: Mapping[int, int], merge: bool, op: Any, info: Any, in_dims: Sequence[Any], *args: Any, **keywords: Any
) -> tuple[Any, Any]:
    if any(_is_batched(dim) for place, dim in enumerate(in_dims) if place not in dims):
        return one_by_one(op, info, in_dims, *args, **keywords)
    size, given = info.batch_size, list(args)
    for place, at in dims.items():
        (given[place],) = _map(partial(_moved, at, size, merge), [given[place]], [in_dims[place]])
    out, at = op(*given, **keywords), next(iter(dims.values()))
    if merge:
        out = _map_one(lambda one: one.unflatten(at, (size, one.shape[at] // max(size, 1))), out)
    return out, _map_one(lambda _: at, out)


def _moved(at: int, size: int, merge: bool, tensor: Tensor, dim: int | None) -> Tensor:
    """A tensor with the batch at a dimension, or merged into the one that stood there."""
    tensor = (
        tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
        if dim is None
        else tensor.movedim(dim, at)
    )
    return tensor.flatten(at, at + 1) if merge else tensor


def _select(item: int, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.select(dim, item)


def _is_batched(dim: Any) -> bool:
    return any(map(_is_batched, dim)) if isinstance(dim, list | tuple) else dim is not None


def _map(change: Callable[[Tensor, int | None], Tensor], args: Sequence[Any], in_dims: Sequence[Any]) -> list[Any]:
    """Arguments with their tensors changed, those in lists too."""
    found: list[Any] = []
    for one, dim in zip(args, in_dims, strict=True):
        if isinstance(one, Tensor):
            found.append(change(one, dim))
        else:
            found.append(_map(change, one, dim) if isinstance(one, list | tuple) else one)
    return found


def _map_one(change: Callable[[Tensor], Any], out: Any) -> Any:
    return change(out) if isinstance(out, Tensor) else type(out)([change(one) for one in out])
