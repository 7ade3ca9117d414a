"""quantize and sparsify with static activations: what is observed when, and which layers stay dynamic."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.model.observe import OBSERVERS, Observer
from nybble.nn import Linear
from nybble.passes.layerwise import static
from nybble.passes.recovery.shadow import Shadow
from nybble.report.report import Report
from nybble.testing.models import Stack, token_batches


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def small(model: nn.Module, scheme: str = "w8a8static", **kwargs: Any) -> Report:
    own = {"exclude": "embed"} if hasattr(model, "embed") else {}  # which has no activations
    return nybble.quantize(model, scheme, **{**own, "goal": "memory", "calibration": token_batches(8), **kwargs})


def after(report: Report) -> dict[str, str]:
    return {row.name: row.after for row in report.swapped}


class One(nn.Module):
    """One layer, whose inputs are what it is called with."""

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.layer = nn.Linear(k, 16)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def error(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    return ((model(x) - dense(x)).norm() / dense(x).norm()).item()


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("scheme", ["w8a8static", "w4a8g32static", "w4a8asymstatic"])
def test_a_model_of_static_layers(scheme: str, observer: str) -> None:
    model = Stack()
    dense = copy.deepcopy(model)
    report = small(model, scheme, observer=observer)
    found = after(report)
    assert len(found) == 8
    assert sum(name == scheme for name in found.values()) >= 6
    for name, one in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear)
        assert str(layer.scheme) == one
    x = token_batches(1, seed=7)[0]
    assert error(model, dense, x) < (0.03 if "w8" in scheme else 0.25)
    assert scheme in str(report)
    rows = {row["name"]: row for row in json.loads(report.to_json())["layers"]}
    assert rows["first"]["after"] == found["first"]


@pytest.mark.parametrize("options", [{"method": name} for name in ("mse", "gptq", "awq")] + [{"smooth": True}], ids=str)
def test_with_every_method(options: dict[str, Any]) -> None:
    model = Stack()
    dense = copy.deepcopy(model)
    report = small(model, "w4a8g32static", **options)
    assert list(after(report).values()).count("w4a8g32static") >= 6
    assert error(model, dense, token_batches(1, seed=7)[0]) < 0.25


def test_hqq_too() -> None:
    assert "w4a8g64static" in after(small(Stack(), "w4a8g64static", method="hqq")).values()


@pytest.mark.parametrize("pattern", ["50%", "2:4", "bs16x4:50%"])
def test_sparse_layers(pattern: str) -> None:
    model = Stack()
    report = nybble.sparsify(
        model, pattern, scheme="w8a8static", observer="minmax", calibration=token_batches(8), goal="memory"
    )
    assert len(report.swapped) == 8
    assert all(row.after.endswith("w8a8static") for row in report.swapped), after(report)
    assert torch.isfinite(model(token_batches(1)[0])).all()


def test_the_range_is_that_of_the_inputs_as_they_are_then() -> None:
    """Of a later block: what the quantized layers before it put out, without the rows held out."""
    model = Stack(depth=2)
    small(model, observer="minmax")
    layer, x = model.get_submodule("blocks.1.up"), []
    layer.register_forward_pre_hook(lambda _, args: x.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in token_batches(8):
            model(batch)
    low, high = torch.aminmax(torch.cat(x))
    step = layer.act_scale.item()
    lowest, highest = ((code - layer.act_zero_point.item()) * step for code in (-128, 127))
    assert lowest == pytest.approx(low.item(), rel=0.15)
    assert highest == pytest.approx(high.item(), rel=0.15)


def test_scaled_inputs_are_observed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a norm has taken SmoothQuant's division, its readers' range is another."""
    seen: list[tuple[float, float]] = []
    original = Observer.range

    def spy(self: Observer, steps: int) -> tuple[float, float]:
        seen.append(original(self, steps))
        return seen[-1]

    model = Stack(depth=2)
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight[3] = 40.0
    plain = copy.deepcopy(model)
    monkeypatch.setattr(Observer, "range", spy)
    report = small(model, smooth=0.5, observer="minmax")
    smoothed, seen = seen, []
    assert any("inputs scaled" in note for row in report.swapped for note in row.rounded.notes)
    monkeypatch.setattr(Observer, "range", lambda self, steps: seen.append(original(self, steps)) or seen[-1])
    small(plain, observer="minmax")
    widths, before = ([high - low for low, high in ranges] for ranges in (smoothed, seen))
    assert min(now / then for now, then in zip(widths, before, strict=True)) < 0.5


def planted(rows: int = 512, size: float = 400.0) -> list[torch.Tensor]:
    """Batches of which one row in 128 has one huge value."""
    x = torch.randn(rows, 32)
    x[::128, 5] = size
    return list(x.split(128))


def test_an_outlier_that_was_planted_costs_less_with_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_MAX_RATIO", 1e9)  # whatever is lost is kept
    dense, x, errors = One(), torch.randn(256, 32), {}
    for observer in ("minmax", "percentile"):
        model = copy.deepcopy(dense)
        small(model, observer=observer, calibration=planted())
        assert model.layer.scheme.static
        errors[observer] = error(model, dense, x)
    assert errors["percentile"] < 0.1 * errors["minmax"]


def test_mse_weighs_an_outlier_against_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_MAX_RATIO", 1e9)
    dense, x, errors = One(), torch.randn(256, 32), {}
    calibration = torch.randn(40000, 32)
    calibration[0, 5] = 16.0
    for observer in ("minmax", "mse"):
        model = copy.deepcopy(dense)
        small(model, observer=observer, calibration=[calibration])
        errors[observer] = error(model, dense, x)
    assert errors["mse"] < 0.85 * errors["minmax"]


