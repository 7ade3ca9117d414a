"""nybble.sensitivity: harms are those of their definition, a planted bad layer comes first, the model stays."""

import json
import math

import pytest
import torch
from torch import nn

import nybble
from nybble.evaluate import Metric
from nybble.passes.sensitivity import Effect, LayerSensitivity, Sensitivity
from nybble.passes.sensitivity import outliers as channels
from nybble.testing.models import Reads, Residual

WIDTH, LAYERS = 64, 4


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def data(batches=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, WIDTH, generator=draw) for _ in range(batches)]


def plant(model, index):
    """An outlier in each row of one layer, at an input that is always 0: the output stays, the rounding suffers."""
    for layer in model.layers:
        layer.weight.data[7] = 0
    model.layers[index].weight.data[:, 7] = 40.0
    model.layers[index].weight.data[7] = 0
    return model


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize("measure", ["kl", "output"])
def test_a_planted_bad_layer_comes_first(index, measure):
    batches = data()
    for x in batches:
        x[..., 7] = 0
    found = nybble.sensitivity(plant(Residual(), index), "w4a16", batches, harm=measure)
    assert found.layers[0].name == f"layers.{index}"
    assert found.layers[0].worst > 3 * found.layers[1].worst
    assert len(found.layers) == LAYERS


@pytest.mark.parametrize("measure", ["kl", "output"])
def test_harm_is_that_of_its_definition(measure):
    model, batches = Residual(), data()
    found = nybble.sensitivity(model, ["w4a16g32", "w8a8"], batches, harm=measure)
    before = torch.cat([model(x) for x in batches]).double()
    for row in found.layers:
        for scheme in found.schemes:
            index = int(row.name.split(".")[1])
            changed = Residual()
            changed.layers[index] = nybble.nn.Linear.from_dense(model.layers[index], scheme)
            with torch.no_grad():
                after = torch.cat([changed(x) for x in batches]).double()
            if measure == "kl":
                p, q = before.log_softmax(-1), after.log_softmax(-1)
                want = (p.exp() * (p - q)).sum(-1).mean()
            else:
                want = (after - before).square().sum() / before.square().sum()
            harm = row.effects[scheme].harm
            assert harm.value == pytest.approx(want.item(), rel=2e-2)
            assert harm.low <= harm.value <= harm.high
            stored = changed.layers[index].dequantize().weight.detach().double()
            exact = model.layers[index].weight.detach().double()
            sqnr = 10 * math.log10(exact.square().sum() / (exact - stored).square().sum())
            assert row.effects[scheme].sqnr_db == pytest.approx(sqnr, abs=1e-3)


def test_the_model_ends_as_it_was_also_after_an_error(monkeypatch):
    model = Residual().train()
    before = list(model.layers)
    nybble.sensitivity(model, ["w8a8", "sp24w8a8"], data())
    assert list(model.layers) == before
    assert model.training
    calls = []

    def fail(x):
        calls.append(1)
        if len(calls) > 10:
            raise RuntimeError("stop")
        return Residual.forward(model, x)

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises((RuntimeError, TypeError), match="stop"):
        nybble.sensitivity(model, "w8a8", data())
    assert list(model.layers) == before


def test_sparse_schemes_and_arguments_of_the_passes():
    model, batches = Residual(), data()
    found = nybble.sensitivity(
        model,
        ["w4a16", "sp24w8a8"],
        batches,
        quantize={"method": "mse", "exclude": "layers.0"},
        sparsify={"method": "wanda", "calibration": batches},
    )
    by_name = {row.name: row for row in found.layers}
    assert set(by_name["layers.0"].effects) == {"sp24w8a8"}
    assert "excluded by" in by_name["layers.0"].left["w4a16"]
    plain = nybble.sensitivity(model, ["w4a16", "sp24w8a8"], batches)
    same = {row.name: row for row in plain.layers}
    assert by_name["layers.1"].effects["w4a16"].sqnr_db > same["layers.1"].effects["w4a16"].sqnr_db
    assert by_name["layers.1"].effects["sp24w8a8"].harm != same["layers.1"].effects["sp24w8a8"].harm


def test_layers_of_one_weight_change_together():
    model = Residual()
    model.layers[2].weight = model.layers[0].weight
    found = nybble.sensitivity(model, "w4a16", data())
    assert {row.name for row in found.layers} == {"layers.0", "layers.1", "layers.3"}
    single = {row.name: row.worst for row in found.layers}
    assert single["layers.0"] > max(single["layers.1"], single["layers.3"])


