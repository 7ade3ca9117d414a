"""Timing: which layers are swapped for their speed, that each shape is timed once, and the time that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble import paired
from nybble.dispatch.explanation import Explanation
from nybble.dispatch.spec import Problem
from nybble.nn import Linear, SparseLinear
from nybble.paired import Limits, Pairs
from nybble.passes import measure
from nybble.passes.round import work
from nybble.report.data import NOT_TIMED
from nybble.report.speed import Speed
from nybble.weights.scheme import Scheme

from .small_quantize import mlp, rows, small

Rule = Callable[[int, tuple[int, int]], float]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], list[int]]:
    """Replace the timer: clock(rule) makes dense / nybble equal rule(m, (N, K)) and returns the list of M timed.

    The interval reaches from 0.9 to 1.1 times the ratio.
    """
    monkeypatch.setattr(measure, "_memo", {})

    def install(rule: Rule) -> list[int]:
        timed: list[int] = []

        def fake(pairs: Mapping[int, Pairs], limits: Limits) -> dict[int, Speed]:
            found = {}
            for m, pair in pairs.items():
                y: Any = pair.first()
                assert pair.second().shape == y.shape == (m, y.shape[1])  # type: ignore[attr-defined]
                timed.append(m)
                ratio = rule(m, y.shape)
                found[m] = Speed(ratio, 0.9 * ratio, 1.1 * ratio, 30)
            return found

        monkeypatch.setattr(paired, "decide", fake)
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
        assert found["2.0"].reason == (
            "slower here: 0.87x [0.80, 0.93] dense speed (geometric mean over M=1, 16; 60 pairs)"
        )
        assert found["2.0"].nbytes_after == found["2.0"].nbytes_before
        assert report.coverage == pytest.approx(100 * 40 * 24 / (40 * 24 + 24 * 8))
        assert "slower at M=1" in str(report)

    @pytest.mark.parametrize(
        ("goal", "ratio", "swaps"),
        [
            ("speed", 1.2, True),
            ("speed", 1.05, False),
            ("speed", 1.0, False),
            ("no_slower", 1.0, True),
            ("no_slower", 0.95, True),
            ("no_slower", 0.8, False),
        ],
    )
    def test_what_an_interval_that_holds_one_means(
        self, clock: Callable[[Rule], list[int]], goal: str, ratio: float, swaps: bool
    ) -> None:
        clock(lambda m, shape: ratio)
        report = nybble.quantize(mlp(), m=4, goal=goal)
        assert bool(report.swapped) is swaps
        verdict = "no difference here: 1.0" if ratio > 0.9 else "slower here: 0.8"
        assert swaps or all(str(row.reason).startswith(verdict) for row in report.layers)
        assert report.layers[0].undecided_at == ((4,) if 0.9 < ratio < 1.1 else ())

    def test_the_seconds_are_shared_and_shown(
        self, clock: Callable[[Rule], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock(lambda m, shape: 2.0)
        limits: list[Limits] = []
        now = [0.0]
        original = paired.decide

        def fake(pairs: Mapping[int, Pairs], limit: Limits) -> dict[int, Speed]:
            limits.append(limit)
            now[0] += 3.0
            return original(pairs, limit)

        monkeypatch.setattr(paired, "decide", fake)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
        model = nn.Sequential(*(nn.Linear(16, n) for n in (16, 24, 24, 32)))
        report = nybble.quantize(model, m=1, timing_s=12)
        assert [limit.most for limit in limits] == pytest.approx([12 / 3, 9 / 2, 6])
        assert {limit.patience for limit in limits} == {1.0}
        assert (report.timing_s, report.timing_limit_s) == (9.0, 12.0)

    @pytest.mark.parametrize(("seconds", "error"), [(0, ValueError), (math.inf, ValueError), ("1", TypeError)])
    def test_wrong_seconds(self, seconds: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="timing_s="):
            nybble.quantize(mlp(), timing_s=seconds)

    def test_nothing_is_timed_when_the_seconds_are_spent(
        self, clock: Callable[[Rule], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        timed = clock(lambda m, shape: 2.0)
        now = [0.0]
        original = paired.decide

        def slow(pairs: Mapping[int, Pairs], limit: Limits) -> dict[int, Speed]:
            now[0] += 3.0
            return original(pairs, limit)

        monkeypatch.setattr(paired, "decide", slow)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
        model = nn.Sequential(*(nn.Linear(16, n) for n in (16, 24, 32, 40)))
        report = nybble.quantize(model, m=1, timing_s=5)
        assert [row.swapped for row in report.layers] == [True, True, False, False]
        assert report.layers[3].reason == NOT_TIMED
        assert report.timing_s == 6.0, "that of one measurement more"
        assert nybble.quantize(model, m=1, timing_s=5).coverage == 100, "the next call goes on"
        assert len(timed) == 4

    @pytest.mark.parametrize(
        ("faster_from", "seconds", "found", "calls"),
        [(70, 100, 70, 3), (100, 100, math.inf, 6), (70, 5, None, 2), (70, 0, None, 0)],
    )
    def test_more_zeros_are_tried_as_long_as_there_is_time(
        self, monkeypatch: pytest.MonkeyPatch, faster_from: int, seconds: float, found: float | None, calls: int
    ) -> None:
        monkeypatch.setattr(measure, "_memo", {})
        now, made = [0.0], []

        def decide(pairs: Mapping[int, Pairs], limits: Limits) -> dict[int, Speed]:
            made.append(limits)
            now[0] += 3.0
            ratio = 2.0 if (50, 60, 70, 80, 90, 95)[len(made) - 1] >= faster_from else 0.5
            return dict.fromkeys(pairs, Speed(ratio, 0.9 * ratio, 1.1 * ratio, 30))

        monkeypatch.setattr(paired, "decide", decide)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
        dense = nn.Linear(64, 64)
        layer = SparseLinear.from_weight(dense.weight.detach(), dense.bias, Scheme.parse("sp50w8a8"))
        assert measure.Timer(seconds, lambda line: None).pays_from(dense, layer, (1,), 1) == found
        assert len(made) == calls

    def test_what_was_cut_off_undecided_is_measured_again(
        self, clock: Callable[[Rule], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def counts(pairs: int, ratio: float, **arguments: Any) -> int:
            """How often a second call measures what the first has found with so many pairs."""
            monkeypatch.setattr(measure, "_memo", {})
            found = Speed(ratio, 0.9 * ratio, 1.1 * ratio, pairs)
            calls: list[Limits] = []
            monkeypatch.setattr(paired, "decide", lambda ps, limits: calls.append(limits) or dict.fromkeys(ps, found))
            nybble.quantize(nn.Sequential(nn.Linear(16, 16)), m=1, timing_s=5)
            nybble.quantize(nn.Sequential(nn.Linear(16, 16)), m=1, **{"timing_s": 5, **arguments})
            return len(calls) - 1

        assert counts(30, 1.0) == 0
        assert counts(2, 1.0) == 1
        assert counts(30, 1.0, timing_s=4) == 0
        assert counts(30, 1.0, timing_s=6) == 1, "more time may decide it"
        assert counts(2, 2.0, timing_s=6) == 0, "it is decided"

    def test_within_a_call_nothing_is_measured_twice(
        self, clock: Callable[[Rule], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock(lambda m, shape: 1.0)
        calls: list[Limits] = []
        few = Speed(1.0, 0.5, 2.0, 2)
        monkeypatch.setattr(paired, "decide", lambda ps, limits: calls.append(limits) or dict.fromkeys(ps, few))
        nybble.quantize(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), ("w8a8", "w8a7"), m=1)
        assert len(calls) == 2

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
        assert timed == [1, 16, 16, 32]
        timed.clear()
        nybble.quantize(nn.Sequential(nn.Linear(16, 16)), m=(1, 16))
        assert not timed
        nybble.quantize(nn.Sequential(nn.Linear(16, 16, bias=False)), m=(16,))
        nybble.quantize(nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16)), m=(16,))
        nybble.quantize(nn.Sequential(nn.Linear(16, 16)), "w8a16", m=(16,))
        assert timed == [16, 16, 16]

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
        mean = row.mean_speed
        assert mean is not None
        assert row.swapped == mean.is_faster
        assert row.slower_at == tuple(m for m, speed in row.speeds.items() if speed.high < 1)
        assert 0 < report.timing_s < 10

    def test_a_layer_that_no_kernel_runs_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rejected = {"w8a8_x": "not built", "w8a8_y": "not built", "w4a8_z": "computes w4a8, not w8a8"}
        found = Explanation(Problem(Scheme.parse("w8a8"), 1, 8, 8), None, rejected, others=frozenset({"w4a8_z"}))
        monkeypatch.setattr(Linear, "explain", lambda self, m=1: found)
        (row, _) = nybble.quantize(mlp(), goal="memory").layers
        assert row.reason == "no kernel runs it at M=1: w8a8_x, w8a8_y: not built"
