"""Chains: repeated blocks of a model, such as transformer layers, that each pass one tensor to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from .walk import named_modules

_Slot = int | str  # an argument of a block: its position or its keyword


@dataclass
class _Call:
    """The arguments of one call of a block, except the hidden state: its slot holds None."""

    args: list[Any]
    kwargs: dict[str, Any]

    def table(self, slot: _Slot) -> Any:
        return self.args if isinstance(slot, int) else self.kwargs


@dataclass(frozen=True)
class Chain:
    """Blocks that are called once each, in order; the output of each is an argument of the next.

    slots[i]: the argument of block i that takes this tensor, the hidden state.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    slots: tuple[_Slot, ...]

    def inside(self, layers: Sequence[nn.Module]) -> tuple[tuple[nn.Module, ...], ...]:
        """The layers inside each block; a layer in several blocks counts for the first."""
        found: list[tuple[nn.Module, ...]] = []
        seen: set[nn.Module] = set()
        for block in self.blocks:
            modules = set(block.modules()) - seen
            seen |= modules
            found.append(tuple(layer for layer in layers if layer in modules))
        return tuple(found)

    def capture(self, runs: Sequence[Callable[[], object]]) -> Feed:
        """Run the model once for each batch and record the arguments of its blocks."""
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
    """The inputs of one block, moved on from block to block.

    hidden[b]: the hidden state of batch b. dense[b]: that of the original model; empty if it is not tracked.
    calls[b][i]: the other arguments of block i.
    """

    chain: Chain
    hidden: list[Tensor] = field(default_factory=list)
    dense: list[Tensor] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)

    def runners(self, i: int) -> tuple[Callable[[], Any], ...]:
        """A call of block i for each batch."""
        # ``hidden`` is read at the time of the call, so that a finished stage keeps no old tensors alive.
        return tuple(partial(lambda b: self._run(i, b, self.hidden[b]), b) for b in range(len(self.hidden)))

    def dense_runners(self, i: int) -> tuple[Callable[[], Any], ...]:
        """The same with the hidden states of the original model; empty if these are the same tensors."""
        if all(x is y for x, y in zip(self.dense, self.hidden, strict=False)):
            return ()
        return tuple(partial(self._run, i, b, x) for b, x in enumerate(self.dense))

    def advance_dense(self, i: int) -> None:
        """Replace ``dense`` by the outputs of block i, before it is changed; after the last block, drop it."""
        last = i + 1 == len(self.chain.blocks)
        self.dense = [] if last else [_first(self._run(i, b, x)) for b, x in enumerate(self.dense)]

    def advance(self, i: int) -> None:
        """Replace ``hidden`` by the outputs of block i, one batch at a time; after the last block, drop it."""
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
    """chain: the repeated blocks, or None if they do not form a chain. before: the layers that run before them."""

    chain: Chain | None
    before: tuple[nn.Module, ...] = ()


def survey(model: nn.Module, run: Callable[[], object], layers: Sequence[nn.Module]) -> Survey:
    """Run one batch and record the order in which layers and blocks are called."""
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
    # A block that occurs twice in the list would be changed before its later inputs are known.
    if called != list(blocks) or len(known) != len(blocks) - 1 or len(set(map(id, blocks))) != len(blocks):
        return Survey(None)
    return Survey(Chain(name, blocks, (known[0], *known)), tuple(before))


def _first(output: Any) -> Any:
    """The hidden state: a block's output, or the first of its outputs."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _repeated(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Name and blocks of the ModuleList with the most parameters; of equal ones, the outermost."""
    best: tuple[int, str, tuple[nn.Module, ...]] = (0, "", ())
    for name, module in named_modules(model):
        if isinstance(module, nn.ModuleList):
            size = sum(parameter.numel() for parameter in module.parameters())
            best = max(best, (size, name, tuple(module)), key=lambda entry: entry[0])
    return best[1], best[2]
