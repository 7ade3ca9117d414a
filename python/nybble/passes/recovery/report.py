"""The report of `nybble.recover`: data, text and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ... import _moved
from ...text import Part, Shown


@dataclass(frozen=True)
class RecoveredStage:
    """One block, or the whole model.

    before, after: held-out loss on the real kernels, before training and of the layers that the model ends with.
    steps, learning_rate: of the training. kept: whether the trained layers were kept. note: how the training ended.
    """

    name: str
    layers: tuple[str, ...]
    before: float
    after: float
    steps: int
    learning_rate: float
    kept: bool
    note: str

    @property
    def rate(self) -> float:
        """The old name of ``learning_rate``."""
        _moved.renamed_since("RecoveredStage.rate", "learning_rate")
        return self.learning_rate


@dataclass(frozen=True)
class Recovered(Shown):
    """All stages, and the held-out loss of the whole model. ``left``: layers that were not trained -> reason."""

    loss: str
    before: float
    after: float
    stages: tuple[RecoveredStage, ...]
    left: dict[str, str]

    @property
    def removed(self) -> float:
        """The share of the held-out loss that was removed."""
        return 1 - self.after / self.before if self.before else 0.0

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        lines = [
            f"{stage.name}: held-out loss {stage.before:.4g} -> {stage.after:.4g}, {len(stage.layers)} layers, "
            f"{stage.steps} steps at learning rate {stage.learning_rate:g}, {stage.note}{'' if stage.kept else '; not better, not kept'}"
            for stage in self.stages
        ]
        lines += [f"left alone: {name}: {why}" for name, why in self.left.items()]
        whole = f"whole model: held-out {self.loss} against the reference {self.before:.4g} -> {self.after:.4g}"
        return [*lines, f"{whole}, {self.removed:.0%} of it removed"]

    def to_json(self) -> str:
        """All fields as strict JSON."""
        # For one release each stage has its learning rate under the old name, too.
        stages = [{**asdict(stage), "rate": stage.learning_rate} for stage in self.stages]
        found = {"schema": "nybble.recovered/1", **asdict(self), "stages": stages, "removed": self.removed}
        return json.dumps(found, indent=2, allow_nan=False)
