"""Which layers suffer from which scheme, as data, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...evaluate.result import Metric
from ...text import Part, Shown, Table
from .plot import draw

SCHEMA = "nybble.sensitivity/1"
_SHOWN = 4  # outlier channels that a table names


@dataclass(frozen=True)
class Damage:
    """What one scheme does in one layer: to the model's output, to the weight (signal over noise), and its bytes."""

    harm: Metric
    sqnr_db: float | None
    nbytes: int


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. ``outliers``: its input channels above six times the median one, the largest first; ``peak``: the
    largest over the median one; ``left``: scheme -> why the layer cannot have it."""

    name: str
    shape: tuple[int, ...]
    damage: Mapping[str, Damage]
    outliers: tuple[int, ...]
    peak: float
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The greatest harm that one of the schemes does; what is not finite is the greatest."""
        values = [found.harm.value for found in self.damage.values()]
        return max(value if math.isfinite(value) else math.inf for value in values)


@dataclass(frozen=True)
class Sensitivity(Shown):
    """The layers, the one that suffers most first. ``damage`` is the measure, see ``nybble.sensitivity``."""

    layers: tuple[LayerSensitivity, ...]
    schemes: tuple[str, ...]
    damage: str
    skipped: Mapping[str, int] = field(default_factory=dict)

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        header = ["layer", "shape"]
        for scheme in self.schemes:
            header += [scheme, "dB"]
        header += ["peak", "outlier channels"]
        rows = [header, *(self._cells(layer) for layer in self.layers)]
        meaning = {"kl": "KL in nats a token", "output": "squared change of the output over its square"}[self.damage]
        foot = [f"of each scheme in this layer alone: {meaning}, and the weight's signal over noise in dB"]
        foot.append("peak: largest input channel over the median one; outliers: channels above 6 times the median")
        foot += [f"{count} batches left out: {reason}" for reason, count in self.skipped.items()]
        return [Table(rows, {0, len(header) - 1}, cuts=range(2, len(header) - 1, 2)), *foot]

    def _cells(self, layer: LayerSensitivity) -> list[str]:
        cells = [layer.name, "x".join(map(str, layer.shape))]
        for scheme in self.schemes:
            found = layer.damage.get(scheme)
            cells += ["-", "-"] if found is None else [f"{found.harm.value:.2e}", _decibels(found.sqnr_db)]
        more = f" and {len(layer.outliers) - _SHOWN} more" if len(layer.outliers) > _SHOWN else ""
        return [*cells, f"{layer.peak:.1f}", ", ".join(map(str, layer.outliers[:_SHOWN])) + more]

    def to_json(self) -> str:
        """Everything as strict JSON; what is not finite is a string such as "inf"."""
        return json.dumps({"schema": SCHEMA, **finite(asdict(self))}, indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the harm of each scheme in each layer, in the model's words, into a file that matplotlib can write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        names = [layer.name for layer in self.layers]
        harm = {
            scheme: {layer.name: layer.damage[scheme].harm for layer in self.layers if scheme in layer.damage}
            for scheme in self.schemes
        }
        label = {"kl": "KL, nats a token", "output": "squared change of the output over its square"}[self.damage]
        draw(names, harm, label, path)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def finite(value: Any) -> Any:
    """The value with what JSON cannot hold as text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
