"""Observers: the range of what they are given, against all of it at once, in any order and in any pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.dispatch import reference
from nybble.model.inputs import Inputs
from nybble.model.observe import BINS, OBSERVERS, Histogram, Observer
from nybble.weights.activation_type import activation_types
from nybble.weights.activations import ActScale

A8 = activation_types()[8]


def observed(kind: str, *batches: Tensor) -> tuple[float, float]:
    observer = Observer(kind)
    for batch in batches:
        observer.add(batch)
    return observer.range(A8.steps)


def error(x: Tensor, low: float, high: float) -> float:
    """The squared error of rounding, in float64, of values with a static scale."""
    codes, scale, zero = reference.quantize_static(x.reshape(1, -1), ActScale.of_range(low, high, A8), A8)
    return ((codes.double() - zero.double()) * scale.double() - x.double().reshape(1, -1)).square().sum().item()


def least_error(x: Tensor) -> float:
    """Of all shares of both ends, in steps of a 64th of an octave."""
    shares = [2.0 ** (-i / 16) for i in range(0, 130, 4)]
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    return min(error(x, low * a, high * b) for a in (shares if low else [1.0]) for b in (shares if high else [1.0]))


DATA = {
    "normal": lambda: torch.randn(4000, 8),
    "positive": lambda: torch.randn(4000, 8).relu(),
    "negative": lambda: -torch.rand(4000, 8),
    "outliers": lambda: torch.cat([torch.randn(32000), torch.full((4,), 40.0)]).view(4, -1),
    "heavy": lambda: torch.randn(4000, 8) ** 3,
    "skew": lambda: torch.randn(4000, 8).exp(),
    "small": lambda: torch.randn(4000, 8) * 1e-20,
    "large": lambda: torch.randn(4000, 8) * 1e20,
    "few": lambda: torch.randn(1, 8),
}


@pytest.mark.parametrize("name", DATA)
def test_minmax_is_the_extremes(name: str) -> None:
    x = DATA[name]()
    assert observed("minmax", *x.split(1000)) == (min(x.min().item(), 0.0), max(x.max().item(), 0.0))


@pytest.mark.parametrize("name", DATA)
def test_percentile_leaves_out_what_it_may(name: str) -> None:
    x = DATA[name]()
    low, high = observed("percentile", x)
    width = 2 * x.abs().max().item() / BINS * 2
    for outside, end, exact in (
        (x < low, low, x.double().flatten().quantile(0.0005).item()),
        (x > high, high, x.double().flatten().quantile(0.9995).item()),
    ):
        assert outside.double().mean() <= 0.0005
        # No further out than the bin of the exact quantile, but for the last value that may not be left out.
        assert abs(end) <= abs(exact) + width or outside.sum() + 1 > 0.0005 * x.numel()


@pytest.mark.parametrize("name", DATA)
def test_mse_is_near_the_least_error_and_never_worse_than_the_extremes(name: str) -> None:
    x = DATA[name]()
    if name in ("small", "large"):
        x = x.double().mul(1e20 if name == "small" else 1e-20).float()
    found = error(x, *observed("mse", x))
    assert found <= 1.001 * error(x, *observed("minmax", x)) or name == "few"
    assert found <= 1.05 * least_error(x) or name == "few"


@pytest.mark.parametrize("kind", OBSERVERS)
def test_scaling_by_a_power_of_two_scales_the_range(kind: str) -> None:
    x = DATA["skew"]()
    low, high = observed(kind, x)
    for exponent in (-80, -7, 11, 90):
        factor = 2.0**exponent
        assert observed(kind, x * factor) == (low * factor, high * factor)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_neither_order_nor_pieces_matter(kind: str) -> None:
    x = torch.cat([torch.randn(500, 4) * 2.0**i for i in range(-30, 10, 4)])
    expected = observed(kind, x)
    assert observed(kind, *x.split(100)) == expected
    assert observed(kind, *reversed(x.split(37))) == expected
    assert observed(kind, x[torch.randperm(len(x))]) == expected


@pytest.mark.parametrize("kind", OBSERVERS)
def test_degenerate_data(kind: str) -> None:
    assert observed(kind) == (0.0, 0.0)
    assert observed(kind, torch.zeros(3, 4)) == (0.0, 0.0)
    assert observed(kind, torch.zeros(0, 4)) == (0.0, 0.0)
    assert observed(kind, -torch.zeros(3, 4)) == (0.0, 0.0)
    low, high = observed(kind, torch.full((50, 4), 0.5))
    assert low == 0.0
    assert high == pytest.approx(0.5, rel=0.01)
    low, high = observed(kind, torch.full((50, 4), -3.0))
    assert high == 0.0
    assert low == pytest.approx(-3.0, rel=0.01)
    subnormal = torch.full((5, 4), 1e-42)
    assert observed(kind, subnormal)[1] == pytest.approx(1e-42, rel=0.01)
    largest = torch.full((5, 4), torch.finfo(torch.float32).max)
    assert observed(kind, torch.cat([largest, -largest]))[1] == pytest.approx(largest[0, 0].item(), rel=0.01)


def test_the_histogram_counts_what_lies_in_its_bins() -> None:
    histogram, x = Histogram(), torch.randn(3000) * 3
    histogram.add(x[:10] * 1e-3)
    histogram.add(x[10:])
    whole = torch.cat([x[:10] * 1e-3, x[10:]]).double()
    edges = (torch.arange(BINS + 1, dtype=torch.float64) - BINS // 2) * histogram.width
    expected = torch.histogram(whole, edges)[0].long()
    assert torch.equal(histogram.counts, expected)
    assert histogram.counts.sum() == 3000


def test_a_planted_outlier_costs_minmax_more_than_the_others() -> None:
    x = torch.randn(20000)
    x[123] = 500.0
    clean = torch.cat([x[:123], x[124:]])
    errors = {kind: error(clean, *observed(kind, x)) for kind in OBSERVERS}
    assert errors["percentile"] < 0.01 * errors["minmax"]
    # What the outlier itself loses counts for mse.
    whole = {kind: error(x, *observed(kind, x)) for kind in OBSERVERS}
    assert whole["mse"] <= min(whole.values()) * 1.01


@pytest.mark.parametrize("size", [1, 4, 7, 60])
def test_every_eighth_row_is_held_out_whatever_the_size_of_the_batches(size):
    rows = torch.arange(60).float()[:, None].expand(60, 4)
    inputs = Inputs(4)
    for part in rows.split(size):
        inputs.add(part)
    assert inputs.held_out[:, 0].tolist() == [7, 15, 23, 31, 39, 47, 55]
    assert inputs.rows == 53
