"""The steps of a compiled chain: which nodes one step computes together.

A linear step takes the norm before it as its prologue, and the elementwise nodes after it as its epilogue: activation,
product with another value, residual. Linear layers with one input are one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .nodes import IDENTITY, Activate, Add, Attend, Linear, Multiply, Node, Norm, Ref, Rotate
from .program import Program


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes of a program that one compiled chain computes, each after its inputs; ``outputs`` are those used elsewhere."""

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


def uses_of(program: Program) -> dict[Node, list[Node | None]]:
    """The nodes that use each node; None stands for the result."""
    nodes = program.explanation.nodes
    uses: dict[Node, list[Node | None]] = {node: [] for node in nodes}
    for node in nodes:
        for ref in node.inputs():
            uses[ref.node].append(node)
    for node in program.outputs:
        uses[node].append(None)
    return uses


@dataclass(eq=False)
class Slot:
    """A matrix (rows, width) of a chain. ``node``: whose value it holds."""

    node: Node
    number: int = -1

    @property
    def width(self) -> int:
        return self.node.width


@dataclass(frozen=True, eq=False)
class Weight:
    """A layer of a linear step: y = act(x w^T + bias) * other + residual."""

    linear: Linear
    y: Slot
    act: str
    other: Slot | None
    residual: Slot | None


@dataclass(frozen=True, eq=False)
class Step:
    """A call of a method of _C.Chain: ``options`` with Slots in place of numbers."""

    method: str
    options: dict[str, Any]
    weights: tuple[Weight, ...] = ()

    def slots(self) -> list[Slot]:
        """What it reads and writes."""
        found = [value for value in self.options.values() if isinstance(value, Slot)]
        for weight in self.weights:
            found += [slot for slot in (weight.y, weight.other, weight.residual) if slot is not None]
        return found


@dataclass(frozen=True, eq=False)
class Tail:
    """A linear node, and the elementwise nodes after it that its step also computes; the last is what is written."""

    linear: Linear
    act: str = IDENTITY
    other: Ref | None = None
    residual: Ref | None = None
    last: Node | None = None


