"""What fuse did: the chains, and what was left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..report.fold import fold_names
from ..text import Items, Part, Shown, Table, span
from .block import Fused, unfuse
from .lower import Int8Attention, Lowered
from .search import Search


@dataclass(frozen=True)
class Chain:
    """A fused module: its name, its steps in words, how many of them are compiled, and how much faster it is.

    int8: what attention in 8 bits changes, at most, in all kinds of calls so far; None: it attends in floats.
    """

    name: str
    steps: str
    compiled: int
    speed: float | None
    undone: str | None = None
    int8: Int8Attention | None = None


@dataclass(frozen=True)
class Left:
    """A module that runs as before, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusionReport(Shown):
    """The chains of a model, and the modules that were left: as they are when they are asked for, since chains may be
    found in later calls, or undone."""

    search: Search

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The modules that run fused."""
        return tuple(chain_of(name, fused) for name, fused in self.search.found.items())

    @property
    def left(self) -> tuple[Left, ...]:
        """The modules that run as before."""
        return tuple(Left(name, reason) for name, reason in self.search.left.items())

    @property
    def pending(self) -> bool:
        """Whether the first calls of the model, in which chains are found, are still to come."""
        return bool(self.search.frontier)

    def undo(self) -> None:
        """Gives the modules their own forward back."""
        self.search.stop()
        unfuse(self.search.model)
        self.search.found.clear()

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        if self.pending:
            return ["Chains of layers are looked for in the first calls without gradients, in eval mode."]
        if not self.chains:
            return ["No module runs fused.", *self._left()]
        rows = [("module", "steps", "compiled", "speedup"), *map(_row, _same(self.chains))]
        undone = [f"{chain.name}: undone, {chain.undone}" for chain in self.chains if chain.undone]
        table = Table(rows, left=(0, 1))
        return [f"{len(self.chains)} modules run fused:", *undone, table, *self._int8(), *self._left()]

    def _int8(self) -> Sequence[Part]:
        known = [chain for chain in self.chains if chain.int8 is not None]
        rounded = [chain.int8 for chain in known if chain.int8 is not None and chain.int8.left is None]
        lines = [
            f"{chain.name or 'the model itself'}: {chain.int8.left}"
            for chain in known
            if chain.int8 and chain.int8.left
        ]
        if rounded:
            error, cosine = max(one.error for one in rounded), min(one.cosine for one in rounded)
            lines = [
                f"{len(rounded)} modules: relative error of their results at most {error:.2g}, cosine at least {cosine:.5f}",
                *lines,
            ]
        return [Items.dashed("Attention in 8 bits, against attention in floats:", lines)] if lines else []

    def _left(self) -> Sequence[Part]:
        by_reason: dict[str, list[str]] = {}
        for one in self.left:
            by_reason.setdefault(one.reason, []).append(one.name or "the model itself")
        lines = [f"{', '.join(fold_names(names))}: {reason}" for reason, names in by_reason.items()]
        return [Items.dashed("Not fused as a whole:", lines)] if lines else []

    def to_json(self) -> str:
        """The report as strict JSON."""
        whole = {
            "schema": "nybble.fusion/1",
            "pending": self.pending,
            "chains": [asdict(chain) for chain in self.chains],
            "left": [asdict(one) for one in self.left],
        }
        return json.dumps(whole, indent=2, allow_nan=False)


def chain_of(name: str, fused: Fused) -> Chain:
    """What a fused module runs: its first kind of call."""
    lowered = fused.first
    assert lowered is not None, "only such modules are found"  # noqa: S101
    speed = None if lowered.speed is None else lowered.speed.ratio
    return Chain(name, lowered.program.steps(), lowered.compiled, speed, fused.undone, _int8_of(fused))


def _int8_of(fused: Fused) -> Int8Attention | None:
    kinds = [one for several in fused.kinds.values() for one in several if isinstance(one, Lowered)]
    found = [one.int8 for one in kinds if one.int8 is not None]
    if not found:
        return None
    left = next((one.left for one in found if one.left is not None), None)
    return Int8Attention(max(one.error for one in found), min(one.cosine for one in found), left)


def _same(chains: Sequence[Chain]) -> list[list[Chain]]:
    """The chains in groups with the same steps."""
    groups: dict[tuple[str, int], list[Chain]] = {}
    for chain in chains:
        groups.setdefault((chain.steps, chain.compiled), []).append(chain)
    return list(groups.values())


def _row(group: Sequence[Chain]) -> tuple[str, str, str, str]:
    speeds = [chain.speed for chain in group if chain.speed is not None]
    shown = f"{span(speeds, '.2f')}x" if speeds else "-"
    names = ", ".join(fold_names(chain.name for chain in group))
    return names or "the model itself", group[0].steps, str(group[0].compiled), shown
