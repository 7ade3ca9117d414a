"""From a program to parts that run: compiled chains, and what torch computes between them.

Torch runs what a chain cannot: dense linear layers, and the update of a cache of keys and values.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..dispatch.selection import compiled_plan, row_starts
from ..nn.module import QuantizedModule
from ..report.speed import Speed
from . import padding
from .arguments import get
from .chain import BoundChain
from .nodes import Activate, Add, Attend, Input, Linear, Multiply, Node, Norm, Rotate, Run
from .program import Program
from .steps import Segment, uses_of


@dataclass(frozen=True, eq=False)
class Update:
    """The update of a cache, before the attention that reads it.

    ``tables[node, 0]`` are the keys, 1 the values; 2 and 3 their scales if the cache gives int8 codes, else None.
    """

    attend: Attend

    def run(self, run: Run) -> None:
        """Puts new keys and values into the cache, and all that it holds into the tables of the run."""
        node = self.attend
        new = (run.heads(node.k, node.kv_heads), run.heads(node.v, node.kv_heads))
        assert node.cache is not None  # noqa: S101
        run.tables[node, 2] = run.tables[node, 3] = None
        for side, held in enumerate(node.held(run.tables[node.cache.path], *new)):
            # As torch's attention of as many queries as keys, where the cache has a fixed size.
            held = held[:, :, : run.length] if node.causal and run.length > 1 else held
            run.tables[node, side] = held if held.stride(-1) == 1 else held.contiguous()


@dataclass(frozen=True)
class Int8Attention:
    """What attention in 8 bits changes in the results of a module: the largest relative error and the least cosine, over
    the inputs of the proof, to the same chain with attention in floats. left: why it attends in floats after all."""

    error: float
    cosine: float
    left: str | None = None


@dataclass(eq=False)
class Lowered:
    """A program in parts."""

    program: Program
    parts: list[Segment | Update | Node]
    starts: list[int]  # numbers of rows from which on other kernels may serve the layers
    chains: dict[tuple[int, int], BoundChain] = field(default_factory=dict)
    speed: Speed | None = None  # over the module's own forward, if it was measured
    skips: bool = False  # whether rows of padding are left out
    int8: Int8Attention | None = None  # what its attention in 8 bits changes, where that was asked for

    @cached_property
    def inputs(self) -> list[Input]:
        """The tensors of a call that are read as rows."""
        return [node for node in self.program.explanation.nodes if isinstance(node, Input)]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call; NotImplemented for one that the program does not fit."""
        program = self.program
        batch, length = program.sizes(args, kwargs)
        rows = batch * length
        if rows == 0 or not program.fits(args, kwargs):
            return NotImplemented
        run = Run(batch, length, {}, {path: get(path, args, kwargs) for path in program.tables})
        for node in self.inputs:
            value = get(node.path, args, kwargs).reshape(rows, -1)
            if value.shape[1] != node.width:
                return NotImplemented
            plain = value.stride(1) == 1 and value.stride(0) >= node.width
            run.values[node] = value if plain else value.contiguous()
        groups = padding.groups(program, run) if self.skips and not program.modules else []
        if not groups:
            self._compute(run)
            return program.result(run.values, batch, length, args, kwargs)
        values: dict[Node, Tensor] = {}
        for group in groups:
            part = padding.taken(program, run, group)
            self._compute(part)
            padding.put(values, run, group, part, program.outputs)
        return program.result(values, batch, length, args, kwargs)

    def _compute(self, run: Run) -> None:
        """The values of all nodes that later parts or the result need."""
        rows = run.batch * run.length
        kernels = bisect_right(self.starts, rows)
        for number, part in enumerate(self.parts):
            if isinstance(part, Segment):
                chain = self.chains.get((number, kernels))
                if chain is None or chain.stale():
                    chain = self.chains[number, kernels] = BoundChain(part, rows)
                chain.run(run)
            elif isinstance(part, Update):
                part.run(run)
            else:
                run.values[part] = part.compute(run)

    def attend_in_int8(self, wanted: bool) -> None:
        """Lets the attention of its chains multiply codes of 8 bits, or floats."""
        for node in self.program.explanation.nodes:
            if isinstance(node, Attend):
                node.int8 = wanted
        self.chains.clear()

    @property
    def calls(self) -> int:
        """How many compiled chains it has run so far."""
        return len(self.chains)

    @property
    def compiled(self) -> int:
        """How many of the nodes run in compiled chains."""
        return sum(len(part.nodes) for part in self.parts if isinstance(part, Segment))


