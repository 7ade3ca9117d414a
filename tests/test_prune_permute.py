"""The search for an order of inputs that keeps more, and what it does to a model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.passes.prune.permute import kept_score, search
from nybble.weights.sparsity import NofM

TWO_OF_FOUR = NofM(2, 4)


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def brute_force(weight: Tensor, m: int, n: int) -> float:
    """The best kept score over all ways to split the inputs into two groups."""
    k = weight.shape[1]
    best = 0.0
    for half in itertools.combinations(range(k), m):
        if 0 in half:
            rest = [i for i in range(k) if i not in half]
            groups = (weight[:, list(half)], weight[:, rest])
            best = max(best, sum(g.double().abs().sort(descending=True).values[:, :n].sum().item() for g in groups))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_eight_inputs_get_the_best_of_all_35_partitions(seed: int) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    order = search(weight, TWO_OF_FOUR)
    assert sorted(order.tolist()) == list(range(8))
    assert kept_score(weight[:, order], TWO_OF_FOUR) == pytest.approx(brute_force(weight, 4, 2), rel=1e-12)


@pytest.mark.parametrize("form", [NofM(2, 4), NofM(1, 4), NofM(3, 4), NofM(4, 8), NofM(8, 32)], ids=str)
def test_no_exchange_of_two_inputs_is_left_that_keeps_more(form: NofM) -> None:
    weight = torch.randn(12, 4 * form.m).exp()
    order = search(weight, form)
    assert sorted(order.tolist()) == list(range(4 * form.m))
    score = kept_score(weight[:, order], form)
    assert score > kept_score(weight, form) * 1.001
    for i, j in itertools.combinations(range(0, 4 * form.m, 3), 2):
        other = order.clone()
        other[[i, j]] = order[[j, i]]
        assert kept_score(weight[:, other], form) <= score * (1 + 2e-6)
    assert torch.equal(search(weight, form), order)


def test_columns_that_compete_are_parted() -> None:
    weight = torch.full((3, 16), 0.1)
    weight[:, :8] = 5.0  # eight large ones side by side: in order, four of them would go
    order = search(weight, TWO_OF_FOUR)
    assert kept_score(weight[:, order], TWO_OF_FOUR) == pytest.approx(3 * 8 * 5)


def test_an_incomplete_group_is_refused() -> None:
    with pytest.raises(ValueError, match="has 10 inputs: must be a multiple of m=4"):
        search(torch.randn(3, 10), TWO_OF_FOUR)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16)
        with torch.no_grad():
            self.fc2.weight.copy_(torch.randn(16, 32).exp() * torch.randn(32).exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32, bias=False), nn.Linear(16, 32)
        self.down_proj = nn.Linear(32, 16)
        with torch.no_grad():
            self.down_proj.weight.copy_(torch.randn(16, 32).exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def sparsify(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    options = {"method": "magnitude", "scheme": None, "permute": True, **kwargs}
    report = nybble.sparsify(model, "2:4", **options)
    return {layer.name: layer.pruned for layer in report.layers}


@pytest.mark.parametrize("kind", [Mlp, Gated])
def test_the_permuted_model_computes_the_same(kind: type[nn.Module]) -> None:
    """All weights are put back into the permuted places: nothing else may have moved."""
    model = kind()
    names = [name for name, _ in model.named_children() if name != "act"]
    original, x = copy.deepcopy(model), torch.randn(64, 16)
    found = sparsify(model, calibration=[x])
    last, first = names[-1], names[0]
    assert found[last].permutation_gain > 0.001
    assert found[first].permutation_gain is None
    # The order, from the biases' new places, undoes it.
    made = model.get_submodule("up_proj" if kind is Gated else "fc1")
    was = original.get_submodule("up_proj" if kind is Gated else "fc1")
    order = torch.tensor([int((was.bias == value).nonzero()) for value in made.bias])
    kept = model.get_submodule(last).weight != 0
    assert torch.equal(model.get_submodule(last).weight, original.get_submodule(last).weight[:, order] * kept)
    for name in names[:-1]:
        new, old = model.get_submodule(name).weight, original.get_submodule(name).weight[order]
        assert torch.equal(new, torch.where(new != 0, old, 0))


def test_it_keeps_more_and_loses_less() -> None:
    model, x = Mlp(), torch.randn(256, 16)
    plain = copy.deepcopy(model)
    with_order, without = sparsify(model, calibration=[x]), sparsify(plain, calibration=[x], permute=False)
    magnitude = [m.fc2.weight.abs().sum().item() for m in (model, plain)]
    assert magnitude[0] / magnitude[1] - 1 == pytest.approx(with_order["fc2"].permutation_gain, rel=1e-3)
    assert without["fc2"].permutation_gain is None


def test_chains_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    found = sparsify(model, permute=[("0", "2")])
    assert found["2"].permutation_gain > 0


def test_an_illegal_fold_is_undone_and_said() -> None:
    model, x = Mlp(nn.LayerNorm(32)), torch.randn(32, 16)
    with torch.no_grad():
        model.act.weight.copy_(torch.randn(32))
    plain = copy.deepcopy(model)
    found = sparsify(model, calibration=[x])
    sparsify(plain, calibration=[x], permute=False)
    assert found["fc2"].permutation_gain is None
    assert "not only elementwise operations lie between the layers" in found["fc2"].notes[-1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


class Tied(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 32)
        self.other.weight = self.fc1.weight


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Tied(), {}, "fc1 shares its weight"),
        (Mlp(), {"exclude": "fc1"}, "fc1 is left alone"),
        (
            nn.Sequential(nn.Linear(8, 12), nn.Linear(16, 8)),
            {"permute": [("0", "1")]},
            "0 has 12 outputs for 16 inputs",
        ),
        (
            nn.Sequential(nn.Linear(8, 18), nn.Linear(18, 8)),
            {"permute": [("0", "1")]},
            "18 inputs are not a multiple of 4",
        ),
    ],
)
def test_what_cannot_be_folded_is_said(model: nn.Module, options: dict[str, Any], why: str) -> None:
    notes = [note for pruned in sparsify(model, **options).values() if pruned for note in pruned.notes]
    assert f"inputs not permuted: {why}" in notes


@pytest.mark.parametrize(
    ("permute", "error", "rule"),
    [
        ("fc1", TypeError, "permute='fc1': must be True, False"),
        ([("fc1",)], TypeError, "at least two module names"),
        ([("fc1", 2)], TypeError, "at least two module names"),
        ([("fc1", "fc3")], ValueError, "permute: 'fc3' is not a Linear layer"),
    ],
)
def test_bad_chains(permute: Any, error: type[Exception], rule: str) -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=rule):
        sparsify(model, permute=permute)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
