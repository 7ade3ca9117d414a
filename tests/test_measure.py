"""Timing: when goal="speed" swaps a layer, that each shape is timed once, and the timer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.dispatch.explanation import Explanation
from nybble.dispatch.spec import Problem
from nybble.nn import Linear
from nybble.passes import measure
from nybble.passes.round import work
from nybble.report.data import LayerReport
from nybble.report.report import Report
from nybble.weights.scheme import Scheme

Rule = Callable[[int, tuple[int, int]], float]


def mlp(**kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24, **kwargs), nn.ReLU(), nn.Sequential(nn.Linear(24, 8, **kwargs)))


def small(model: nn.Module, scheme: str = "w8a8", **kwargs: Any) -> Report:
    return nybble.quantize(model, scheme, goal="memory", **kwargs)


def rows(report: Report) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], list[int]]:
    """Replace the timer: clock(rule) makes dense / nybble equal rule(m, (N, K)) and returns the list of M timed."""
    monkeypatch.setattr(measure, "_memo", {})

    def install(rule: Rule) -> list[int]:
        timed: list[int] = []

        def fake(fns: Mapping[str, Callable[[], Any]], budget_s: float) -> dict[str, float]:
            y = fns["dense"]()
            assert fns["nybble"]().shape == y.shape
            timed.append(y.shape[0])
            return {"dense": rule(y.shape[0], y.shape), "nybble": 1.0}

        monkeypatch.setattr(measure, "interleaved", fake)
        return timed

    return install


class TestSpeed:
    def test_swaps_where_the_geometric_mean_is_above_one(self, clock: Callable[[Rule], list[int]]) -> None:
        clock(lambda m, shape: {1: 0.25, 16: 8.0}[m] if shape[1] == 24 else {1: 0.25, 16: 3.0}[m])
        model = mlp()
        report = nybble.quantize(model, m=(1, 16))
        found = rows(report)
        assert isinstance(model[0], Linear)
        assert (found["0"].speedup, found["0"].slower_at) == ({1: 0.25, 16: 8.0}, (1,))
        assert type(model[2][0]) is nn.Linear
        assert (found["2.0"].speedup, found["2.0"].slower_at) == ({1: 0.25, 16: 3.0}, (1,))
        assert "0.87x" in str(found["2.0"].reason)
        assert found["2.0"].nbytes_after == found["2.0"].nbytes_before
        assert report.coverage == pytest.approx(100 * 40 * 24 / (40 * 24 + 24 * 8))
        assert "slower at M=1" in str(report)

    def test_a_mean_of_exactly_one_is_no_gain(self, clock: Callable[[Rule], list[int]]) -> None:
        clock(lambda m, shape: 1.0)
        assert nybble.quantize(mlp(), m=4).swapped == ()

    def test_memory_goal_times_nothing(self, clock: Callable[[Rule], list[int]]) -> None:
        timed = clock(lambda m, shape: 0.1)
        report = small(mlp())
        assert timed == []
        assert len(report.swapped) == 2

    def test_one_measurement_per_shape_and_process(self, clock: Callable[[Rule], list[int]]) -> None:
        timed = clock(lambda m, shape: 2.0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        nybble.quantize(model, m=(1, 16))
        assert timed == [1, 16]
        nybble.quantize(nn.Sequential(nn.Linear(16, 16)), m=(16, 32))
        assert timed == [1, 16, 32]
        nybble.quantize(nn.Sequential(nn.Linear(16, 16, bias=False)), m=(16,))
        nybble.quantize(nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16)), m=(16,))
        nybble.quantize(nn.Sequential(nn.Linear(16, 16)), "w8a16", m=(16,))
        assert timed == [1, 16, 32, 16, 16, 16]

    def test_the_thread_count_is_part_of_the_key(self, clock: Callable[[Rule], list[int]]) -> None:
        timed = clock(lambda m, shape: 2.0)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 1):
                torch.set_num_threads(count)
                nybble.quantize(nn.Sequential(nn.Linear(16, 16)), m=(8,))
        finally:
            torch.set_num_threads(threads)
        assert timed == [8, 8]

    def test_slow_shapes_are_rounded_once(
        self, clock: Callable[[Rule], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock(lambda m, shape: 0.5)
        rounded = []
        original = work.round_weight
        monkeypatch.setattr(work, "round_weight", lambda *a: rounded.append(1) or original(*a))
        report = nybble.quantize(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), m=(1,))
        assert len(rounded) == 1
        assert all("slower here" in str(row.reason) and row.slower_at == (1,) for row in report.layers)

    def test_tied_layers_stay_together(self, clock: Callable[[Rule], list[int]]) -> None:
        timed = clock(lambda m, shape: 2.0 if len(timed) > 1 else 0.5)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
        model[1].weight = model[0].weight
        report = nybble.quantize(model, m=(1,))
        assert report.swapped == ()
        assert "slower here" in str(rows(report)["0"].reason)
        assert "shares its weight with 0" in str(rows(report)["1"].reason)
        assert model[0].weight is model[1].weight

    def test_real_clock_runs_within_a_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "_memo", {})
        report = nybble.quantize(nn.Sequential(nn.Linear(64, 64)), m=(1, 7))
        (row,) = report.layers
        assert set(row.speedup) == {1, 7}
        assert all(0 < ratio < 1000 for ratio in row.speedup.values())
        mean = row.mean_speedup
        assert mean is not None
        assert row.swapped == (mean > 1)
        assert row.slower_at == tuple(m for m, ratio in row.speedup.items() if ratio < 1)

    def test_a_layer_that_no_kernel_runs_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rejected = {"w8a8_x": "not built", "w8a8_y": "not built", "w4a8_z": "computes w4a8, not w8a8"}
        found = Explanation(Problem(Scheme.parse("w8a8"), 1, 8, 8), None, rejected, others=frozenset({"w4a8_z"}))
        monkeypatch.setattr(Linear, "explain", lambda self, m=1: found)
        (row, _) = nybble.quantize(mlp(), goal="memory").layers
        assert row.reason == "no kernel runs it at M=1: w8a8_x, w8a8_y: not built"


class TestInterleaved:
    def test_calls_in_turns_and_gives_medians(self) -> None:
        calls: list[str] = []
        times = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.002)
        assert calls[:6] == ["a", "b"] * 3
        assert len(calls) % 2 == 0
        assert list(times) == ["a", "b"]
        assert all(0 < value < 0.01 for value in times.values())

    def test_interrupted_calls_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        lengths = iter([9.0, 1.0, 50.0, 1.2, 1.4, 70.0, 90.0, 1.9, 2.1] + [1e9] * 3)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

        def work() -> None:
            now[0] += next(lengths)

        assert measure.interleaved({"work": work}, 218.0) == {"work": pytest.approx(1.3)}

    def test_tells_slow_from_fast(self) -> None:
        a, b = torch.randn(8, 8), torch.randn(512, 512)
        times = measure.interleaved({"fast": lambda: a @ a, "slow": lambda: b @ b}, 0.02)
        assert times["slow"] > 2 * times["fast"]

    def test_a_slow_function_runs_once(self) -> None:
        calls: list[int] = []

        def slow() -> None:
            calls.append(1)
            torch.zeros(1 << 22).add_(1)

        measure.interleaved({"slow": slow}, 1e-9)
        assert len(calls) == 1

    @pytest.mark.parametrize(("names", "budget"), [((), 1.0), (("a",), 0.0), (("a",), math.nan)])
    def test_wrong_arguments(self, names: tuple[str, ...], budget: float) -> None:
        with pytest.raises(ValueError, match="must be at least one, and above 0"):
            measure.interleaved(dict.fromkeys(names, int), budget)