def test_a_layer_that_loses_too_much_is_dynamic_and_the_report_says_so() -> None:
    """A row that is far larger than the rest: no one scale serves both."""
    model = One()
    calibration = torch.randn(512, 32)
    calibration[0] = 1e4
    report = small(model, observer="minmax", calibration=list(calibration.split(64)))
    (row,) = report.swapped
    assert row.after == "w8a8"
    assert not model.layer.scheme.static
    assert any(note.startswith("dynamic activations: a static scale has an output error") for note in row.rounded.notes)
    assert "dynamic activations" in str(report)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(64, 32), "no calibration data that is finite and not all zero"),
        (torch.full((64, 32), torch.nan), "no calibration data that is finite and not all zero"),
        (torch.full((64, 32), 1e-39), "must be in [2^-126, 2^126]"),
    ],
    ids=["zeros", "nan", "subnormal"],
)
def test_inputs_without_a_range_leave_a_layer_dynamic(x: torch.Tensor, words: str) -> None:
    model = One()
    report = small(model, calibration=[x])
    (row,) = report.swapped
    assert row.after == "w8a8"
    assert any(note.startswith("dynamic activations: ") and words in note for note in row.rounded.notes)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    "x",
    [torch.full((64, 32), 0.7), torch.rand(64, 32), -torch.rand(64, 32), torch.rand(64, 32) + 100],
    ids=["equal", "positive", "negative", "far"],
)
def test_one_sided_inputs(x: torch.Tensor, observer: str) -> None:
    model = One()
    dense = copy.deepcopy(model)
    small(model, observer=observer, calibration=[x])
    assert model.layer.scheme.static
    assert error(model, dense, x) < 0.02


def test_padding_and_bad_batches_do_not_count() -> None:
    x, mask = torch.randn(8, 16, 32), torch.ones(8, 16, dtype=torch.int64)
    x[:, 12:], mask[:, 12:] = 1e4, 0
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    model = One()
    batches = [{"x": x, "attention_mask": mask}, {"x": bad, "attention_mask": mask}]
    report = small(model, observer="minmax", calibration=batches)
    assert model.layer.act_scale.item() < 0.1
    assert any("1 batches with NaN or Inf left out" in note for note in report.swapped[0].rounded.notes)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.again = self.other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.again(self.other(self.two(self.one(x))))
        return out


def test_layers_with_several_inputs_stay_dynamic() -> None:
    model = Shared()
    report = small(model, calibration=[torch.randn(64, 16)])
    assert set(after(report).values()) == {"w8a8"}
    notes = {row.name: " ".join(row.rounded.notes) for row in report.swapped}
    assert "shares its weight" in notes["one"]
    assert "several names" in notes["other"]


def test_resumed_runs_end_with_the_same_bits(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model, again = Stack(), None
    again = copy.deepcopy(model)
    small(model, method="gptq", resume=tmp_path)
    small(again, method="gptq", resume=tmp_path)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert any("act_scale" in name for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(ValueError, match="from a run with another model, calibration data or settings"):
        small(Stack(), method="gptq", observer="minmax", resume=tmp_path)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"float activations \(a16\) have no scale"):
        small(Stack(), "w8a16static")
    with pytest.raises(ValueError, match="static activations need calibration data; 'w8a8' needs none"):
        small(Stack(), calibration=None)
    with pytest.raises(ValueError, match="needs a scheme with static activations, such as 'w8a8static'"):
        small(Stack(), "w8a8", observer="mse")
    with pytest.raises(ValueError, match="observer='kl': must be one of 'minmax', 'percentile', 'mse'"):
        small(Stack(), observer="kl")
    with pytest.raises(ValueError, match="needs a scheme with static activations"):
        nybble.sparsify(Stack(), "50%", scheme=None, observer="mse", method="magnitude")


def test_recipes_name_static_schemes_and_their_observer(tmp_path) -> None:
    stage = {"layers": {"blocks.*": "w8a8static", "head": "w8a8"}, "observer": "percentile", "goal": "memory"}
    recipe = nybble.Recipe([nybble.recipe.Stage("quantize", stage)])
    recipe.save(tmp_path / "r.json")
    model = Stack()
    nybble.optimize(model, nybble.Recipe.load(tmp_path / "r.json"), calibration=token_batches(8))
    assert str(model.blocks[0].up.scheme) == "w8a8static"
    assert str(model.head.scheme) == "w8a8"
    with pytest.raises(ValueError, match="observer: 'kl' must be one of minmax, percentile, mse"):
        nybble.recipe.Stage("quantize", {**stage, "observer": "kl"})


def test_sensitivity_of_static_schemes() -> None:
    options = {"calibration": token_batches(8), "observer": "minmax"}
    found = nybble.sensitivity(Stack(), ("w8a8", "w8a8static"), token_batches(2, seed=3), quantize=options)
    assert {scheme for layer in found.layers for scheme in layer.effects} == {"w8a8", "w8a8static"}


def test_what_is_learned_keeps_the_scale() -> None:
    model = One()
    dense = model.layer
    small(model, calibration=[torch.randn(64, 32)])
    made = Shadow(model.layer, dense).make()
    assert torch.equal(made.act_scale, model.layer.act_scale)
    assert torch.equal(made(torch.ones(2, 32)), model.layer(torch.ones(2, 32)))
