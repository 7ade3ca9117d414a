"""What fuse did: the chains, and what was left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from ..report.fold import fold_names
from ..text import Items, Part, Shown, Table, span
from .block import Fused, unfuse
from .search import Search


@dataclass(frozen=True)
class Chain:
    """A fused module: its name, its steps in words, how many of them are compiled, and how much faster it is."""

    name: str
    steps: str
    compiled: int
    speed: float | None
    undone: str | None = None


@dataclass(frozen=True)
class Left:
    """A module that runs as before, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusionReport(Shown):
    """The chains of a model, and the modules that were left."""

    chains: tuple[Chain, ...]
    left: tuple[Left, ...]
    model: nn.Module

    @staticmethod
    def of(search: Search) -> FusionReport:
        """The report of a finished search."""
        chains = tuple(chain_of(name, fused) for name, fused in search.found.items())
        left = tuple(Left(name, reason) for name, reason in search.left.items())
        return FusionReport(chains, left, search.model)

    def undo(self) -> None:
        """Gives the modules their own forward back."""
        unfuse(self.model)

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        if not self.chains:
            return ["No module runs fused.", *self._left()]
        rows = [("module", "steps", "compiled", "speedup"), *map(_row, _same(self.chains))]
        return [f"{len(self.chains)} modules run fused:", Table(rows, left=(0, 1)), *self._left()]

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
            "chains": [asdict(chain) for chain in self.chains],
            "left": [asdict(one) for one in self.left],
        }
        return json.dumps(whole, indent=2, allow_nan=False)


def chain_of(name: str, fused: Fused) -> Chain:
    """What a fused module runs: its first kind of call."""
    lowered = next(one for one in fused.kinds.values() if not isinstance(one, str))
    speed = None if lowered.speed is None else lowered.speed.ratio
    return Chain(name, lowered.program.steps(), lowered.compiled, speed, fused.undone)


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
