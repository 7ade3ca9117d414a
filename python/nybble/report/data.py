"""What a pass did to each layer of a model, as data and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..text import Part
from .speed import Speed, mean_speed

SCHEMA = "nybble.report/1"
# The reason of weights that no pass for Linear layers changes.
UNKNOWN_KIND = "not a kind of module that nybble replaces"
# The reason of layers for which no time was left.
NOT_TIMED = "not timed: timing_s was spent"


@dataclass(frozen=True)
class Pruned:
    """What pruning did to one layer.

    ``pattern`` is such as "sp50"; ``kept`` the share of weights that are not zero; ``method`` the one that made the
    mask in the end, with ``notes`` on why it was not the one that was asked for, and what else happened. ``error`` is
    the relative output error (Frobenius norm) of the new layer on calibration data that the method did not see, and
    ``error_dense`` that of rounding alone (0 where nothing is rounded); None where there was no data.
    ``permutation_gain`` is the relative gain in kept magnitude by permuting the inputs; None where they stand as they
    stood.
    """

    pattern: str
    kept: float
    method: str
    error_dense: float | None = None
    error: float | None = None
    permutation_gain: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rounded:
    """How the weight of one layer was rounded.

    ``method`` is the one that rounded it in the end, with ``notes`` on why it was not the one that was asked for, and
    what else happened. ``error`` is the relative output error (Frobenius norm) of the new layer on calibration data that
    the method did not see, and ``error_rtn`` that of rounding to nearest; None where there was no data.
    """

    method: str
    error_rtn: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tried:
    """One of several schemes that a layer could get.

    ``error`` is the relative output error (Frobenius norm), on calibration data that the method did not see or on
    random rows; None where the layer cannot have the scheme. ``speed`` is dense time over its time, None where it was
    not measured. ``why``: why it was not taken; None: it was.
    """

    scheme: str
    error: float | None
    speed: Speed | None = None
    why: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one weight of a module that nybble does not replace.

    ``shape`` is (N, K) for a Linear layer and the parameter's own shape otherwise. ``nbytes_before`` and
    ``nbytes_after`` count memory once: of layers that share a weight, only one carries its bytes. ``sqnr_db`` is
    ``inf`` where quantization is exact and None where nothing was quantized. ``speeds`` maps M to dense time over
    nybble time, with its interval, and is empty where nothing was timed. ``reason`` says why the layer was left alone; it
    is None for a layer that was swapped. ``also`` holds the further names of a module that stands at several places.
    ``tried`` holds the schemes among which one was to be chosen, the most exact first.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    before: str
    after: str
    nbytes_before: int
    nbytes_after: int
    sqnr_db: float | None = None
    kernel: str | None = None
    speeds: dict[int, Speed] = field(default_factory=dict)
    reason: str | None = None
    tied_to: str | None = None
    also: tuple[str, ...] = ()
    pruned: Pruned | None = None
    rounded: Rounded | None = None
    tried: tuple[Tried, ...] = ()

    @property
    def swapped(self) -> bool:
        """Whether the layer was replaced."""
        return self.reason is None

    @property
    def speedup(self) -> dict[int, float]:
        """Dense time over nybble time for each M."""
        return {m: speed.ratio for m, speed in self.speeds.items()}

    @property
    def slower_at(self) -> tuple[int, ...]:
        """The values of M at which it was measured to be slower than the dense layer."""
        return tuple(m for m, speed in self.speeds.items() if speed.is_slower)

    @property
    def undecided_at(self) -> tuple[int, ...]:
        """The values of M at which no difference to the dense layer was found."""
        return tuple(m for m, speed in self.speeds.items() if speed.low <= 1 <= speed.high)

    @property
    def mean_speed(self) -> Speed | None:
        """Geometric mean of ``speeds`` over M, which decides, or None where nothing was timed."""
        return mean_speed(list(self.speeds.values())) if self.speeds else None

    @property
    def mean_speedup(self) -> float | None:
        """Geometric mean of ``speedup`` over M, or None where nothing was timed."""
        return None if self.mean_speed is None else self.mean_speed.ratio


class Told(Protocol):
    """A report of something else that belongs to the pass."""

    def to_json(self) -> str:
        """As strict JSON."""

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""


@dataclass(frozen=True)
class ReportData:
    """All layers of a model after a pass; ``to_json`` gives everything.

    ``weight_bytes`` counts every parameter of rank 2 and more once, Linear or not; ``weight_bytes_changed`` is the
    part of it that belongs to quantized layers. A layer that was quantized before the call counts as changed, with
    the bytes that its weight would take in its own dtype. ``timing_s``: seconds that measuring speeds took, of
    ``timing_limit_s``. ``merged``: whether it tells of a stage of a recipe that gives schemes by layer. ``fusion``: what
    became of chains of layers, or None where none were looked for.
    """

    layers: tuple[LayerReport, ...]
    scheme: str
    goal: str
    method: str
    m: tuple[int, ...]
    machine: str
    threads: int
    weight_bytes: int
    weight_bytes_changed: int
    versions: dict[str, str] = field(default_factory=dict)
    timing_s: float = 0.0
    timing_limit_s: float = 0.0
    merged: bool = False
    fusion: Told | None = None

    @property
    def coverage(self) -> float:
        """Percent of the model's weight bytes that changed; 0.0 for a model without weights."""
        return 100.0 * self.weight_bytes_changed / self.weight_bytes if self.weight_bytes else 0.0

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The layers and weights that were left alone, each with its ``reason``."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    @property
    def nbytes_before(self) -> int:
        """Bytes of all listed layers before the pass."""
        return sum(layer.nbytes_before for layer in self.layers)

    @property
    def nbytes_after(self) -> int:
        """Bytes of all listed layers after the pass."""
        return sum(layer.nbytes_after for layer in self.layers)

    def to_json(self) -> str:
        """Every field of the report and its layers, and the totals, as strict JSON.

        An infinite number is the string "inf"; the keys of ``speeds`` and ``speedup`` are strings.
        """
        layers = []
        for layer in self.layers:
            entry: dict[str, Any] = asdict(layer)
            told = ("swapped", "speedup", "slower_at", "undecided_at", "mean_speedup")
            entry |= {name: getattr(layer, name) for name in told}
            mean = layer.mean_speed
            layers.append({**entry, "mean_speed": None if mean is None else {**asdict(mean), "verdict": mean.verdict}})
        totals = {
            "schema": SCHEMA,
            **{name: value for name, value in vars(self).items() if name not in ("layers", "fusion")},
            "fusion": None if self.fusion is None else json.loads(self.fusion.to_json()),
            "nbytes_before": self.nbytes_before,
            "nbytes_after": self.nbytes_after,
            "coverage": self.coverage,
            "layers": layers,
        }
        return json.dumps(_strict(totals), indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    """The value with text in place of numbers that strict JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
