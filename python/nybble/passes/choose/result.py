"""The result of `nybble.plan`: as data, table, JSON, recipe and plot."""

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
    """A choice: a scheme for each layer, the total bytes and milliseconds of these layers, and the harm.

    ``predicted``: the sum of the harms measured in each layer alone. ``measured``: the joint harm of all layers, or None
    if not measured. ``ms`` is None if nothing was timed.
    """

    schemes: Mapping[str, str]
    nbytes: int
    ms: float | None
    predicted: float
    measured: Metric | None = None


@dataclass(frozen=True)
class ChosenPlan(Shown):
    """The result of ``nybble.plan``.

    ``chosen``: the best of ``tried``, the measured choices. ``uniform``: one scheme for all layers, for each candidate.
    ``front``: the predicted Pareto front from the smallest (or fastest) choice to the least harm. ``sensitivity``: the
    harm of each scheme in each layer alone.
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
        """The recipe with which ``nybble.optimize`` applies the plan, with the arguments that it was measured with."""
        known = {"versions": dict(self.versions), "data_sha256": self.data_sha256}
        passes = {name: {"goal": "memory", **arguments} for name, arguments in self.arguments.items()}
        return Recipe.of_schemes(
            dict(self.chosen.schemes), quantize=passes["quantize"], sparsify=passes["sparsify"], **known
        )

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        names = list(self.uniform)
        rows = [["layer", "scheme", *names]]
        alone = {layer.name: layer.effects for layer in self.sensitivity.layers}
        for name, scheme in self.chosen.schemes.items():
            harms = alone.get(name, {})
            rows.append([name, scheme, *(f"{harms[n].harm.value:.2e}" if n in harms else "-" for n in names)])
        points = [["", "bytes", f"ms at M={self.m}", "harm predicted", "measured"]]
        points += [_cells(f"all {name}", point) for name, point in self.uniform.items()]
        points += [_cells("chosen", self.chosen)]
        foot = f"budget: {self.kind} <= {self.limit:.6g}; harm: {self.sensitivity.harm}, above: of each layer alone"
        return [Table(rows, {0, 1}), Table(points), foot]

    def to_json(self) -> str:
        """All fields and the recipe as strict JSON; numbers that are not finite become strings such as "inf"."""
        fields = {name: value for name, value in asdict(self).items() if name != "arguments"}
        fields["sensitivity"] = self.sensitivity.fields()
        data = {"schema": SCHEMA, **fields, "recipe": self.recipe.to_dict()}
        return json.dumps(finite(data), indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the front, the uniform schemes and the choice into a file of a format that matplotlib writes.

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
