"""What a monitor counts and compares: its measures by their formulas, and how often its alarms are right."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.model.rows import rows_of
from nybble.monitor.statistics import BINS, Reading, Statistics, Tally, anchor_of, compare, psi
from nybble.monitor.watch import LIMITS, PATIENCE, Watch, pick_rows

CHANNELS, WINDOW = 48, 128


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


class Inputs:
    """Rows as layers see them: channels of very different size, three of them large, rows of different size."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.sizes = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(99)).mul(0.7).exp()
        self.sizes[:3] *= 8

    def rows(self, count: int) -> Tensor:
        x = torch.randn(count, CHANNELS, generator=self._generator) * self.sizes
        return x * torch.randn(count, 1, generator=self._generator).mul(0.2).exp()


def calibrated(windows: int = 64) -> Watch:
    watch = Watch("layer", CHANNELS, WINDOW)
    inputs = Inputs(seed=1)
    for _ in range(windows):
        watch.add(inputs.rows(WINDOW))
    watch.calibrated()
    return watch


def outlier(x: Tensor, channel: int) -> Tensor:
    """One channel thirty times as large."""
    return x.index_copy(1, torch.tensor([channel]), 30 * x[:, [channel]])


class TestBars:
    def test_held_out_data_raises_one_alarm_in_ten_thousand_windows_at_most(self) -> None:
        watch, inputs = calibrated(), Inputs(seed=2)
        for _ in range(10_000):
            watch.add(inputs.rows(WINDOW))
        drift = watch.drift()
        assert drift.windows == 10_000
        assert drift.alarmed_windows <= 1

    @pytest.mark.parametrize("kind", ["shift", "outlier"])
    def test_drift_is_found_within_five_windows(self, kind: str) -> None:
        watch, found = calibrated(), 0
        for trial in range(200):
            watch.restart()
            inputs = Inputs(seed=1000 + trial)
            for _ in range(5):
                x = inputs.rows(WINDOW)
                watch.add(1.5 * x if kind == "shift" else outlier(x, 3 + trial % (CHANNELS - 3)))
            found += bool(watch.drift().alarms)
        assert found >= 198


