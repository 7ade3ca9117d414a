"""What rounding took of adapters that were merged into quantized layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from weakref import WeakKeyDictionary

from torch import nn

from ..nn import Linear
from ..text import Part, Shown, Table


@dataclass(frozen=True)
class MergedLayer:
    """A layer with merged adapters.

    weight_db: 10 log10 of the sum of squares of the merged weight to that of its rounding error. change_db: likewise of
    what the adapters add, which is lost below 0.
    """

    name: str
    scheme: str
    adapters: tuple[str, ...]
    weight_db: float
    change_db: float


@dataclass(frozen=True)
class MergeReport(Shown):
    """The layers of a model into which adapters were merged, in its order."""

    layers: tuple[MergedLayer, ...]

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        rows = [("layer", "scheme", "adapters", "weight dB", "change dB")]
        for row in self.layers:
            rows.append((row.name, row.scheme, ", ".join(row.adapters), f"{row.weight_db:.1f}", f"{row.change_db:.1f}"))
        lost = sum(row.change_db < 0 for row in self.layers)
        told = f"{len(self.layers)} layers have merged adapters; in {lost} rounding changes more than the adapters do"
        return [Table(rows, left=(0, 1, 2)), told]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self))


# What merging took, by the layer, as long as the adapters are merged.
merged: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], float, float]] = WeakKeyDictionary()


def merge_report(model: nn.Module) -> MergeReport:
    """What rounding took where PEFT merged adapters into nybble's layers, by merge_adapter or merge_and_unload.

    Args:
        model: a PeftModel, or what merge_and_unload gave.
    """
    found = [(name, layer, merged[layer]) for name, layer in model.named_modules() if layer in merged]
    return MergeReport(
        tuple(
            MergedLayer(name.removesuffix(".base_layer"), str(layer.scheme), *values)
            for name, layer, values in found
            if isinstance(layer, Linear)
        )
    )
