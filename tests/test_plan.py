"""nybble.plan: the budget holds, the choice is the best of what was measured, and the recipe makes it."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import nybble
from nybble.nn.module import QuantizedModule
from nybble.paired import FEW
from nybble.passes.choose import find, times
from nybble.passes.choose.options import Candidate, Menu, best, front
from nybble.testing.models import Reads, Residual

WIDTH, LAYERS = 64, 4
SCHEMES = ("w8a8", "w4a16", "w4a16g32")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def uneven():
    """Its layers differ in how much they add and how badly they round."""
    model = Residual()
    for i, layer in enumerate(model.layers):
        layer.weight.data *= (i + 1) / WIDTH**0.5
    model.layers[1].weight.data[:, 7] *= 12
    return model


def data(batches=2, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, WIDTH, generator=draw) for _ in range(batches)]


def harm_of(schemes, batches):
    """KL of the whole model with these schemes, by hand."""
    model, changed = uneven(), uneven()
    for name, scheme in schemes.items():
        if scheme != "dense":
            index = int(name.split(".")[1])
            changed.layers[index] = nybble.nn.Linear.from_dense(changed.layers[index], scheme)
    with torch.no_grad():
        p, q = (torch.cat([m(x) for x in batches]).double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def bytes_of(schemes):
    model = uneven()
    sizes = []
    for name, scheme in schemes.items():
        dense = model.layers[int(name.split(".")[1])]
        layer = None if scheme == "dense" else nybble.nn.Linear.from_dense(dense, scheme)
        sizes.append(4 * WIDTH * WIDTH if layer is None else layer.nbytes)
    return sum(sizes)


@pytest.mark.parametrize("limit", ["w4a16", "w4a16g32", "w8a8", 24_000.0])
def test_a_budget_of_bytes_holds_and_beats_the_uniform_scheme(limit):
    batches = data()
    plan = nybble.plan(uneven(), SCHEMES, batches, budget={"bytes": limit})
    want = bytes_of({f"layers.{i}": limit for i in range(LAYERS)}) if isinstance(limit, str) else limit
    assert plan.limit == want
    assert plan.chosen.nbytes == bytes_of(plan.chosen.schemes) <= want
    assert plan.chosen.measured.value == pytest.approx(harm_of(plan.chosen.schemes, batches), rel=0.05)
    if isinstance(limit, str):
        assert plan.chosen.measured.value <= plan.uniform[limit].measured.value
    assert plan.chosen.measured.value == min(point.measured.value for point in plan.tried)


def test_the_tried_are_the_best_by_prediction_of_all_there_are():
    plan = nybble.plan(uneven(), SCHEMES, data(), budget={"bytes": "w4a16g32"})
    alone = {row.name: row.effects for row in plan.sensitivity.layers}
    names = list(plan.chosen.schemes)
    found = []
    for schemes in itertools.product(("dense", *SCHEMES), repeat=LAYERS):
        chosen = dict(zip(names, schemes, strict=True))
        if bytes_of(chosen) <= plan.limit:
            found.append(sum(max(0.0, alone[n][s].harm.value) for n, s in chosen.items() if s != "dense"))
    best = [point.predicted for point in plan.tried[: find.TRIED]]
    assert best == pytest.approx(sorted(found)[: find.TRIED])


def test_prediction_and_measurement_go_together():
    batches = data()
    plan = nybble.plan(uneven(), SCHEMES, batches, budget={"bytes": "w8a8"})
    alone = {row.name: row.effects for row in plan.sensitivity.layers}
    draw = torch.Generator().manual_seed(0)
    predicted, true = [], []
    for _ in range(30):
        schemes = {n: ("dense", *SCHEMES)[int(torch.randint(4, (), generator=draw))] for n in plan.chosen.schemes}
        predicted.append(sum(alone[n][s].harm.value for n, s in schemes.items() if s != "dense"))
        true.append(harm_of(schemes, batches))
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (predicted, true)])
    assert torch.corrcoef(ranks)[0, 1] >= 0.8  # Spearman


def test_the_recipe_makes_what_was_measured():
    model, batches = uneven(), data()
    plan = nybble.plan(model, SCHEMES, batches, budget={"bytes": "w4a16g32"})
    assert all(type(layer) is nn.Linear for layer in model.layers)
    nybble.optimize(model, plan.recipe)
    made = {f"layers.{i}": str(getattr(layer, "scheme", "dense")) for i, layer in enumerate(model.layers)}
    assert made == plan.chosen.schemes
    found = nybble.evaluate(model, uneven(), batches, "kl")
    assert found["kl"] == pytest.approx(plan.chosen.measured.value, rel=1e-6)


def test_the_recipe_keeps_the_methods_and_sparse_schemes():
    model, batches = uneven(), data()
    given = {"sparsify": {"method": "wanda", "calibration": batches}, "quantize": {"method": "mse"}}
    plan = nybble.plan(model, ("sp24w8a8", "w8a8", "w4a16"), batches, budget={"bytes": "sp24w8a8"}, **given)
    stages = {stage.name: stage.arguments for stage in plan.recipe.stages}
    assert stages["quantize"]["method"] == "mse"
    nybble.optimize(model, plan.recipe, calibration=batches)
    found = nybble.evaluate(model, uneven(), batches, "kl")
    assert found["kl"] == pytest.approx(plan.chosen.measured.value, rel=0.2)


@pytest.mark.parametrize("limit", [0.02, "w4a16", 0.0])
def test_a_budget_of_harm_is_kept_by_the_measured_plan(limit):
    plan = nybble.plan(uneven(), SCHEMES, data(), budget={"harm": limit})
    assert plan.chosen.measured.value <= plan.limit
    if limit == "w4a16":
        assert plan.chosen.nbytes <= plan.uniform["w4a16"].nbytes
    if limit == 0.0:
        assert set(plan.chosen.schemes.values()) == {"dense"}


def test_a_budget_of_time_holds_by_what_was_measured(monkeypatch):
    made = {"dense": 8.0, "w8a8": 2.0, "w4a16": 3.0, "w4a16g32": 4.0}
    monkeypatch.setattr(times.Stopwatch, "times", lambda self, layers, dense: {name: made[name] for name in layers})
    plan = nybble.plan(uneven(), SCHEMES, data(), budget={"ms": "w8a8"}, m=16)
    assert (plan.limit, plan.m) == (4 * 2.0, 16)
    assert set(plan.chosen.schemes.values()) == {"w8a8"}
    wider = nybble.plan(uneven(), SCHEMES, data(), budget={"ms": 14.0}, m=16)
    assert wider.chosen.ms == 14
    assert wider.chosen.measured.value < plan.chosen.measured.value
    assert "dense" in wider.chosen.schemes.values()


@pytest.mark.parametrize("budget", [{"harm": 10.0}, {"ms": 1e6}])
def test_every_kind_of_layer_is_timed_on_inputs_of_its_own(budget):
    torch.manual_seed(0)
    model = Reads().eval()
    batches = model.batches()
    chosen = nybble.plan(model, ("w8a8", "w4a16g32"), batches, budget=budget, save="ms")
    assert set(chosen.chosen.schemes) == {"words", "image", "head"}
    assert chosen.chosen.ms > 0
    nybble.optimize(model, chosen.recipe)
    changed = {name for name, layer in model.named_children() if isinstance(layer, QuantizedModule)}
    assert changed == {name for name, scheme in chosen.chosen.schemes.items() if scheme != "dense"}


def test_the_stopwatch_times_the_layers_themselves():
    dense = nn.Linear(256, 256)
    layers = {"dense": dense, "w8a8": nybble.nn.Linear.from_dense(dense, "w8a8"), "twice": nn.Sequential(dense, dense)}
    watch = times.Stopwatch(8)
    with torch.no_grad():
        found = watch.times(layers, dense)
        assert watch.times(layers, dense) is found
    assert set(found) == set(layers)
    assert all(0 < ms < 1000 for ms in found.values())


@pytest.mark.parametrize("seconds", [1e-3, 0.1, 0.5])
def test_its_times_are_medians_of_several_pairs(monkeypatch, seconds):
    """However long a call takes, and whatever the first one does."""
    made, now = [], [0.0]

    def fake(dense, layer, x):
        took = [1.0, 0.1, *itertools.repeat(0.0, 1000)]

        def call(share):
            now[0] += share * seconds + took.pop(0)

        made.append(times.Pairs(lambda: call(1.0), lambda: call(0.25), lambda: now[0]))
        return made[-1]

    monkeypatch.setattr(times, "_pairs", fake)
    dense = nn.Linear(8, 8)
    found = times.Stopwatch(4).times({"dense": dense, "w8a8": nybble.nn.Linear.from_dense(dense, "w8a8")}, dense)
    assert found["dense"] == pytest.approx(1e3 * seconds)
    assert found["w8a8"] == pytest.approx(250 * seconds)
    assert len(made[0].logs) >= FEW


def test_nothing_within_the_budget_says_what_the_cheapest_costs():
    least = bytes_of({f"layers.{i}": "w4a16" for i in range(LAYERS)})
    with pytest.raises(ValueError, match=f"no choice is within it; the cheapest costs {least:g}"):
        nybble.plan(uneven(), SCHEMES, data(), budget={"bytes": 100})


def test_layers_of_one_weight_have_one_scheme_and_count_once():
    model = uneven()
    model.layers[2].weight = model.layers[0].weight
    plan = nybble.plan(model, SCHEMES, data(), budget={"bytes": "w4a16g32"})
    assert plan.chosen.schemes["layers.2"] == plan.chosen.schemes["layers.0"]
    three = bytes_of({f"layers.{i}": "w4a16g32" for i in range(3)})
    assert plan.uniform["w4a16g32"].nbytes == three


def test_the_front_falls_and_holds_no_worse_point():
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(6, 4, 2, generator=draw).tolist()
    menu = Menu([], [[Candidate(str(k), 100 * b, None, h) for k, (b, h) in enumerate(own)] for own in rows])
    points = [(menu.sum(choice, "bytes"), menu.sum(choice, "harm")) for choice in front(menu, "bytes")]
    assert len(points) >= 4
    assert points == sorted(points)
    assert [harm for _, harm in points] == sorted((harm for _, harm in points), reverse=True)
    limit = points[3][0]
    (choice,) = best(menu, "bytes", limit, 1, "bytes")
    assert menu.sum(choice, "harm") <= points[3][1] + 1e-12


def test_it_prints_is_json_and_draws(tmp_path):
    plan = nybble.plan(uneven(), SCHEMES, data(), budget={"bytes": "w4a16"})
    text = str(plan)
    assert "budget: bytes <= " in text
    assert "all w8a8" in text
    found = json.loads(plan.to_json())
    assert found["chosen"]["schemes"] == dict(plan.chosen.schemes)
    assert nybble.Recipe.from_dict(found["recipe"]) == plan.recipe
    pytest.importorskip("matplotlib")
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_model_is_left_as_it_was():
    model = uneven().train()
    before, layers = copy.deepcopy(model.state_dict()), list(model.layers)
    nybble.plan(model, SCHEMES, data(), budget={"bytes": "w4a16"})
    assert list(model.layers) == layers
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"budget": 5}, TypeError, "must map one of bytes, ms, harm"),
        ({"budget": {"bytes": 1, "ms": 1}}, TypeError, "must map one of"),
        ({"budget": {"seconds": 1}}, ValueError, "'seconds' must be one of"),
        ({"budget": {"bytes": math.nan}}, ValueError, "must be a number of at least 0"),
        ({"budget": {"bytes": True}}, ValueError, "must be a number"),
        ({"budget": {"bytes": "w5"}}, ValueError, "not a scheme"),
        ({"candidates": ()}, ValueError, r"candidates=\(\): must be at least one"),
        ({"m": 0}, ValueError, "m=0"),
        ({"save": "energy"}, ValueError, "save='energy'"),
        ({"quantize": {"exclude": "*"}}, ValueError, "no layer of the model"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    given = {"candidates": "w8a8", "data": data(), "budget": {"bytes": 1e6}, **arguments}
    with pytest.raises(error, match=words):
        nybble.plan(uneven(), **given)
