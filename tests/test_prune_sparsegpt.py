"""SparseGPT: the identity behind its updates, exact counts, and the limits in which it is something simpler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.model.inputs import Inputs
from nybble.passes.layerwise import factor as factor_module
from nybble.passes.layerwise.factor import factorize
from nybble.passes.layerwise.outcome import Outcome
from nybble.passes.layerwise.sweep import FixedMask, Rounder, sweep
from nybble.passes.prune.choosers import chooser
from nybble.passes.prune.masks import keep_mask, wanda_scores
from nybble.passes.prune.refit import refit
from nybble.passes.prune.sparsegpt import sparsegpt
from nybble.passes.prune.weight import Task, prune_weight
from nybble.testing.models import correlated_inputs as ar_inputs
from nybble.testing.models import gathered
from nybble.weights.rounding import check_portable, dequantize_weight, unpack_nibbles
from nybble.weights.scheme import Scheme
from nybble.weights.sparsity import Block, Pattern

PATTERNS = ["50%", "70%", "2:4", "4:8", "24:48", "64:128", "32:128", "16:128", "bs16x16:50%"]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def loss(x: Tensor, weight: Tensor, new: Tensor) -> float:
    return (x @ (weight - new).T).square().sum().item()


def prune(weight: Tensor, text: str, method: str, inputs: Inputs | None = None, scheme: str | None = None) -> Outcome:
    numbers = None if scheme is None else Scheme.parse(scheme)
    return prune_weight(weight, Task(Pattern.parse(text), method, numbers), inputs)


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


@pytest.mark.parametrize("text", [*PATTERNS, "dense"])
@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8g32"])
def test_errors_times_the_factor_are_the_change(text: str, scheme: str | None) -> None:
    x = ar_inputs(1024).double()
    columns = torch.randn(256, 24, dtype=torch.float64)
    weight = columns.T.clone()
    found = factorize(hessian_of(x))
    assert found is not None
    chosen = (
        FixedMask(torch.ones(256, 24, dtype=torch.bool)) if text == "dense" else chooser(Pattern.parse(text), columns)
    )
    rounder = None if scheme is None else Rounder(Scheme.parse(scheme), columns)
    keep, errors = sweep(columns, found.upper, chosen, rounder)
    change = weight - columns.T
    assert (columns[~keep] == 0).all()
    if text == "dense" and scheme is None:
        assert not change.any()
        return
    assert ((change - errors.T @ found.upper).norm() / change.norm()).item() < 1e-10
    quadratic = (change @ found.hessian * change).sum()
    assert errors.square().sum().item() == pytest.approx(quadratic.item(), rel=1e-9)


@pytest.mark.parametrize("text", ["50%", "70%", "2:4", "32:128", "bs16x16:50%"])
@pytest.mark.parametrize("k", [128, 300])
def test_a_diagonal_hessian_gives_wandas_mask_and_untouched_weights(text: str, k: int) -> None:
    weight, norms = torch.randn(48, k), torch.rand(k) + 0.5
    pattern = Pattern.parse(text)
    solved = sparsegpt(weight, torch.diag(norms.square()), pattern)
    assert solved is not None
    # Damping adds the same to all of the diagonal: of the scores that are compared it is part.
    damped = solved.factor.hessian.diagonal().sqrt()
    if isinstance(pattern.sparsity, Block):
        assert (~solved.keep).sum() > 0
    else:
        assert torch.equal(solved.keep, keep_mask(wanda_scores(weight, damped), pattern))
    assert torch.equal(solved.weight, torch.where(solved.keep, weight, 0))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("k", [256, 300])
def test_counts_are_exact(text: str, k: int) -> None:
    pattern = Pattern.parse(text)
    solved = sparsegpt(torch.randn(32, k), hessian_of(ar_inputs(512, k)), pattern, Scheme.parse("w8a8"))
    assert solved is not None
    wanted = keep_mask(torch.rand(32, k), pattern)
    if isinstance(pattern.sparsity, Block):
        assert (~solved.keep)[::16, ::16].sum() == (~wanted)[::16, ::16].sum()
    else:
        assert solved.keep.sum(1).tolist() == wanted.sum(1).tolist()
    if text == "2:4":
        assert (solved.keep.view(32, -1, 4).sum(-1) == 2).all()
    assert (solved.weight[~solved.keep] == 0).all()


@pytest.mark.parametrize("scheme", [None, "w8a8"])
@pytest.mark.parametrize(
    ("text", "at_most"),
    [("50%", 0.25), ("2:4", 0.25), ("4:8", 0.25), ("64:128", 0.25), ("70%", 0.32), ("32:128", 0.35)],
)
def test_correlated_inputs_lose_a_part_of_what_magnitude_loses(text: str, at_most: float, scheme: str | None) -> None:
    weight, x = torch.randn(128, 256), ar_inputs(4096)
    inputs = gathered(x)
    magnitude = loss(x, weight, prune(weight, text, "magnitude").weight)
    ours = prune(weight, text, "sparsegpt", inputs, scheme)
    assert ours.method == "sparsegpt"
    assert loss(x, weight, ours.weight) / magnitude < at_most
    assert loss(x, weight, prune(weight, text, "wanda", inputs).weight) / magnitude == pytest.approx(1, abs=0.05)


def test_refit_finds_the_least_squares_of_the_mask() -> None:
    x = ar_inputs(512, 64).double()
    hessian, weight = hessian_of(x), torch.randn(3, 64, dtype=torch.float64)
    hessian += 0.3 * hessian.diagonal().mean() * torch.eye(64)  # 10 steps are enough where it is well conditioned
    keep = torch.rand(3, 64) < 0.5
    found = refit(torch.where(keep, weight, 0), keep, weight, hessian)
    for row, (mask, wanted) in enumerate(zip(keep, weight, strict=True)):
        best = torch.linalg.solve(hessian[mask][:, mask], (hessian @ wanted)[mask])
        torch.testing.assert_close(found[row][mask], best, rtol=1e-2, atol=1e-2)
    assert (found[~keep] == 0).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a8g32", "w4a16g128"])
def test_codes_are_of_the_portable_layout_and_say_the_weight(scheme: str) -> None:
    numbers = Scheme.parse(scheme)
    solved = sparsegpt(torch.randn(16, 201), hessian_of(ar_inputs(512, 201)), Pattern.parse("50%"), numbers)
    assert solved is not None
    assert solved.quantized is not None
    check_portable(solved.quantized, numbers, 16, 201)
    assert torch.equal(dequantize_weight(solved.quantized, numbers, 201), solved.weight)
    codes = solved.quantized.qweight if numbers.weight_bits == 8 else unpack_nibbles(solved.quantized.qweight, 201)
    assert (codes[~solved.keep] == (0 if numbers.weight_bits == 8 else 8)).all()


def test_eight_rows_of_data_finish_and_say_so() -> None:
    weight, x = torch.randn(32, 256), torch.randn(8, 256)
    found = prune(weight, "50%", "sparsegpt", gathered(x), "w8a8")
    assert torch.isfinite(found.weight).all()
    assert any("rows of calibration data for 256 inputs" in note for note in found.notes)


def test_a_dead_input_keeps_no_weight() -> None:
    x = ar_inputs(512, 64)
    x[:, [3, 40]] = 0
    solved = sparsegpt(torch.randn(8, 64), hessian_of(x), Pattern.parse("50%"))
    assert solved is not None
    assert torch.isfinite(solved.weight).all()
    assert not solved.weight[:, [3, 40]].any()
    assert (~solved.keep[:, [3, 40]]).all()


def test_a_weight_makes_up_for_what_changed_before_it() -> None:
    weight, dense = torch.randn(64, 128), ar_inputs(4096, 128)
    x = dense * (1 - 0.2 * torch.rand(128))  # the layers before put out less than they did
    plain, drifted = Inputs(128, hessian=True), Inputs(128, hessian=True)
    plain.add(x)
    drifted.add(x, dense)
    assert plain.drift is None
    assert drifted.drift is not None
    seen = torch.tensor([i for i in range(4096) if i % 8 != 7 or i >= 8 * 256])
    torch.testing.assert_close(drifted.drift, 2 / len(seen) * (dense - x)[seen].T @ x[seen], rtol=1e-4, atol=1e-5)
    without, with_drift = (prune(weight, "50%", "sparsegpt", inputs).weight for inputs in (plain, drifted))
    errors = [(dense @ weight.T - x @ new.T).square().sum().item() for new in (without, with_drift)]
    assert errors[1] < 0.95 * errors[0]


class TestLadder:
    def test_damping_rises_until_it_factors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original, tries = factor_module._upper, [0]

        def stubborn(damped: Tensor) -> Tensor | None:
            tries[0] += 1
            return None if tries[0] < 4 else original(damped)

        monkeypatch.setattr(factor_module, "_upper", stubborn)
        found = factorize(torch.eye(4))
        assert found is not None
        assert found.note == "damping 0.04 instead of 0.01"
        assert found.hessian[0, 0].item() == pytest.approx(1.04)

    def test_a_hessian_that_is_not_positive_takes_the_floor_or_nothing(self) -> None:
        found = factorize(torch.tensor([[1.0, 2.05], [2.05, 1.0]]))
        assert found is None
        lifted = factorize(torch.tensor([[1.0, 1.5], [1.5, 1.0]]))
        assert lifted is not None
        assert lifted.note is not None

    def test_without_a_factor_it_is_wanda(self) -> None:
        weight, inputs = torch.randn(8, 64), gathered(ar_inputs(512, 64))
        assert inputs.hessian is not None
        inputs.hessian[0, 1] = torch.nan
        found = prune(weight, "50%", "sparsegpt", inputs)
        assert found.method == "wanda"
        assert found.notes == (
            "wanda instead of sparsegpt: the Hessian cannot be factored, or the result is not finite",
        )
        assert torch.equal(found.weight, prune(weight, "50%", "wanda", inputs).weight)

    def test_worse_than_wanda_on_inputs_held_out_is_wanda(self) -> None:
        inputs = gathered(torch.randn(512, 64))
        inputs.hessian.copy_(torch.eye(64) + 0.999 * (1 - torch.eye(64)))  # type: ignore[union-attr]
        found = prune(torch.randn(8, 64), "50%", "sparsegpt", inputs)
        assert found.method == "wanda"
        assert "its loss on held-out data" in found.notes[0]

    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    @pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, 3e38])
    def test_without_usable_inputs_it_is_magnitude(self, method: str, value: float) -> None:
        weight = torch.randn(8, 64)
        found = prune(weight, "50%", method, gathered(torch.full((40, 64), value)))
        assert found.method == "magnitude"
        assert f"magnitude instead of {method}" in found.notes[-1]
        assert torch.equal(found.weight, prune(weight, "50%", "magnitude").weight)

    def test_a_bad_batch_is_left_out_and_counted(self) -> None:
        x = ar_inputs(256, 64)
        bad = x[:16].clone()
        bad[3, 5] = torch.nan
        clean, dirty = gathered(x), Inputs(64, hessian=True)
        for batch in (bad, x):
            dirty.add(batch)
        weight = torch.randn(8, 64)
        a, b = (prune(weight, "50%", "wanda", inputs) for inputs in (clean, dirty))
        assert torch.equal(a.weight, b.weight)
        assert b.notes == ("1 batches with NaN or Inf left out",)

    def test_beyond_the_range_of_the_weights_dtype_it_is_wanda(self) -> None:
        weight = torch.full((4, 64), 60000.0, dtype=torch.float16)
        found = prune(
            weight, "50%", "sparsegpt", gathered(torch.randn(512, 1).expand(512, 64) + 1e-3 * torch.randn(512, 64))
        )
        assert torch.isfinite(found.weight).all()
        assert found.method == "wanda"


class TestInputs:
    def test_statistics_are_those_of_the_rows_not_held_out(self) -> None:
        x = torch.randn(100, 16)
        inputs = Inputs(16, hessian=True)
        for batch in x.split(40):
            inputs.add(batch)
        held = torch.cat([batch[7::8] for batch in x.split(40)])
        seen = torch.cat([batch[[i for i in range(len(batch)) if i % 8 != 7]] for batch in x.split(40)])
        assert torch.equal(inputs.held_out, held)
        assert inputs.rows == len(seen) == 100 - len(held)
        torch.testing.assert_close(inputs.norms, seen.double().norm(dim=0))
        torch.testing.assert_close(inputs.hessian, 2 / len(seen) * seen.T @ seen)

    def test_no_more_than_256_rows_are_held(self) -> None:
        inputs = Inputs(4)
        for _ in range(5):
            inputs.add(torch.randn(1000, 4))
        assert len(inputs.held_out) == 256
        assert inputs.rows == 5000 - 256
        assert inputs.hessian is None

    def test_few_rows_are_not_held_out(self) -> None:
        inputs = Inputs(4)
        inputs.add(torch.ones(3, 4))
        assert inputs.rows == len(inputs.held_out) == 3