def lower(program: Program) -> Lowered:
    """The parts of a program, as few as possible: all that compiled steps can do, then what torch must do, and so on."""
    nodes = program.explanation.nodes
    uses = uses_of(program)
    done: set[Node | tuple[Node, str]] = {node for node in nodes if isinstance(node, Input)}
    parts: list[Segment | Update | Node] = []
    left = [node for node in nodes if node not in done]

    # Elsewhere torch computes the attention, and updates the cache itself.
    cached = [node for node in nodes if isinstance(node, Attend) and node.cache is not None and _compiles(node, uses)]

    def ready(node: Node) -> bool:
        needs_cache = node in cached and (node, "cache") not in done
        return not needs_cache and all(ref.node in done for ref in node.inputs())

    while left:
        segment = []
        for node in left:
            if ready(node) and _compiles(node, uses):
                segment.append(node)
                done.add(node)
        if segment:
            parts.append(Segment(tuple(segment), tuple(node for node in segment if _leaves(node, segment, uses))))
            left = [node for node in left if node not in done]
            continue
        updates = [node for node in left if node in cached]
        for node in [one for one in updates if all(ref.node in done for ref in one.inputs())]:
            parts.append(Update(node))
            done.add((node, "cache"))
        for node in [one for one in left if ready(one) and not _compiles(one, uses)]:
            parts.append(node)
            done.add(node)
        left = [node for node in left if node not in done]
    dtypes = {node.rows.dtype for node in nodes}
    schemes = {layer.scheme for layer in program.layers if isinstance(layer, QuantizedModule)}
    starts = sorted({start for scheme in schemes for dtype in dtypes for start in row_starts(scheme, dtype)})
    return Lowered(program, parts, starts)


def _leaves(node: Node, segment: list[Node], uses: dict[Node, list[Node | None]]) -> bool:
    """Whether a node is used outside of its segment: by later parts, by the update of a cache, or as a result."""
    inside = set(segment)
    return any(
        user is None
        or user not in inside
        or (isinstance(user, Attend) and user.cache is not None and _cached(user, node))
        for user in uses[node]
    )


def _cached(attend: Attend, node: Node) -> bool:
    return node in (attend.k.node, attend.v.node)


def _compiles(node: Node, uses: dict[Node, list[Node | None]]) -> bool:
    """Whether a compiled step computes a node."""
    if node.rows.device.type != "cpu":
        return False
    if isinstance(node, Linear):
        return node.x.whole and _plan(node, 1) is not None
    if isinstance(node, Norm):
        of_heads = node.norm.kind == "rms" and bool(uses[node]) and all(isinstance(one, Rotate) for one in uses[node])
        return node.x.whole if node.heads == 1 else of_heads
    if isinstance(node, (Activate, Add, Multiply)):
        return all(ref.whole for ref in node.inputs())
    return isinstance(node, (Rotate, Attend))


def _plan(node: Linear, rows: int) -> Any:
    """The compiled kernels of a layer for a number of rows, or None."""
    layer = node.layer
    if not isinstance(layer, QuantizedModule) or layer.device.type != "cpu":
        return None
    _, layout = layer._pack()
    return compiled_plan(str(layer.scheme), layout, (layer.out_features, layer.in_features), node.rows.dtype, rows)
