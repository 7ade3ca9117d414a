"""Modules with several weights, opened for the time of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ..nn.composite import CompositeModule
from ..nn.kinds import find_composite
from .eligible import why_bound
from .walk import Site, sites


class _Opened(NamedTuple):
    """A site, the module in its place, its members' parameters at first, and the dense module unless it was freed."""

    site: Site
    new: CompositeModule
    held: list[nn.Parameter]
    dense: nn.Module | None

    def close(self) -> None:
        """Put the dense module back if no member has changed, or one with the members' weights if these are dense."""
        if not self.new.is_dense:
            return
        now = list(self.new.parameters())
        is_same = len(now) == len(self.held) and all(a is b for a, b in zip(now, self.held, strict=True))
        dense = self.dense if is_same and self.dense is not None else self.new.close()
        dense.train(self.new.training)
        for place in self.site.places:
            place.put(dense)


def why_closed(module: nn.Module) -> str | None:
    """Why a dense module with several weights cannot be opened; None if it can, or is none."""
    kind = find_composite(module)
    return None if kind is None else why_bound(module) or kind.why_not(module)


def names_around(sites: Iterable[Site]) -> dict[nn.Module, tuple[str, ...]]:
    """For each member of an open module the names of that module: a pattern that matches one stands for all members."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for site in sites:
        if isinstance(site.module, CompositeModule):
            found |= dict.fromkeys(site.module.members(), site.names)
    return found


def is_open(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a model has an open module under the first of these names."""
    return isinstance(dict(model.named_modules()).get(names[0]), CompositeModule)


@contextlib.contextmanager
def opened(
    model: nn.Module, keep: bool = True, only: Callable[[tuple[str, ...]], bool] = lambda names: True
) -> Iterator[Callable[[], None]]:
    """In the context, the modules with several weights are open; afterwards, those of them with quantized members are.

    Gives a function that closes the others already before.

    Args:
        model: the modules are inside it; it is not opened itself.
        keep: whether to hold the dense modules, so that a module that has not changed is the very same afterwards. If
            not, memory that no member uses any more is freed at once.
        only: gets the names of a module and says whether it is to be opened.
    """
    done: list[_Opened] = []

    def close() -> None:
        for one in done:
            one.close()

    try:
        _open(model, keep, only, done)
        yield close
    finally:
        close()


def _open(model: nn.Module, keep: bool, only: Callable[[tuple[str, ...]], bool], done: list[_Opened]) -> None:
    """Open the modules, and add each to ``done`` before the model changes."""
    for site in sites(model):
        kind = find_composite(site.module)
        if kind is None or not site.places or why_closed(site.module) is not None or not only(site.names):
            continue
        new = kind.open(site.module).train(site.module.training)
        done.append(_Opened(site, new, list(new.parameters()), site.module if keep else None))
        for place in site.places:
            place.put(new)
        site.module = new
