"""GPTQ: the identity behind its updates, and the limits in which it is something simpler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.passes.layerwise.outcome import Outcome
from nybble.passes.round.gptq import gptq
from nybble.passes.round.methods import round_weight
from nybble.testing.models import correlated_inputs, gathered
from nybble.weights.rounding import QuantizedWeight, check_portable, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

SCHEMES = ["w8a8", "w4a16", "w4a8g32", "w4a16g128", "w4a16g64asym"]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def weight_of(quantized: QuantizedWeight | None, scheme: Scheme, k: int) -> Tensor:
    assert quantized is not None
    return dequantize_weight(quantized, scheme, k)


def loss(x: Tensor, weight: Tensor, found: Outcome, scheme: Scheme) -> float:
    return (x @ (weight - weight_of(found.quantized, scheme, weight.shape[1])).T).square().sum().item()


def ratio(x: Tensor, weight: Tensor, scheme: str) -> float:
    """GPTQ's loss over that of rounding to nearest, on the data."""
    numbers = Scheme.parse(scheme)
    ours, nearest = (round_weight(weight, numbers, method, gathered(x)) for method in ("gptq", "rtn"))
    assert ours.method == "gptq"
    return loss(x, weight, ours, numbers) / loss(x, weight, nearest, numbers)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_loss_is_what_the_sweep_counts(name: str) -> None:
    scheme, weight = Scheme.parse(name), torch.randn(24, 200, dtype=torch.float64)
    solved = gptq(weight, hessian_of(correlated_inputs(1024, 200).double()), scheme)
    assert solved is not None
    check_portable(solved.quantized, scheme, 24, 200)
    change = (weight - weight_of(solved.quantized, scheme, 200))[:, solved.order]
    quadratic = (change @ solved.factor.hessian * change).sum().item()
    assert solved.loss == pytest.approx(quadratic, rel=1e-6)
    # W - Q = E U: the errors that the change implies have that loss too, and only a triangular U makes them.
    errors = torch.linalg.solve_triangular(solved.factor.upper, change, upper=True, left=False)
    assert errors.square().sum().item() == pytest.approx(solved.loss, rel=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("ranges", ["rtn", "mse"])
def test_a_diagonal_hessian_gives_the_codes_of_its_ranges_method(name: str, ranges: str) -> None:
    scheme, weight = Scheme.parse(name), torch.randn(24, 200)
    solved = gptq(weight, torch.diag(torch.rand(200) + 0.5), scheme, (ranges,))
    assert solved is not None
    for key, tensor in quantize_weight(weight, scheme, ranges).tensors().items():
        assert torch.equal(solved.quantized.tensors()[key], tensor), key


def test_a_diagonal_that_drowns_the_rest_gives_rtn() -> None:
    scheme, weight = Scheme.parse("w4a16g128"), torch.randn(24, 256)
    solved = gptq(weight, hessian_of(correlated_inputs(512)) + 1e9 * torch.eye(256), scheme, ("rtn",))
    assert solved is not None
    assert torch.equal(solved.quantized.qweight, quantize_weight(weight, scheme).qweight)


@pytest.mark.parametrize("name", SCHEMES)
def test_blocks_of_any_size_give_equal_codes(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), torch.randn(24, 200).double(), correlated_inputs(1024, 200).double()
    found = [gptq(weight, hessian_of(x), scheme, columns=columns) for columns in (1, 64, 256)]
    assert all(one is not None and torch.equal(one.quantized.qweight, found[0].quantized.qweight) for one in found)  # type: ignore[union-attr]


def test_correlated_inputs_lose_a_part_of_what_rtn_loses() -> None:
    weight = torch.randn(128, 256)
    assert ratio(correlated_inputs(4096), weight, "w4a16g128") <= 0.35


def test_outliers_and_low_rank() -> None:
    weight, x = torch.randn(128, 256), correlated_inputs(4096)
    x[:, [3, 77, 130, 200]] *= 30
    assert ratio(x, weight, "w4a16g128") <= 0.25
    low_rank = torch.randn(4096, 32) @ torch.randn(32, 256) + 0.1 * torch.randn(4096, 256)
    assert ratio(low_rank, weight, "w4a16g128") <= 0.2


def test_independent_inputs_gain_little() -> None:
    assert 0.7 < ratio(torch.randn(4096, 256), torch.randn(128, 256), "w4a16g128") <= 1


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_permuting_the_channels_of_weight_and_inputs_together_changes_no_loss(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), torch.randn(24, 128), correlated_inputs(1024, 128).double()
    order = torch.randperm(128)
    a, b = gptq(weight, hessian_of(x), scheme), gptq(weight[:, order], hessian_of(x[:, order]), scheme)
    assert a is not None
    assert b is not None
    assert a.loss == pytest.approx(b.loss, rel=1e-9)


def test_a_dead_input_keeps_no_weight() -> None:
    scheme, x = Scheme.parse("w4a16g32"), correlated_inputs(512, 64)
    x[:, [3, 40]] = 0
    solved = gptq(torch.randn(8, 64), hessian_of(x), scheme)
    assert solved is not None
    weight = weight_of(solved.quantized, scheme, 64)
    assert torch.isfinite(weight).all()
    assert not weight[:, [3, 40]].any()
    assert weight.any()


class TestLadder:
    scheme = Scheme.parse("w4a8g64")

    def test_eight_rows_of_data_finish_and_say_so(self) -> None:
        found = round_weight(torch.randn(32, 256), self.scheme, "gptq", gathered(torch.randn(8, 256)))
        assert torch.isfinite(weight_of(found.quantized, self.scheme, 256)).all()
        assert any("rows of calibration data for 256 inputs; gptq needs more" in note for note in found.notes)

    def test_a_hessian_without_a_factor_gives_mse_or_rtn(self) -> None:
        weight, inputs = torch.randn(8, 64), gathered(correlated_inputs(512, 64))
        assert inputs.hessian is not None
        inputs.hessian[0, 1] = torch.nan
        found = round_weight(weight, self.scheme, "gptq", inputs)
        assert found.method in ("mse", "rtn")
        assert found.notes[0] == "not gptq: the Hessian is not finite or cannot be factored"
        plain = quantize_weight(weight, self.scheme, found.method)
        assert found.quantized is not None
        assert torch.equal(found.quantized.qweight, plain.qweight)

    def test_worse_than_rtn_on_inputs_held_out_gives_way(self) -> None:
        inputs = gathered(torch.randn(512, 64))
        inputs.hessian.copy_(hessian_of(torch.randn(512, 8) @ torch.randn(8, 64)))  # type: ignore[union-attr]
        found = round_weight(torch.randn(8, 64), self.scheme, "gptq", inputs)
        assert found.method in ("mse", "rtn")
        assert found.notes[0].startswith("not gptq: its loss on held-out data is ")

    @pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, 3e38])
    def test_without_usable_inputs_it_is_rtn(self, value: float) -> None:
        weight = torch.randn(8, 64)
        found = round_weight(weight, self.scheme, "gptq", gathered(torch.full((40, 64), value)))
        assert found.method == "rtn"
        assert "rtn instead of gptq: no calibration data" in found.notes[-1]

    @pytest.mark.parametrize("method", ["mse", "gptq"])
    def test_never_worse_on_inputs_held_out(self, method: str) -> None:
        for seed in range(8):
            torch.manual_seed(seed)
            weight, inputs = torch.randn(16, 64).pow(3), gathered(torch.randn(96, 64).pow(3))
            found, nearest = (round_weight(weight, self.scheme, m, inputs) for m in (method, "rtn"))
            ours, theirs = (loss(inputs.held_out, weight, one, self.scheme) for one in (found, nearest))
            assert ours <= theirs * (1 + 1e-6)
