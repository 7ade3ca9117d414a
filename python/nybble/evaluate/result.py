"""The result of `nybble.evaluate`: data, table and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..text import Part, Shown, Table

SCHEMA = "nybble.evaluation/1"


@dataclass(frozen=True)
class Metric:
    """A value and its 95 % bootstrap interval over sequences; the bounds are None if there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval as text."""
        return "" if self.low is None else f"[{self.low:.5g}, {self.high:.5g}]"

    def __str__(self) -> str:
        return f"{self.value:.5g}   {self.interval}".rstrip()


@dataclass(frozen=True)
class Evaluation(Shown):
    """The metrics by name, see ``evaluate``. ``skipped``: reason -> number of batches that were skipped."""

    metrics: Mapping[str, Metric]
    batches: int
    sequences: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    threads: int = 0

    def __getitem__(self, name: str) -> float:
        """The value of a metric. Raises KeyError that lists the measured ones."""
        if name not in self.metrics:
            raise KeyError(f"{name!r}: not measured; measured are {', '.join(self.metrics)}")
        return self.metrics[name].value

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        rows = [(name, f"{metric.value:.5g}", metric.interval) for name, metric in self.metrics.items()]
        return [
            Table([("metric", "value", "95 % interval"), *rows], left=(0, 1, 2)),
            f"{self.sequences} sequences in {self.batches} batches; intervals by bootstrap over sequences",
            *(f"{count} batches left out: {reason}" for reason, count in self.skipped.items()),
            f"machine: {self.machine}, threads: {self.threads}",
        ]

    def to_json(self) -> str:
        """All fields as strict JSON; numbers that are not finite become strings such as "nan"."""
        data: dict[str, Any] = asdict(self)
        for metric in data["metrics"].values():
            metric.update({k: str(v) for k, v in metric.items() if v is not None and not math.isfinite(v)})
        return json.dumps({"schema": SCHEMA, **data}, indent=2, allow_nan=False)
