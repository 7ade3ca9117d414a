"""Repeated blocks of a model that pass one tensor from each to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from .walk import named_modules

_Slot = int | str


@dataclass
class _Call:
    """Arguments of one call of a block; the tensor that comes from the block before is taken out of its slot."""

    args: list[Any]
    kwargs: dict[str, Any]

    def table(self, slot: _Slot) -> Any:
        return self.args if isinstance(slot, int) else self.kwargs


@dataclass(frozen=True)
class Chain:
    """Blocks that are called once each, in order, the output of each being an argument of the next.

    slots[i] is where block i takes that tensor: a position, or a keyword.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    slots: tuple[_Slot, ...]

    def inside(self, layers: Sequence[nn.Module]) -> tuple[tuple[nn.Module, ...], ...]:
        """The layers that stand in each block; one that stands in several is the first's."""
        found: list[tuple[nn.Module, ...]] = []
        seen: set[nn.Module] = set()
        for block in self.blocks:
            modules = set(block.modules()) - seen
            seen |= modules
            found.append(tuple(layer for layer in layers if layer in modules))
        return tuple(found)

    def capture(self, runs: Sequence[Callable[[], object]]) -> Feed:
        """Run the model once for each batch and note what its blocks are called with."""
        feed = Feed(self)
        for run in runs:
            calls: list[_Call] = []

            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[_Call] = calls) -> None:
                call = _Call(list(args), dict(kwargs))
                slot = self.slots[len(calls)]
                if not calls:
                    feed.hidden.append(call.table(slot)[slot])
                call.table(slot)[slot] = None
                calls.append(call)

            with contextlib.ExitStack() as hooks:
                for block in self.blocks:
                    hooks.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
                run()
            feed.calls.append(calls)
        return feed


@dataclass
class Feed:
    """The data before one block: hidden[b] of each batch b, dense[b] as it was before any change (or none of them is
    followed), and calls[b][i], the other arguments of block i."""

    chain: Chain
    hidden: list[Tensor] = field(default_factory=list)
    dense: list[Tensor] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)

    def runners(self, i: int) -> tuple[Callable[[], Any], ...]:
        """Calls of block i on each batch."""
        # Looked up when called: a stage that is done must not hold what is past.
        return tuple(partial(lambda b: self._run(i, b, self.hidden[b]), b) for b in range(len(self.hidden)))

    def dense_runners(self, i: int) -> tuple[Callable[[], Any], ...]:
        """The same on what comes out of the blocks as they were; none where that is the same."""
        if all(x is y for x, y in zip(self.dense, self.hidden, strict=False)):
            return ()
        return tuple(partial(self._run, i, b, x) for b, x in enumerate(self.dense))

    def advance_dense(self, i: int) -> None:
        """Replace ``dense`` by what comes out of block i, which is not changed yet; of the last block, drop it."""
        last = i + 1 == len(self.chain.blocks)
        self.dense = [] if last else [_first(self._run(i, b, x)) for b, x in enumerate(self.dense)]

    def advance(self, i: int) -> None:
        """Replace ``hidden`` by what comes out of block i, a batch at a time; of the last block, drop it."""
        if i + 1 == len(self.chain.blocks):
            self.hidden.clear()
        for b, x in enumerate(self.hidden):
            self.hidden[b] = _first(self._run(i, b, x))

    def _run(self, i: int, b: int, x: Tensor) -> Any:
        call, slot = self.calls[b][i], self.chain.slots[i]
        full = _Call(list(call.args), dict(call.kwargs))
        full.table(slot)[slot] = x
        return self.chain.blocks[i](*full.args, **full.kwargs)


@dataclass(frozen=True)
class Survey:
    """chain: the blocks, or None where the model has none that are a chain; before: the layers that run before them."""

    chain: Chain | None
    before: tuple[nn.Module, ...] = ()


def survey(model: nn.Module, run: Callable[[], object], layers: Sequence[nn.Module]) -> Survey:
    """Run one batch and see in which order the layers and the blocks of the model are called."""
    name, blocks = _repeated(model)
    if len(blocks) < 2:
        return Survey(None)
    before: list[nn.Module] = []
    slots: list[_Slot | None] = []
    called: list[nn.Module] = []
    last: list[Any] = [None]

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append(block)
        named: list[tuple[_Slot, Any]] = [*enumerate(args), *kwargs.items()]
        slots.append(next((slot for slot, value in named if value is last[0] and value is not None), None))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        last[0] = _first(output)

    def reach(layer: nn.Module, _: Any) -> None:
        if not called and layer not in before:
            before.append(layer)

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(reach).remove)
        run()
    known = [slot for slot in slots[1:] if slot is not None]
    # Block objects may repeat in a list; then they would be changed before all their inputs are known.
    if called != list(blocks) or len(known) != len(blocks) - 1 or len(set(map(id, blocks))) != len(blocks):
        return Survey(None)
    return Survey(Chain(name, blocks, (known[0], *known)), tuple(before))


def _first(output: Any) -> Any:
    """The tensor that goes on: a block's output, or the first of its outputs."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _repeated(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Name and blocks of the ModuleList with the most parameters; the outermost of equals."""
    best: tuple[int, str, tuple[nn.Module, ...]] = (0, "", ())
    for name, module in named_modules(model):
        if isinstance(module, nn.ModuleList):
            size = sum(parameter.numel() for parameter in module.parameters())
            best = max(best, (size, name, tuple(module)), key=lambda entry: entry[0])
    return best[1], best[2]
