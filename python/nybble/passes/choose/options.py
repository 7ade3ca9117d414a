"""The candidate schemes of each layer with their bytes, milliseconds and harm, and choices among them.

A choice is the index of one candidate for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..sensitivity.variants import Unit
from . import solve
from .solve import Option

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """One scheme of a layer: bytes of its weight, milliseconds (None: not measured), harm measured in it alone."""

    scheme: str
    nbytes: float
    ms: float | None
    harm: float

    def value(self, kind: str) -> float:
        """The value of a kind: "bytes", "ms" or "harm"."""
        found = {"bytes": self.nbytes, "ms": self.ms, "harm": self.harm}[kind]
        assert found is not None, "ms was measured"  # noqa: S101
        return found


@dataclass(frozen=True)
class Menu:
    """The candidates of every layer that has any, in the order of the model."""

    units: Sequence[Unit]
    candidates: Sequence[Sequence[Candidate]]

    def table(self, cost: str, harm: str = "harm") -> list[list[Option]]:
        """The input of the solver: cost and harm of each candidate."""
        return [[Option(one.value(cost), one.value(harm)) for one in own] for own in self.candidates]

    def picked(self, choice: Sequence[int]) -> list[Candidate]:
        """The candidates of a choice."""
        return [own[index] for own, index in zip(self.candidates, choice, strict=True)]

    def sum(self, choice: Sequence[int], kind: str) -> float:
        """Total bytes, milliseconds or harm of a choice."""
        return math.fsum(one.value(kind) for one in self.picked(choice))

    def uniform(self, scheme: str) -> tuple[int, ...]:
        """The choice of one scheme for all layers; those that cannot have it stay dense.

        Raises ValueError if no layer can have it.
        """
        found = []
        for own in self.candidates:
            names = [one.scheme for one in own]
            found.append(names.index(scheme if scheme in names else DENSE))
        if all(one.scheme == DENSE for one in self.picked(found)) and scheme != DENSE:
            raise ValueError(f"budget: no layer of the model can have the scheme {scheme!r}")
        return tuple(found)

    def placed(self, choice: Sequence[int]) -> list[tuple[Unit, str]]:
        """The units that a choice changes, with the scheme of each."""
        chosen = zip(self.units, self.picked(choice), strict=True)
        return [(unit, one.scheme) for unit, one in chosen if one.scheme != DENSE]

    def schemes(self, choice: Sequence[int]) -> dict[str, str]:
        """Module name -> scheme for every layer."""
        chosen = zip(self.units, self.picked(choice), strict=True)
        return {site.name: one.scheme for unit, one in chosen for site in unit.sites}


def best(menu: Menu, kind: str, limit: float, count: int, save: str) -> list[tuple[int, ...]]:
    """Up to ``count`` choices of least harm within a limit of bytes or ms; with a limit of harm, of least ``save``.

    Raises:
        ValueError: no choice is within the limit; the message gives the cost of the cheapest.
    """
    return solve.best(menu.table(kind, save if kind == "harm" else "harm"), limit, count)


def front(menu: Menu, kind: str, points: int = 24) -> list[tuple[int, ...]]:
    """Pareto-optimal choices from the cheapest to the least harm, at most ``points`` of them."""
    layers = menu.table(kind)
    low = solve.least_cost(layers)
    high = math.fsum(max(option.cost for option in own) for own in layers)
    found: list[tuple[int, ...]] = []
    for step in range(points):
        choice = solve.exact(layers, low + (high - low) * (step / (points - 1)) ** 2)[0]
        if not found or solve.total(layers, choice).harm < solve.total(layers, found[-1]).harm:
            found.append(choice)
    return found
