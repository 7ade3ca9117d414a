"""The result of `nybble.sensitivity`: data, table, JSON and plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ... import _moved
from ...evaluate.result import Metric
from ...text import Part, Shown, Table
from .plot import draw

SCHEMA = "nybble.sensitivity/1"
_SHOWN = 4  # outlier channels that a table names


@dataclass(frozen=True)
class Effect:
    """The effect of one scheme in one layer: harm to the model's output, SQNR of the weight in dB, and bytes."""

    harm: Metric
    sqnr_db: float | None
    nbytes: int


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    ``effects``: scheme -> its effect. ``outliers``: input channels above six times the median one, the largest first.
    ``peak``: the largest channel over the median one. ``left``: scheme -> why the layer cannot have it.
    """

    name: str
    shape: tuple[int, ...]
    effects: Mapping[str, Effect]
    outliers: tuple[int, ...]
    peak: float
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest harm of any scheme; a harm that is not finite counts as infinite."""
        values = [found.harm.value for found in self.effects.values()]
        return max(value if math.isfinite(value) else math.inf for value in values)

    @property
    def damage(self) -> Mapping[str, Effect]:
        """The old name of ``effects``."""
        _moved.renamed_since("LayerSensitivity.damage", "effects")
        return self.effects


@dataclass(frozen=True)
class Sensitivity(Shown):
    """The layers, the largest harm first. ``harm``: how it is measured, "kl" or "output". ``skipped``: reason -> batches that were left out."""

    layers: tuple[LayerSensitivity, ...]
    schemes: tuple[str, ...]
    harm: str
    skipped: Mapping[str, int] = field(default_factory=dict)

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        header = ["layer", "shape"]
        for scheme in self.schemes:
            header += [scheme, "dB"]
        header += ["peak", "outlier channels"]
        rows = [header, *(self._cells(layer) for layer in self.layers)]
        meaning = {"kl": "KL in nats per token", "output": "squared change of the output over its square"}[self.harm]
        foot = [f"columns of a scheme, in this layer alone: {meaning}; dB: SQNR of the weight"]
        foot.append("peak: largest input channel over the median one; outliers: channels above 6 times the median")
        foot += [f"{count} batches left out: {reason}" for reason, count in self.skipped.items()]
        return [Table(rows, {0, len(header) - 1}, cuts=range(2, len(header) - 1, 2)), *foot]

    def _cells(self, layer: LayerSensitivity) -> list[str]:
        cells = [layer.name, "x".join(map(str, layer.shape))]
        for scheme in self.schemes:
            found = layer.effects.get(scheme)
            cells += ["-", "-"] if found is None else [f"{found.harm.value:.2e}", _decibels(found.sqnr_db)]
        more = f" and {len(layer.outliers) - _SHOWN} more" if len(layer.outliers) > _SHOWN else ""
        return [*cells, f"{layer.peak:.1f}", ", ".join(map(str, layer.outliers[:_SHOWN])) + more]

    def to_json(self) -> str:
        """All fields as strict JSON; numbers that are not finite become strings such as "inf"."""
        return json.dumps({"schema": SCHEMA, **finite(self.fields())}, indent=2, allow_nan=False)

    def fields(self) -> dict[str, Any]:
        """All fields as plain data; for one release under their old names, too."""
        found = asdict(self)
        layers = [{**layer, "damage": layer["effects"]} for layer in found["layers"]]
        return {**found, "layers": layers, "damage": self.harm}

    @property
    def damage(self) -> str:
        """The old name of ``harm``."""
        _moved.renamed_since("Sensitivity.damage", "harm")
        return self.harm

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the harm of each scheme in each layer into a file of a format that matplotlib writes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        names = [layer.name for layer in self.layers]
        harm = {
            scheme: {layer.name: layer.effects[scheme].harm for layer in self.layers if scheme in layer.effects}
            for scheme in self.schemes
        }
        label = {"kl": "KL, nats per token", "output": "squared change of the output over its square"}[self.harm]
        draw(names, harm, label, path)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def finite(value: Any) -> Any:
    """The value with floats that are not finite replaced by strings, for strict JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


__getattr__ = _moved.old_names(__name__)
