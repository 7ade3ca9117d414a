"""Reports for tests: rows of layers that were swapped or left alone, with some fields changed."""

from __future__ import annotations

from ..report.data import LayerReport
from ..report.report import Report
from ..report.speed import Speed


def speeds(ratios: dict[int, float]) -> dict[int, Speed]:
    """Speeds whose intervals reach a tenth of the ratio to both sides."""
    return {m: Speed(ratio, 0.9 * ratio, 1.1 * ratio, 30) for m, ratio in ratios.items()}


def swapped(**changes: object) -> LayerReport:
    """A layer that was replaced."""
    values: dict[str, object] = {
        "name": "encoder.0.fc",
        "kind": "Linear",
        "shape": (64, 32),
        "before": "float32",
        "after": "w8a8",
        "nbytes_before": 8448,
        "nbytes_after": 2560,
        "sqnr_db": 41.26,
        "kernel": "w8a8_avx2",
        "speeds": speeds({1: 0.5, 16: 4.0}),
    }
    return LayerReport(**{**values, **changes})  # type: ignore[arg-type]


def left(**changes: object) -> LayerReport:
    """A weight that was left alone."""
    values: dict[str, object] = {
        "name": "embed",
        "kind": "Embedding",
        "shape": (10, 4),
        "before": "bfloat16",
        "after": "bfloat16",
        "nbytes_before": 80,
        "nbytes_after": 80,
        "reason": "not a kind of module that nybble replaces",
    }
    return LayerReport(**{**values, **changes})  # type: ignore[arg-type]


def report(*layers: LayerReport, **changes: object) -> Report:
    """A report of these layers."""
    values: dict[str, object] = {
        "layers": layers,
        "scheme": "w8a8",
        "goal": "speed",
        "method": "rtn",
        "m": (1, 16),
        "machine": "Some CPU",
        "threads": 2,
        "weight_bytes": 8272,
        "weight_bytes_changed": 8192,
        "timing_limit_s": 10.0,
        "versions": {"nybble": "0.1.0"},
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]
