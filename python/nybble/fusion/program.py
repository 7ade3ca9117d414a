"""A chain that was understood, as something to run: in plain torch, or by compiled steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Arguments, get
from .forms import Applied, Explanation, Given, Record, outputs_of
from .nodes import (
    Activate,
    Add,
    Attend,
    Input,
    Inside,
    Linear,
    Lookup,
    Multiply,
    Node,
    Norm,
    Path,
    Product,
    Rotate,
    Run,
    Scale,
)


@dataclass(frozen=True, eq=False)
class Program:
    """What a call of one kind computes."""

    explanation: Explanation

    @cached_property
    def tables(self) -> tuple[Path, ...]:
        """The paths of what it reads of the call beside rows: masks, cos and sin, caches."""
        found: dict[Path, None] = {}
        for node in self.explanation.nodes:
            if isinstance(node, Rotate):
                found.update({node.cos: None, node.sin: None})
            if isinstance(node, Lookup) and node.path is not None:
                found[node.path] = None
            if isinstance(node, Attend):
                found.update(dict.fromkeys(node.mask.paths() if node.mask is not None else ()))
                if node.cache is not None:
                    found[node.cache.path] = None
        return tuple(found)

    @cached_property
    def layers(self) -> tuple[nn.Module, ...]:
        """The Linear-like modules that it calls."""
        return tuple(dict.fromkeys(node.layer for node in self.explanation.nodes if isinstance(node, Linear)))

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that run by their own forward."""
        return tuple(dict.fromkeys(node.module for node in self.explanation.nodes if isinstance(node, Inside)))

    def sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Batch and length of a call."""
        hidden: Tensor = get(self.explanation.hidden, args, kwargs)
        return (1, hidden.shape[0]) if self.explanation.dims == 2 else (hidden.shape[0], hidden.shape[1])

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what must have no zeros has none."""
        return all(bool(get(path, args, kwargs).all()) for path in self.explanation.ones)

    def reference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, computed in torch, step by step."""
        batch, length = self.sizes(args, kwargs)
        run = Run(batch, length, {}, {path: get(path, args, kwargs) for path in self.tables})
        for node in self.explanation.nodes:
            if isinstance(node, Input):
                run.values[node] = get(node.path, args, kwargs).reshape(batch * length, -1)
            else:
                run.values[node] = node.compute(run)
        return self.result({node: run.values[node] for node in self.outputs}, batch, length, args, kwargs)

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes that are parts of the result."""
        return tuple(dict.fromkeys(outputs_of(self.explanation.result)))

    def result(
        self, values: dict[Node, Tensor], batch: int, length: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call from the rows of its outputs."""
        shape = (batch, length) if self.explanation.dims == 3 else (length,)
        return _part(self.explanation.result, values, shape, (args, kwargs))

    def forget(self) -> None:
        """Frees the values that were watched; their shapes and dtypes stay."""
        for node in self.explanation.nodes:
            node.rows = torch.empty_like(node.rows, device="meta")

    def alike(self) -> Any:
        """Equal for programs that take the same time."""
        nodes = self.explanation.nodes
        schemes = [str(getattr(node.layer, "scheme", "")) for node in nodes if isinstance(node, Linear)]
        return self.steps(), tuple(node.rows.shape for node in nodes), tuple(schemes)

    def steps(self) -> str:
        """The steps in words, such as "4 linears, 1 attention, 2 norms"."""
        counts = Counter(_WORDS[type(node)] for node in self.explanation.nodes if type(node) in _WORDS)
        return ", ".join(f"{counts[word]} {word}{'s' if counts[word] > 1 else ''}" for word in _ORDER if counts[word])


# Not a function inside `result` that calls itself: one would refer to itself, and so keep what a call reads and returns
# until the next garbage collection.
def _part(form: Any, values: dict[Node, Tensor], shape: tuple[int, ...], given: Arguments) -> Any:
    """A part of the result of a call."""
    if isinstance(form, tuple):
        return tuple([_part(one, values, shape, given) for one in form])
    if isinstance(form, Record):
        return form.make(**{key: _part(one, values, shape, given) for key, one in form.fields})
    if isinstance(form, Given):
        return form.value if form.path is None else get(form.path, *given)
    ref, rows = form.ref, values[form.ref.node]
    value = (rows if ref.whole else rows[:, ref.offset : ref.offset + ref.width]).view(*shape, ref.width)
    return form.module(value) if isinstance(form, Applied) else value


_WORDS: dict[type[Node], str] = {
    Linear: "linear",
    Product: "dense linear",
    Attend: "attention",
    Norm: "norm",
    Activate: "activation",
    Rotate: "rotation",
    Add: "sum",
    Multiply: "product",
    Scale: "scaling",
    Lookup: "embedding",
    Inside: "module",
}
_ORDER = tuple(_WORDS.values())