def test_outlier_channels_are_named():
    batches = data()
    for x in batches:
        x[..., 11] *= 50
    (row,) = nybble.sensitivity(nn.Sequential(nn.Linear(WIDTH, 3)), "w8a8", batches).layers
    assert row.outliers == (11,)
    largest = torch.cat(batches).abs().amax((0, 1))
    assert row.peak == pytest.approx((largest.max() / largest.median()).item())
    assert channels.outliers(torch.tensor([1.0, 1.0, 7.0, 1.0, 9.0])) == ((4, 2), 9.0)
    assert channels.outliers(torch.zeros(3)) == ((), 1.0)


def test_layers_whose_inputs_are_no_rows_of_numbers_have_no_outliers():
    model = Reads()
    batches = model.batches()
    found = {row.name: row for row in nybble.sensitivity(model, "w8a8", batches).layers}
    assert found["words"].outliers == ()
    assert math.isnan(found["words"].peak)
    patches = torch.cat(
        [model.words(ids).transpose(1, 2).unfold(2, 3, 1).transpose(1, 2).flatten(0, 1) for ids in batches]
    )
    largest = patches.abs().amax(0).flatten()
    assert found["image"].peak == pytest.approx((largest.max() / largest.median()).item())


def test_it_prints_is_json_and_draws(tmp_path):
    found = nybble.sensitivity(Residual(), ["w8a8", "w4a16"], data())
    text = str(found)
    assert all(row.name in text for row in found.layers)
    assert "w4a16" in text.splitlines()[0]
    assert json.loads(found.to_json())["layers"][0]["effects"]["w8a8"]["nbytes"] > 0
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_harm_that_is_not_finite_is_the_worst():
    effects = {name: Effect(Metric(value), None, 1) for name, value in (("a", math.nan), ("b", 1e9))}
    row = LayerSensitivity("layer", (1, 1), effects, (), 1.0)
    assert row.worst == math.inf
    found = json.loads(Sensitivity((row,), ("a", "b"), "kl").to_json())
    assert found["layers"][0]["effects"]["a"]["harm"]["value"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schemes": ()}, "at least one scheme"),
        ({"schemes": "w9"}, "not a scheme"),
        ({"schemes": "bs32x32w8a8"}, "block schemes are refused"),
        ({"harm": "worst"}, "harm='worst'"),
        ({"data": [torch.full((1, 1, WIDTH), math.nan)]}, "has NaN or Inf"),
        ({"quantize": {"exclude": "*"}}, "no layer of the model can have any of these schemes"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    given = {"schemes": "w8a8", "data": data(), **arguments}
    with pytest.raises(ValueError, match=words):
        nybble.sensitivity(Residual(), **given)


def test_a_model_that_is_broken_already_is_refused():
    model = Residual()
    model.register_buffer("scale", torch.tensor(math.inf))
    model.forward = lambda x: Residual.forward(model, x) * model.scale
    with pytest.raises(ValueError, match="before any layer is changed"):
        nybble.sensitivity(model, "w8a8", data())


@pytest.mark.parametrize(("find", "more"), [(nybble.sensitivity, {}), (nybble.plan, {"budget": {"bytes": 1}})])
def test_the_old_name_of_the_keyword_argument(find, more):
    with (
        pytest.warns(DeprecationWarning, match=r"\(damage=\) is now harm="),
        pytest.raises(ValueError, match="harm='x'"),
    ):
        find(Residual(), "w8a8", data(), damage="x", **more)


def test_old_names_of_the_result():
    row = LayerSensitivity("layer", (1, 1), {"a": Effect(Metric(1.0), None, 1)}, (), 1.0)
    found = Sensitivity((row,), ("a",), "kl")
    with pytest.warns(DeprecationWarning, match=r"Sensitivity.damage is now harm"):
        assert found.damage == "kl"
    with pytest.warns(DeprecationWarning, match=r"LayerSensitivity.damage is now effects"):
        assert row.damage is row.effects
    with pytest.warns(DeprecationWarning, match=r"Damage has moved to nybble.passes.sensitivity.Effect"):
        from nybble.passes.sensitivity import Damage
    assert Damage is Effect
    written = json.loads(found.to_json())
    assert (written["damage"], written["layers"][0]["damage"]) == (written["harm"], written["layers"][0]["effects"])
