"""Modules with several weights are opened for a pass, and closed again if they stayed dense."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import nybble
from nybble.checkpoint.files import CheckpointError
from nybble.model.opened import opened
from nybble.nn import kinds
from nybble.nn.composite import CompositeKind, CompositeModule
from nybble.recipe.recipe import Recipe, Stage

from .small_quantize import rows


class Twice(nn.Module):
    """y = relu(x first^T) second^T."""

    def __init__(self, size: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, size) / size**0.5)
        self.second = nn.Parameter(torch.randn(size, hidden) / hidden**0.5)

    def forward(self, x):
        return functional.relu(x @ self.first.T) @ self.second.T


class OpenTwice(CompositeModule):
    def __init__(self, dense: Twice) -> None:
        super().__init__({name: _linear(weight) for name, weight in dense._parameters.items()})

    def forward(self, x):
        return self.second(functional.relu(self.first(x)))

    def close(self):
        new = Twice.__new__(Twice)
        nn.Module.__init__(new)
        for member, name in zip(self.members(), ("first", "second"), strict=True):
            weight = member.weight if isinstance(member, nn.Linear) else nn.Parameter(member.dequantized_weight())
            new.register_parameter(name, weight)
        return new


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


KIND = CompositeKind("Twice", lambda module: type(module) is Twice, OpenTwice)


@pytest.fixture(autouse=True)
def with_kind(monkeypatch):
    kinds.forget_kinds()
    monkeypatch.setattr(kinds, "BUILT_IN", (*kinds.BUILT_IN, KIND))
    yield
    monkeypatch.undo()
    kinds.forget_kinds()


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), Twice()).eval()


def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 32) for _ in range(4)]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_members_are_quantized_and_reported(method):
    model, dense = make(), make()
    data = None if method == "rtn" else batches()
    report = nybble.quantize(model, "w4a8", goal="memory", method=method, calibration=data)
    assert [row.name for row in report.layers] == ["0", "1.first", "1.second"]
    assert report.coverage == 100
    assert isinstance(model[1], OpenTwice)
    assert all(isinstance(one, nybble.nn.Linear) for one in model[1].members())
    x = batches()[0]
    assert (model(x) - dense(x)).norm() < 0.2 * dense(x).norm()


def test_what_stays_dense_is_the_very_same():
    model = make()
    before = model[1]
    weights = list(before.parameters())
    report = nybble.quantize(model, "w8a8", goal="memory", exclude="1")
    assert model[1] is before
    assert all(a is b for a, b in zip(before.parameters(), weights, strict=True))
    assert {row.name: row.reason for row in report.left} == dict.fromkeys(["1.first", "1.second"], "excluded by '1'")


def test_after_an_exception_the_model_is_the_same():
    model = make()
    before = list(model)
    with torch.no_grad():
        model[1].second[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"strict=True: 1 of 3 .*1\.second"):
        nybble.quantize(model, "w8a8", goal="memory", strict=True)
    with pytest.raises(ValueError, match="nothing"):
        nybble.quantize(model, "w8a8", method="nothing")
    with pytest.raises(RuntimeError):
        nybble.quantize(model, "w4a8", goal="memory", method="gptq", calibration=[torch.randn(4, 7)])
    assert list(model) == before


def test_without_rollback_the_dense_memory_is_not_kept():
    model = make()
    report = nybble.quantize(model, "w8a8", goal="memory", exclude="1.second", rollback=False)
    assert rows(report)["1.first"].swapped
    assert isinstance(model[1].second, nn.Linear)
    model = make()
    expected = model(batches()[0])
    nybble.quantize(model, "w8a8", goal="memory", exclude=["0", "1"], rollback=False)
    assert type(model[1]) is Twice
    assert torch.equal(model(batches()[0]), expected)


def test_pruned_members_are_put_back():
    model = make()
    nybble.sparsify(model, "2:4", method="magnitude", scheme=None)
    assert type(model[1]) is Twice
    assert (model[1].first == 0).float().mean() == 0.5


def test_save_and_load(tmp_path):
    model = make()
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path / "model")
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    nybble.load(fresh, tmp_path / "model")
    x = batches()[0]
    assert torch.equal(fresh(x), model(x))
    nybble.load(model, tmp_path / "model")
    assert torch.equal(fresh(x), model(x))
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    model = make()
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path / "model")
    other = nn.Sequential(nn.Linear(32, 32), Twice(hidden=48))
    before = list(other)
    with pytest.raises(CheckpointError, match=r"1\.first"):
        nybble.load(other, tmp_path / "model")
    assert list(other) == before


def test_sensitivity_plan_and_recover_see_members():
    model, reference = make(), make()
    data = batches()
    found = nybble.sensitivity(model, ("w8a8", "w4a8"), data)
    assert {layer.name for layer in found.layers} == {"0", "1.first", "1.second"}
    assert type(model[1]) is Twice
    nybble.quantize(model, "w4a8", goal="memory")
    done = nybble.recover(model, reference, data)
    assert done.after <= done.before
    assert type(reference[1]) is Twice
    assert isinstance(model[1].first, nybble.nn.Linear)


def test_a_recipe_with_schemes_by_layer():
    model = make()
    recipe = Recipe((Stage("quantize", {"layers": {"1.first": "w8a8", "0": "w4a8"}, "goal": "memory"}),))
    nybble.optimize(model, recipe)
    assert str(model[1].first.scheme) == "w8a8"
    assert type(model[1].second) is nn.Linear


def test_hooks_keep_a_module_closed():
    model = make()
    model[1].register_forward_hook(lambda *_: None)
    report = nybble.quantize(model, "w8a8", goal="memory")
    assert type(model[1]) is Twice
    assert "forward hooks" in rows(report)["1.first"].reason


def test_a_model_that_is_one_module_with_several_weights():
    with pytest.raises(ValueError, match="Twice: is itself"):
        nybble.quantize(Twice(), "w8a8")


def test_watched():
    model = make()
    with opened(model):
        one = model[1]
        with torch.no_grad():
            assert not one.is_watched()
        assert one.is_watched()
        handle = one.first.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert one.is_watched()
            handle.remove()
            assert not one.is_watched()
            first, one.first = one.first, nn.Identity()
            assert one.is_watched()
            one.first = first


def test_copies():
    model = make()
    nybble.quantize(model, "w8a8", goal="memory")
    x = batches()[0]
    assert torch.equal(copy.deepcopy(model)(x), model(x))