@dataclass(eq=False)
class Plan:
    """The steps of a segment, in order, and the tables that they read."""

    segment: Segment
    steps: list[Step] = field(default_factory=list)
    slots: dict[Node, Slot] = field(default_factory=dict)
    tables: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inside = set(self.segment.nodes)
        self.users: dict[Node, list[Node | None]] = {node: [] for node in self.inside}
        for node in self.segment.nodes:
            for ref in node.inputs():
                self.users.setdefault(ref.node, []).append(node)
        for node in self.segment.outputs:
            self.users[node].append(None)
        self.tails: dict[Linear, Tail] = {}
        self.roots: dict[Node | None, Linear] = {}  # by the last node of its tail
        for node in self.segment.nodes:
            if isinstance(node, Linear):
                tail = self.tails[node] = self.tail(node)
                self.roots[tail.last] = node
        for node in self.segment.outputs:
            self.emit(node)

    # --- which nodes a linear step computes ---

    def tail(self, linear: Linear) -> Tail:
        act, other, residual = IDENTITY, None, None
        last: Node = linear
        while (user := self.only_user(last)) is not None:
            if isinstance(user, Activate) and act == IDENTITY and other is None and residual is None:
                act = user.act
            elif isinstance(user, (Multiply, Add)) and residual is None:
                partner = user.b if user.a.node is last else user.a
                if user in self.roots or partner.node is last or self.needs(partner.node, linear):
                    break
                if isinstance(partner.node, Activate) and isinstance(partner.node.x.node, Linear):
                    break  # that layer's step computes its activation, then the product
                if isinstance(user, Add):
                    residual = partner
                elif other is None:
                    other = partner
                else:
                    break
            else:
                break
            last = user
        return Tail(linear, act, other, residual, last)

    def only_user(self, node: Node) -> Node | None:
        users = self.users.get(node, [])
        return users[0] if len(users) == 1 else None

    def needs(self, node: Node, other: Node) -> bool:
        """Whether a node is computed from another."""
        seen, left = {node}, [node]
        while left:
            if (one := left.pop()) is other:
                return True
            before = {ref.node for ref in one.inputs()} if one in self.inside else set()
            left += before - seen
            seen |= before
        return False

    # --- steps ---

    def slot(self, ref: Ref) -> Slot:
        """The matrix that holds a value, computed if it is not yet."""
        self.emit(ref.node)
        return self.slots[ref.node]

    def emit(self, node: Node) -> None:
        if node in self.slots:
            return
        if node not in self.inside:
            self.slots[node] = Slot(node)
        elif node in self.roots:
            self.linears(self.roots[node])
        else:
            _EMIT[type(node)](self, node)

    def new(self, node: Node) -> Slot:
        self.slots[node] = Slot(node)
        return self.slots[node]

    def linears(self, linear: Linear) -> None:
        """One step for all linear nodes with the same input that can be computed now."""
        x = linear.x
        alike = [one for one in self.tails if one.x == x and self.tails[one].last not in self.slots]
        together = [one for one in alike if one is linear or self.free(one, alike)]
        for one in together:
            for ref in self.operands(one):
                if not self.inside_step(ref, together):
                    self.emit(ref.node)
        options: dict[str, Any] = self.prologue(x)
        last = [one for one in together if any(self.inside_step(ref, together) for ref in self.operands(one))]
        weights = []
        for one in [*(one for one in together if one not in last), *last]:
            tail = self.tails[one]
            assert tail.last is not None  # noqa: S101
            other, residual = (None if ref is None else self.slots[ref.node] for ref in (tail.other, tail.residual))
            weights.append(Weight(one, self.new(tail.last), tail.act, other, residual))
        self.steps.append(Step("add_linears", options, tuple(weights)))

    def operands(self, linear: Linear) -> list[Ref]:
        tail = self.tails[linear]
        return [ref for ref in (tail.other, tail.residual) if ref is not None]

    def inside_step(self, ref: Ref, together: list[Linear]) -> bool:
        return self.roots.get(ref.node) in together

    def free(self, linear: Linear, alike: list[Linear]) -> bool:
        """Whether what its tail needs is computed by its own step, or does not depend on it."""
        roots = [self.tails[one].last for one in alike]
        return all(
            ref.node in self.slots or ref.node in roots or not any(self.needs(ref.node, one) for one in alike)
            for ref in self.operands(linear)
        )

    def prologue(self, x: Ref) -> dict[str, Any]:
        """The norm before a linear step as a part of it, if its value is not there yet."""
        norm = x.node
        if norm in self.slots or norm not in self.inside or not isinstance(norm, Norm) or not x.whole:
            return {"x": self.slot(x)}
        options = self.normed(norm)
        if any(not isinstance(user, Linear) for user in self.users[norm]):
            options["normed"] = self.new(norm)
        return {**options, "norm": norm.norm}

    def normed(self, norm: Norm) -> dict[str, Any]:
        """What a norm reads: a value, or the sum of two, which is kept if it is used elsewhere."""
        add = norm.x.node
        if not isinstance(add, Add) or add not in self.inside or add in self.slots or add in self.roots:
            return {"x": self.slot(norm.x)}
        options = {"x": self.slot(add.a), "residual": self.slot(add.b)}
        if len(self.users[add]) > 1:
            options["sum"] = self.new(add)
        return options

    def norm(self, node: Norm) -> None:
        options = self.normed(node)
        self.steps.append(Step("add_norm", {**options, "y": self.new(node), "norm": node.norm}))

    def add(self, node: Add) -> None:
        options = {"x": self.slot(node.a), "residual": self.slot(node.b)}
        self.steps.append(Step("add_norm", {**options, "y": self.new(node), "norm": None}))

    def activate(self, node: Activate) -> None:
        x = self.slot(node.x)
        self.steps.append(Step("add_activate", {"x": x, "y": self.new(node), "act": node.act}))

    def multiply(self, node: Multiply) -> None:
        a, b, act = node.a, node.b, IDENTITY
        if isinstance(a.node, Activate) and self.users.get(a.node) == [node] and a.node not in self.slots:
            act, a = a.node.act, a.node.x
        x, other = self.slot(a), self.slot(b)
        self.steps.append(Step("add_activate", {"x": x, "y": self.new(node), "act": act, "other": other}))

    def rotate(self, node: Rotate) -> None:
        norm = node.x.node if isinstance(node.x.node, Norm) and node.x.node.heads > 1 else None
        x = node.x if norm is None else norm.x
        options = {"x": self.slot(x), "offset": x.offset, "heads": node.heads, "interleaved": node.interleaved}
        options |= {"cos": self.table(node.cos), "sin": self.table(node.sin), "norm": norm and norm.norm}
        self.steps.append(Step("add_rotate", {**options, "y": self.new(node)}))

    def attend(self, node: Attend) -> None:
        cached = node.cache is not None
        q = self.slot(node.q)
        k, v = (self.table((node, side)) if cached else self.slot(ref) for side, ref in enumerate((node.k, node.v)))
        offsets = {"k_offset": node.k.offset, "v_offset": node.v.offset}
        scales = {"k_scale": 2, "v_scale": 3}
        beside = {name: self.table((node, side)) for name, side in scales.items()} if cached else offsets
        options = {"q": q, "k": k, "v": v, "heads": node.heads, "kv_heads": node.kv_heads, "scale": node.scale}
        options |= {"head_dim": node.q.width // node.heads, "q_offset": node.q.offset, **beside}
        options |= {
            "int8": node.int8,
            "causal": node.causal,
            "cached": cached,
            "mask": -1 if node.mask is None else self.table(node.mask),
        }
        self.steps.append(Step("add_attention", {**options, "y": self.new(node)}))

    def table(self, key: Any) -> int:
        """The number of a table: a path, a Mask, or the side of a cache."""
        if key not in self.tables:
            self.tables.append(key)
        return self.tables.index(key)


_EMIT: dict[type[Node], Any] = {
    Norm: Plan.norm,
    Add: Plan.add,
    Activate: Plan.activate,
    Multiply: Plan.multiply,
    Rotate: Plan.rotate,
    Attend: Plan.attend,
}


def number(plan: Plan) -> tuple[list[Slot], list[int]]:
    """Numbers the slots: first those of values from and for elsewhere, which it returns; others use memory again when
    their values are not needed any more. Also returns the widths by number."""
    elsewhere = [slot for node, slot in plan.slots.items() if node not in plan.inside or node in plan.segment.outputs]
    for i, slot in enumerate(elsewhere):
        slot.number = i
    widths = [slot.width for slot in elsewhere]
    last = {slot: i for i, step in enumerate(plan.steps) for slot in step.slots()}
    free: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        for slot in step.slots():
            if slot.number < 0:
                spare = free.get(slot.width)
                slot.number = spare.pop() if spare else len(widths)
                if slot.number == len(widths):
                    widths.append(slot.width)
        for slot in dict.fromkeys(step.slots()):
            if last[slot] == i and slot not in elsewhere:
                free.setdefault(slot.width, []).append(slot.number)
    return elsewhere, widths
