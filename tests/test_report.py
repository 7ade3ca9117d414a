"""The report: totals, coverage, table and JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nybble.report.data import LayerReport, geometric_mean
from nybble.report.report import Report


def swapped(**changes: object) -> LayerReport:
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
        "speedup": {1: 0.5, 16: 4.0},
        "slower_at": (1,),
    }
    return LayerReport(**{**values, **changes})  # type: ignore[arg-type]


def left(**changes: object) -> LayerReport:
    values: dict[str, object] = {
        "name": "embed",
        "kind": "Embedding",
        "shape": (10, 4),
        "before": "bfloat16",
        "after": "bfloat16",
        "nbytes_before": 80,
        "nbytes_after": 80,
        "reason": "not a Linear layer",
    }
    return LayerReport(**{**values, **changes})  # type: ignore[arg-type]


def report(*layers: LayerReport, **changes: object) -> Report:
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
        "versions": {"nybble": "0.1.0"},
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def test_totals_and_parts() -> None:
    a, b = swapped(), left()
    both = report(a, b)
    assert both.swapped == (a,)
    assert both.left == (b,)
    assert (both.nbytes_before, both.nbytes_after) == (8528, 2640)
    assert both.coverage == pytest.approx(100 * 8192 / 8272)


def test_coverage_of_a_model_without_weights_is_zero() -> None:
    assert report(weight_bytes=0, weight_bytes_changed=0).coverage == 0.0


def test_reports_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        swapped().name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().goal = "memory"  # type: ignore[misc]


@pytest.mark.parametrize(("values", "mean"), [((4.0,), 4.0), ((0.5, 2.0), 1.0), ((1.0, 2.0, 4.0), 2.0)])
def test_geometric_mean(values: tuple[float, ...], mean: float) -> None:
    assert geometric_mean(values) == pytest.approx(mean)


def test_geometric_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="values"):
        geometric_mean(())


def test_mean_speedup() -> None:
    assert swapped().mean_speedup == pytest.approx(math.sqrt(2))
    assert left().mean_speedup is None


def test_table_has_every_layer_and_fact() -> None:
    text = str(report(swapped(also=("decoder.fc",)), left()))
    header, _, first, second = text.splitlines()[:4]
    assert header.split()[:5] == ["layer", "kind", "shape", "before", "after"]
    for word in (
        "encoder.0.fc = decoder.fc",
        "64x32",
        "w8a8_avx2",
        "8.2 KiB",
        "2.5 KiB",
        "41.3",
        "0.50",
        "4.00",
        "1.41",
    ):
        assert word in first
    assert first.endswith("slower at M=1")
    assert second.endswith("left alone: not a Linear layer")
    for word in ("1 of 2 layers swapped", "coverage 99.0 %", "Some CPU, threads: 2", "3.23x smaller"):
        assert word in text


def test_table_columns_are_aligned() -> None:
    lines = str(report(swapped(), left(name="a.very.long.name.of.a.layer"))).splitlines()
    kind = lines[0].index("kind")
    assert lines[2][kind:].startswith("Linear")
    assert lines[3][kind:].startswith("Embedding")
    assert all(line == line.rstrip() and "\t" not in line for line in lines)


def test_table_says_when_speed_was_not_measured() -> None:
    text = str(report(swapped(speedup={}, slower_at=()), goal="memory"))
    assert "not measured" in text
    assert "slower" not in text


def test_table_says_what_the_first_call_of_a_triton_kernel_costs() -> None:
    text = str(report(swapped(kernel="w8a8_triton")))
    assert "..._triton : compiled when it is first called, which takes about a second" in text
    assert "_triton" not in str(report(swapped()))


def test_table_of_nothing() -> None:
    assert "0 of 0 layers swapped" in str(report(weight_bytes=0, weight_bytes_changed=0))


def test_json_is_complete_and_strict() -> None:
    a, b = swapped(sqnr_db=math.inf, tied_to="first", also=("x",)), left()
    both = report(a, b)
    data = json.loads(both.to_json(), parse_constant=lambda text: pytest.fail(f"not strict JSON: {text}"))
    for field in dataclasses.fields(Report):
        assert field.name in data
    for layer, entry in zip((a, b), data["layers"], strict=True):
        assert {field.name for field in dataclasses.fields(LayerReport)} <= entry.keys()
        assert entry["name"] == layer.name
        assert entry["shape"] == list(layer.shape)
        assert entry["swapped"] is layer.swapped
    assert data["layers"][0]["sqnr_db"] == "inf"
    assert data["layers"][0]["speedup"] == {"1": 0.5, "16": 4.0}
    assert data["layers"][1]["sqnr_db"] is None
    assert data["coverage"] == both.coverage
    assert data["nbytes_before"] == 8528
    assert data["versions"] == {"nybble": "0.1.0"}
