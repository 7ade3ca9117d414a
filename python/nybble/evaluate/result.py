"""What was measured of a model, as data, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "nybble.evaluation/1"


@dataclass(frozen=True)
class Metric:
    """A value and the interval that holds 95 % of it over samples of the sequences; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f"   [{self.low:.5g}, {self.high:.5g}]"
        return f"{self.value:.5g}{interval}"


@dataclass(frozen=True)
class Evaluation:
    """The metrics by name, see ``evaluate``. ``skipped``: reason -> batches that were left out for it."""

    metrics: Mapping[str, Metric]
    batches: int
    sequences: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    threads: int = 0

    def __getitem__(self, name: str) -> float:
        """The value of a metric. Raises KeyError that names those there are."""
        if name not in self.metrics:
            raise KeyError(f"{name!r}: not measured; there are {', '.join(self.metrics)}")
        return self.metrics[name].value

    def __str__(self) -> str:
        width = max(map(len, self.metrics), default=0)
        lines = [f"{name:{width}}  {metric}" for name, metric in self.metrics.items()]
        lines.append(f"{self.sequences} sequences in {self.batches} batches; [95 % by bootstrap over sequences]")
        lines += [f"{count} batches left out: {reason}" for reason, count in self.skipped.items()]
        return "\n".join([*lines, f"machine: {self.machine}, threads: {self.threads}"])

    def to_json(self) -> str:
        """Everything as strict JSON; what is not finite is a string such as "nan"."""
        data: dict[str, Any] = asdict(self)
        for metric in data["metrics"].values():
            metric.update({k: str(v) for k, v in metric.items() if v is not None and not math.isfinite(v)})
        return json.dumps({"schema": SCHEMA, **data}, indent=2, allow_nan=False)