class TestMeasures:
    def test_psi_is_the_formula(self) -> None:
        p, q = torch.tensor([80, 20]), torch.tensor([50, 50])
        assert psi(p, q) == pytest.approx(30 / 101 * (math.log(80.5 / 50.5) - math.log(20.5 / 50.5)))
        assert psi(q, q) == 0
        assert psi(torch.tensor([1000, 0]), torch.tensor([1000, 0])) == 0

    def test_histogram_has_half_octaves_around_the_anchor_and_keeps_scale(self) -> None:
        x = torch.tensor([[0.0, 1.0, 1.4, 1.5, -2.0, 1e30, 1e-30, 5.0]])
        tally = Tally(8, anchor=0)
        tally.add(x, 1e30)
        expected = {0: 2, 48: 2, 49: 1, 50: 1, 52: 1, BINS - 1: 1}
        assert {i: n for i, n in enumerate(tally.histogram.tolist()) if n} == expected
        large, small = (Tally(CHANNELS, anchor_of(scale * 8)) for scale in (1.0, 2.0**-60))
        rows = Inputs().rows(20)
        large.add(rows, float(rows.abs().max()))
        small.add(rows * 2.0**-60, float(rows.abs().max()) * 2.0**-60)
        assert torch.equal(large.histogram, small.histogram)

    def test_values_just_above_the_calibrated_range_count(self) -> None:
        tally = Tally(4, anchor=0, limit=1.0)
        tally.add(torch.tensor([[1.0, -1.0, 0.5, 0.0], [1.001, -1.5, 2.5, 1.0]]), 2.5)
        tally.add(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1.0)
        assert tally.beyond == 3

    def test_statistics_are_those_of_the_rows(self) -> None:
        watch, inputs = Watch("x", CHANNELS, 50), Inputs(seed=5)
        rows = inputs.rows(200)
        for part in rows.split(25):
            watch.add(part)
        watch.calibrated()
        found = watch.statistics
        assert found is not None
        assert (found.rows, found.amax) == (200, float(rows.abs().max()))
        assert found.window_amax == pytest.approx(rows.abs().view(4, 50, -1).flatten(1).amax(1).mean().item())
        torch.testing.assert_close(found.mean, rows.double().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance, rows.double().var(0, correction=0), rtol=1e-4, atol=1e-6)
        exact = rows.abs().flatten().quantile(0.999).item()
        assert exact <= found.quantile() <= min(exact * 2**0.5, found.amax)
        assert int(found.histogram.sum()) == rows.numel()

    @pytest.mark.parametrize(
        ("change", "measure"),
        [
            (lambda x: x * torch.where(torch.rand(x.shape) < 0.05, 50.0, 1.0), "saturation"),
            (lambda x: x * 2, "range"),
            (lambda x: x / 4, "range"),
            (lambda x: x * 1.5, "scale"),
            (lambda x: x / 1.5, "scale"),
            (lambda x: x.sign() * x.abs().sqrt(), "psi"),
            (lambda x: outlier(x, 20), "channels"),
        ],
    )
    def test_each_measure_finds_its_own(self, change: Any, measure: str) -> None:
        watch, inputs = calibrated(), Inputs(seed=7)
        for _ in range(4):
            watch.add(change(inputs.rows(WINDOW)))
        drift = watch.drift()
        assert measure in drift.alarms
        assert drift.state == "alarm"

    def test_new_channels_are_named(self) -> None:
        watch, inputs = calibrated(), Inputs(seed=7)
        watch.add(outlier(inputs.rows(WINDOW), 20))
        reading = watch.drift().reading
        assert reading is not None
        assert reading.new_channels == (20,)
        assert reading.overlap == pytest.approx(2 / 3), "the three largest of 48 are compared"

    def test_an_alarm_takes_three_windows_in_a_row(self) -> None:
        watch, inputs = calibrated(), Inputs(seed=8)
        states = []
        for factor in (1, 3, 3, 1, 3, 3, 3, 3):
            watch.add(factor * inputs.rows(WINDOW))
            states.append((watch.drift().state, "psi" in watch.drift().alarms))
        assert [alarm for _, alarm in states] == [False] * 6 + [True] * 2
        assert states[0][0] == "ok"
        assert states[1][0] == "warn"
        assert PATIENCE == 3

    def test_limits_are_those_of_the_specification(self) -> None:
        calm = Reading(0.001, 1.5, 1.3, 0.2, 1.0, ())
        assert not any(is_beyond(calm) for is_beyond, _ in LIMITS.values())
        for name, value in {
            "saturation": 0.0011,
            "amax_ratio": 1.51,
            "scale": 1.31,
            "psi": 0.21,
            "new_channels": (1,),
        }.items():
            assert sum(is_beyond(calm._replace(**{name: value})) for is_beyond, _ in LIMITS.values()) == 1
        assert LIMITS["range"][0](calm._replace(amax_ratio=0.49))

    def test_a_layer_of_zeros(self) -> None:
        watch = Watch("x", 8, 16)
        watch.add(torch.zeros(16, 8))
        watch.calibrated()
        watch.add(torch.zeros(16, 8))
        assert watch.drift().state == "ok"
        watch.add(torch.ones(16, 8))
        reading = watch.drift().reading
        assert reading is not None
        assert reading.amax_ratio == float("inf")
        assert json.loads(json.dumps(watch.drift().to_dict(), allow_nan=False))["amax_ratio"] == "inf"

    def test_rows_are_spread_and_padding_is_left_out(self) -> None:
        layer = nn.Linear(2, 3)
        x = torch.arange(40.0).view(2, 10, 2)
        assert pick_rows(rows_of(layer, x, None), 64, 0).shape == (20, 2)
        assert [pick_rows(rows_of(layer, x, None), 5, turn)[0, 0].item() for turn in range(4)] == [0, 2, 4, 6]
        assert len(pick_rows(rows_of(layer, x, None), 5, 0)) == 5
        mask = torch.zeros(2, 10, dtype=torch.bool)
        mask[1, :3] = True
        assert torch.equal(pick_rows(rows_of(layer, x, mask), 64, 0), x[1, :3])
        assert pick_rows(rows_of(layer, x[:1], mask), 64, 0).shape == (10, 2)


def test_compare_uses_the_moving_average() -> None:
    watch = calibrated()
    assert isinstance(watch.statistics, Statistics)
    tally = Tally(CHANNELS, watch.statistics.anchor, watch.statistics.amax)
    tally.add(torch.ones(4, CHANNELS), 1.0)
    assert compare(tally, watch.statistics, 2 * watch.statistics.window_amax).amax_ratio == 2
