"""A scheme for each layer and why, as data, as a table, as JSON, as a recipe and as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from ...evaluate.result import Metric
from ...recipe.recipe import Recipe
from ...text import Part, Shown, Table
from ..sensitivity.result import Sensitivity, finite
from .plot import Chart, draw

SCHEMA = "nybble.plan/1"


@dataclass(frozen=True)
class Point:
    """A scheme for each layer: bytes of the weights that are chosen for, milliseconds at M, and harm.

    ``predicted``: the sum of what each layer does alone; ``measured``: what all of them do together, None where that was
    not measured. ``ms`` is None where no time was.
    """

    schemes: Mapping[str, str]
    nbytes: int
    ms: float | None
    predicted: float
    measured: Metric | None = None


@dataclass(frozen=True)
class ChosenPlan(Shown):
    """What ``nybble.plan`` chose.

    ``chosen`` is the measured best of ``tried``; ``uniform`` holds each candidate on all layers; ``front`` the points
    from the smallest (or fastest) to the least harm, by prediction; ``sensitivity`` what each layer does alone.
    """

    kind: str
    limit: float
    m: int
    chosen: Point
    tried: tuple[Point, ...]
    uniform: Mapping[str, Point]
    front: tuple[Point, ...]
    sensitivity: Sensitivity
    arguments: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    data_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """What ``nybble.optimize`` makes the plan of, by the passes' arguments that it was measured with."""
        known = {"versions": dict(self.versions), "data_sha256": self.data_sha256}
        passes = {name: {"goal": "memory", **arguments} for name, arguments in self.arguments.items()}
        return Recipe.of_schemes(
            dict(self.chosen.schemes), quantize=passes["quantize"], sparsify=passes["sparsify"], **known
        )

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        names = list(self.uniform)
        rows = [["layer", "scheme", *names]]
        alone = {layer.name: layer.damage for layer in self.sensitivity.layers}
        for name, scheme in self.chosen.schemes.items():
            harms = alone.get(name, {})
            rows.append([name, scheme, *(f"{harms[n].harm.value:.2e}" if n in harms else "-" for n in names)])
        points = [["", "bytes", f"ms at M={self.m}", "harm predicted", "measured"]]
        points += [_cells(f"all {name}", point) for name, point in self.uniform.items()]
        points += [_cells("chosen", self.chosen)]
        foot = f"budget: {self.kind} <= {self.limit:.6g}; harm: {self.sensitivity.damage}, of a layer alone above"
        return [Table(rows, {0, 1}), Table(points), foot]

    def to_json(self) -> str:
        """Everything as strict JSON, the recipe too; what is not finite is a string such as "inf"."""
        fields = {name: value for name, value in asdict(self).items() if name != "arguments"}
        data = {"schema": SCHEMA, **fields, "recipe": self.recipe.to_dict()}
        return json.dumps(finite(data), indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the front, the uniform schemes and the choice into a file that matplotlib can write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        timed = self.kind == "ms"
        unit = 1.0 if timed else 1e6

        def cost(point: Point) -> float:
            return ((point.ms or 0.0) if timed else point.nbytes) / unit

        def measured(point: Point) -> tuple[float, float]:
            return cost(point), point.predicted if point.measured is None else point.measured.value

        chart = Chart(
            front=[(cost(point), point.predicted) for point in self.front],
            uniform={name: measured(point) for name, point in self.uniform.items()},
            tried=[measured(point) for point in self.tried],
            chosen=measured(self.chosen),
            limit=None if self.kind == "harm" else self.limit / unit,
            cost_label=f"ms at M={self.m}" if timed else "MB of weights",
        )
        draw(chart, path)


def _cells(name: str, point: Point) -> list[str]:
    measured = "-" if point.measured is None else str(point.measured)
    return [name, str(point.nbytes), "-" if point.ms is None else f"{point.ms:.3f}", f"{point.predicted:.3e}", measured]
