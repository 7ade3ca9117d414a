"""The float layer that recovery trains in place of a quantized one: its codes, gradients, learning rate, closed form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nybble.nn import Linear
from nybble.passes.recovery import train as training
from nybble.passes.recovery.correct import Sums
from nybble.passes.recovery.shadow import Shadow, round_through
from nybble.passes.recovery.train import Fit, Task, search
from nybble.testing.models import give_scheme, weight_of

SCHEMES = ["w8a8", "w8a16", "w4a16g32", "w4a8g32asym", "w4a16", "sp50w8a16", "sp24w4a16g32", "sp24w8a8"]


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


class TestShadow:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_at_first_it_is_the_layer_code_by_code(self, scheme: str) -> None:
        dense = nn.Linear(96, 24)
        model = nn.Sequential(copy.deepcopy(dense))
        give_scheme(model, scheme)
        layer = model[0]
        assert isinstance(layer, Linear)
        shadow = Shadow(layer, dense)
        made = shadow.make()
        assert type(made) is type(layer)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(made.state_dict()[name], tensor), name
        x = torch.randn(5, 96)
        if layer.scheme.act_bits == 16:
            torch.testing.assert_close(shadow(x), layer(x), rtol=1e-4, atol=1e-4)

    def test_the_gradient_is_one_inside_the_range_and_zero_outside(self) -> None:
        dense = nn.Linear(32, 4)
        shadow = Shadow(Linear.from_dense(dense, "w4a16"), dense)
        with torch.no_grad():
            shadow.latent[0, 0], shadow.latent[0, 1], shadow.latent[0, 2] = 9.0, -9.0, 3.3
        (gradient,) = torch.autograd.grad(shadow.codes().sum(), shadow.latent)
        assert gradient[0, :3].tolist() == [0, 0, 1]
        assert shadow.codes()[0, :3].tolist() == [7, -8, 3]
        x = torch.tensor([0.4, 1.6], requires_grad=True)
        round_through(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1, 1]

    def test_zeros_of_a_sparse_layer_have_no_gradient(self) -> None:
        model = nn.Sequential(nn.Linear(32, 16))
        dense = copy.deepcopy(model[0])
        give_scheme(model, "sp24w8a16")
        shadow = Shadow(model[0], dense)
        (gradient,) = torch.autograd.grad(shadow(torch.randn(3, 32)).square().sum(), shadow.latent)
        assert not gradient[weight_of(model[0]) == 0].any()
        assert gradient.any()

    def test_search_leaves_it_as_it_was(self) -> None:
        layer = nn.Linear(8, 8)
        shadow = Shadow(Linear.from_dense(layer, "w8a16"), layer)
        before = [p.clone() for p in shadow.parameters()]
        x, y = torch.randn(4, 8), torch.randn(4, 8)
        assert search(Task([shadow], lambda _: (shadow(x) - y).square().mean(), [0, 1], [0]), 0, 2) == 4e-3
        assert all(torch.equal(a, b) for a, b in zip(before, shadow.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("losses", "short", "long"),
        [
            ((0.9, 0.8, 0.95), 1.5e-3, 4e-3),
            ((0.9, 0.8, 0.99), 1.5e-3, 1.5e-3),
            ((0.8, 0.98, 1.0), 5e-4, 5e-4),
            ((1.0, 1.0, 1.0), 5e-4, 5e-4),
        ],
    )
    def test_a_long_run_takes_the_largest_rate_that_gets_somewhere(
        self, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...], short: float, long: float
    ) -> None:
        ends = dict(zip(training.RATES, losses, strict=True))
        monkeypatch.setattr(training, "train", lambda _, rate, *__: Fit(1.0, ends[rate], 1, rate, ""))
        task = Task([], lambda _: torch.zeros(()), [0], [0])
        assert (search(task, 0, 8), search(task, 0, 10_000)) == (short, long)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_closed_form_is_the_least_squares_line(has_bias: bool) -> None:
    z = torch.randn(50, 3, dtype=torch.float64)
    y = 1.3 * z + 0.4 + 0.1 * torch.randn_like(z)
    sums = Sums(3)
    for rows in range(0, 50, 10):
        sums.add(z[rows : rows + 10], y[rows : rows + 10])
    slope, offset = sums.line(has_bias)
    for n in range(3):
        columns = [z[:, n], torch.ones(50, dtype=torch.float64)] if has_bias else [z[:, n]]
        solution = torch.linalg.lstsq(torch.stack(columns, 1), y[:, n]).solution
        assert slope[n] == pytest.approx(float(solution[0]))
        assert offset[n] == pytest.approx(float(solution[1]) if has_bias else 0.0)
