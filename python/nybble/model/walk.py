"""The modules of a model with all their names and parents, tensors that share memory, and edits that can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """A parent module and the key under which it holds a child."""

    parent: nn.Module
    key: str

    def put(self, module: nn.Module) -> None:
        """Set the child without the checks of ``setattr``, so that undoing a swap cannot fail."""
        self.parent._modules[self.key] = module


@dataclass(eq=False)
class Site:
    """A module object with all its names and places. The root has the name "" and no place.

    Who goes through a model holds sites, not modules: then ``module`` can be set to one without values, which frees it.
    """

    module: nn.Module
    names: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """The first name in the model's order."""
        return self.names[0]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module); a shared module appears once per name. Cycles are not entered again."""

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
    """(device, first byte, one past the last byte), or None if the tensor has no plain memory (meta, empty, subclass)."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def memory_groups(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """``id(tensor)`` -> group number; tensors whose memory overlaps are in one group."""
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


_NOTHING = object()  # the value of a key that there was not


class Edits:
    """Changes to the dictionaries of modules (``_modules``, ``_parameters``), applied at once, that can be undone.

    With ``undoable=False`` they stay, since what they replace is not kept.
    """

    def __init__(self, undoable: bool = True) -> None:
        self.undoable = undoable
        self._done: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, table: dict[str, Any], key: str, value: object) -> None:
        """Set the value of a key."""
        if self.undoable:
            self._done.append((table, key, table.get(key, _NOTHING)))
        table[key] = value

    def swap(self, site: Site, new: nn.Module) -> None:
        """Put a module into all places of a site."""
        for place in site.places:
            if self.undoable:
                self._done.append((place.parent._modules, place.key, site.module))
            place.put(new)

    def take(self, later: Edits) -> None:
        """Take over the changes of another Edits, so that ``undo`` undoes them too."""
        if self.undoable:
            self._done += later._done

    def undo(self) -> None:
        """Undo all changes, the last one first."""
        while self._done:
            table, key, old = self._done.pop()
            if old is _NOTHING:
                del table[key]
            else:
                table[key] = old


def swap(replacements: Iterable[tuple[Site, nn.Module]]) -> None:
    """Put every new module into all places of its site; on an exception, none."""
    edits = Edits()
    try:
        for site, new in replacements:
            edits.swap(site, new)
    except BaseException:
        edits.undo()
        raise
