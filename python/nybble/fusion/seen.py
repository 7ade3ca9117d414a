"""The values of a watched call: which event computed a tensor, and which node stands for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..model.eligible import is_linear_like
from ..nn.composite import CompositeModule
from .arguments import leaves_of
from .compare import integers, same, same_flat, same_memory
from .forms import NotUnderstood
from .nodes import Input, Inside, Node, Path, Ref
from .watch import CONTAINER, MODULE, Call, Event, caches_in

Test = Callable[[Tensor, Tensor], bool]
ATTENTION, MULTI_HEAD = "scaled_dot_product_attention", "multi_head_attention_forward"
# Functions whose outputs have the tokens in other dimensions than the first two: what to exchange.
_TOKENS_INSIDE = {ATTENTION: (1, 2), MULTI_HEAD: (0, 1)}
# Functions that compute nothing: they give the same values in other places.
_MOVES = {
    *("transpose", "permute", "movedim", "swapaxes", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *(
        "dropout",
        "contiguous",
        "clone",
        "__getitem__",
        "expand",
        "chunk",
        "split",
        "unbind",
        "detach",
        "type_as",
        "view_as",
    ),
}


@dataclass
class Seen:
    """What was seen of a call, and the nodes that explain its values so far.

    names: the modules inside, with their names. tensors: those among the arguments. hidden: where the one stands that gives
    batch and length; dims: of its kind, 3 (batch, length, width) or 2 (length, width).
    """

    call: Call
    names: dict[nn.Module, str]
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[Path, Tensor] = field(default_factory=dict)
    hidden: Path = ()
    batch: int = 1
    length: int = 1
    dims: int = 3
    apart: dict[Node, Event] = field(default_factory=dict)  # the calls of modules that run by their own forward

    def start(self) -> None:
        """Finds the hidden states among the arguments: the first float tensor with batch, length and width. A model of
        texts has none: then the first tensor of integers (batch, length)."""
        self.tensors = {
            path: leaf for path, leaf in leaves_of(self.call.args, self.call.kwargs) if isinstance(leaf, Tensor)
        }
        for path, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.dim() in (2, 3) and tensor.numel():
                self.hidden, self.dims = path, tensor.dim()
                self.batch, self.length = (1, len(tensor)) if tensor.dim() == 2 else tensor.shape[:2]
                return
        for path, tensor in self.tensors.items():
            if integers(tensor) and tensor.dtype != torch.bool:
                self.hidden, (self.batch, self.length) = path, tensor.shape
                return
        raise NotUnderstood("it is called without a tensor of tokens")

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of tokens as a matrix of rows."""
        rows = self.batch * self.length
        if not tensor.numel() or tensor.numel() % rows:
            raise NotUnderstood(f"a value of shape {tuple(tensor.shape)} is not a row for each of {rows} tokens")
        return tensor.reshape(rows, -1)

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(node, 0, node.width)

    def find(self, rows: Tensor, alike: Test = same) -> Ref | None:
        """A value that is explained already and has these rows, or has them in neighbouring columns."""
        width = rows.shape[1]
        for node in self.nodes:
            for offset in range(0, node.width - width + 1, width):
                if alike(node.rows[:, offset : offset + width], rows):
                    return Ref(node, offset, width)
        return None

    def path_of(self, tensor: Tensor) -> Path | None:
        """Where a tensor stands among the arguments."""
        return next((path for path, one in self.tensors.items() if one is tensor), None)

    def caches(self) -> Iterator[tuple[Path, Any]]:
        for path, value in leaves_of(self.call.args, self.call.kwargs):
            yield from caches_in(value, path)

    def value(self, tensor: Tensor, before: int) -> Ref:
        """What a tensor of tokens is computed from, by the events before a number."""
        return self.of_rows(self.rows(tensor), before)

    def of_rows(self, rows: Tensor, before: int) -> Ref:
        """What explains rows; where nothing does, the module of experts that computes them."""
        try:
            return self.known(rows, before)
        except NotUnderstood:
            found = self.inside(rows, before)
            if found is None:
                raise
            return found

    @cached_property
    def own_calls(self) -> list[Event]:
        """The calls, with one tensor and nothing else, of modules that run by their own forward."""
        found = []
        for event in self.call.events:
            plain = len(event.args) == 1 and isinstance(event.args[0], Tensor) and not event.kwargs
            if event.name == CONTAINER and plain and event.what in self.names and "forward" not in vars(event.what):
                found += [event] if runs_alone(event.what) else []
        return found

    def inside(self, rows: Tensor, before: int) -> Ref | None:
        """A module that computes these rows from one value and runs by its own forward."""
        for event in self.own_calls:
            x, out = event.args[0], event.outputs[0]
            fits = x.is_floating_point() and x.shape == out.shape == (*x.shape[:-1], rows.shape[1])
            if event.number < before and fits and out.numel() == rows.numel() and same(self.rows(out), rows):
                node = Inside(rows=rows, x=self.value(x, event.first), module=event.what, flat=x.dim() == 2)
                self.apart[node] = event
                return self.add(node)
        return None

    def known(self, rows: Tensor, before: int) -> Ref:
        """The value in the same memory, or else the first with equal numbers: some layers may compute the same."""
        for alike in (same_memory, same):
            found = self.find(rows, alike) or self.given(rows, alike)
            if found is not None:
                return found
            seen = self.producer(rows, before, alike)
            if seen is not None:
                return self.explained(*seen, rows)
        raise NotUnderstood(f"a value is computed by {self.source(rows, before)}, which is not understood")

    def given(self, rows: Tensor, alike: Test) -> Ref | None:
        """A tensor of the call that has these rows."""
        for path, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.numel() == rows.numel() and alike(self.rows(tensor), rows):
                return self.add(Input(rows=rows, path=path))
        return None

    def producer(self, rows: Tensor, before: int, alike: Test) -> tuple[Event, Tensor] | None:
        """The first event whose output has these rows, or has them in some of its columns, and that output.

        Later ones are copies, and a module whose inside is not needed comes after the functions in it.
        """
        inside = None
        for event in self.call.events[:before]:
            if event.name in _MOVES or event.name == CONTAINER:
                continue
            for output in event.outputs:
                if not output.is_floating_point() or output.numel() % len(rows):
                    continue
                if event.name in _TOKENS_INSIDE and output.dim() > 2:
                    output = output.transpose(*_TOKENS_INSIDE[event.name])
                if output.numel() == rows.numel() and alike(self.rows(output), rows):
                    return self.outermost(event, rows), output
                if inside is None and event.name == MODULE and output.numel() > rows.numel():
                    wide, width = self.rows(output), rows.shape[1]
                    starts = range(0, wide.shape[1] - width + 1, width)
                    if any(alike(wide[:, start : start + width], rows) for start in starts):
                        inside = (event, output)
        return inside

    def source(self, rows: Tensor, before: int) -> str:
        """The name of the function whose output was moved to these rows."""
        moved = [
            event
            for event in self.call.events[:before]
            if event.name in _MOVES and any(same_flat(output, rows) for output in event.outputs)
        ]
        tensor = moved[0].args[0] if moved else None
        for event in reversed(self.call.events[: moved[0].number if moved else 0]):
            if any(output is tensor for output in event.outputs):
                if event.name not in _MOVES:
                    return f"the torch function {event.name}"
                tensor = event.args[0]
        return "something that was not seen"

    def outermost(self, event: Event, rows: Tensor) -> Event:
        """The leaf module that ends with this event, if its output is the same; else the event."""
        for later in self.call.events[event.number :]:
            if later.name == MODULE and later.first <= event.number and later.outputs[0].numel() == rows.numel():
                return later if same(self.rows(later.outputs[0]), rows) else event
        return event

    def explained(self, event: Event, output: Tensor, rows: Tensor) -> Ref:
        if event.name == MODULE:
            ref = self.module(event)
            if ref is None:
                inside = [one for one in self.call.events[event.first : event.number] if one.outputs]
                alike = next((one for one in inside if same_flat(one.outputs[0], output)), None)
                if alike is None:
                    raise NotUnderstood(f"{self.name(event.what)} is neither a Linear, a norm nor an activation")
                ref = self.function(alike)
        else:
            ref = self.function(event)
        found = ref if same(ref.node.rows, rows) else self.find(rows)
        if found is None:
            raise NotUnderstood(f"{event.name} gives rows in an order that is not understood")
        return found

    def name(self, module: nn.Module) -> str:
        kind = type(module).__name__
        return f"{self.names[module]} ({kind})" if module in self.names else kind

    def module(self, event: Event) -> Ref | None:
        """What a leaf module computes; None if it is not known."""
        raise NotImplementedError

    def function(self, event: Event) -> Ref:
        """What a torch function computes. Raises NotUnderstood."""
        raise NotImplementedError


def runs_alone(module: nn.Module) -> bool:
    """Whether all Linear-like layers of a module are experts, or members of other modules that run theirs in one call."""
    owners = [one for one in module.modules() if isinstance(one, CompositeModule)]
    owned = {inner for owner in owners for inner in owner.modules()}
    return bool(owners) and not any(is_linear_like(one) for one in module.modules() if one not in owned)
