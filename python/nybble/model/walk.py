"""Where the modules of a model stand and which of its tensors share memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """One slot of a parent that holds a module."""

    parent: nn.Module
    key: str

    def put(self, module: nn.Module) -> None:
        """Fill the slot without the checks of ``setattr``, so that undoing a swap cannot fail."""
        self.parent._modules[self.key] = module


class Site(NamedTuple):
    """One module object with all its names and slots. The root has the name "" and no slot."""

    module: nn.Module
    names: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """The first name in the order of the model."""
        return self.names[0]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module), a shared module once for each of its names; a module inside itself is not entered again."""

    def visit(name: str, module: nn.Module, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        inside = above | {id(module)}
        for key, child in module._modules.items():
            if child is not None and id(child) not in inside:
                yield from visit(f"{name}.{key}" if name else key, child, inside)

    yield from visit("", model, frozenset())


def sites(model: nn.Module) -> list[Site]:
    """Each module object of the model once, in the order of its first name."""
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    places: dict[int, list[Place]] = {}
    for name, module in named_modules(model):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name)
    for module in modules.values():
        for key, child in module._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append(Place(module, key))
    return [Site(modules[i], tuple(names[i]), tuple(places.get(i, ()))) for i in modules]


def region(tensor: torch.Tensor) -> tuple[torch.device, int, int] | None:
    """(device, first byte, one past the last byte), or None where no memory stands behind the tensor."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def memory_groups(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Map ``id(tensor)`` to a group number; tensors are in one group when their memory overlaps."""
    groups: dict[int, int] = {}
    spans = []
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        span = region(tensor)
        if span is None:
            groups[id(tensor)] = -1 - len(groups)
        else:
            spans.append((str(span[0]), span[1], span[2], id(tensor)))
    group, device, end = -1, "", 0
    for span_device, start, stop, key in sorted(spans):
        if span_device != device or start >= end:
            group, device, end = group + 1, span_device, stop
        end = max(end, stop)
        groups[key] = group
    return groups


class Edits:
    """Changes to the dictionaries of modules, made as they come, that can be taken back."""

    def __init__(self) -> None:
        self._done: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, table: dict[str, Any], key: str, value: object) -> None:
        """Replace what stands at a key that is there."""
        self._done.append((table, key, table[key]))
        table[key] = value

    def swap(self, site: Site, new: nn.Module) -> None:
        """Put a module into all slots of a site."""
        for place in site.places:
            self._done.append((place.parent._modules, place.key, site.module))
            place.put(new)

    def take(self, later: Edits) -> None:
        """Make further changes part of these."""
        self._done += later._done

    def undo(self) -> None:
        """Take all changes back, the last one first."""
        while self._done:
            table, key, old = self._done.pop()
            table[key] = old


def swap(replacements: Iterable[tuple[Site, nn.Module]]) -> None:
    """Put every new module into all slots of its site, or, after any exception, none."""
    edits = Edits()
    try:
        for site, new in replacements:
            edits.swap(site, new)
    except BaseException:
        edits.undo()
        raise
