"""--preset accuracy: its simulated formats, its targets and its table."""

import copy

import pytest
import torch
from torch import nn

from nybble import sparsify
from nybble.bench import accuracy, accuracy_methods, accuracy_outliers, accuracy_simulated, presets
from nybble.bench.accuracy import Loss
from nybble.evaluate.memory import held_bytes


def correlated(n, k, rows, seed=0):
    """A weight, and inputs of which neighbours go together."""
    draw = torch.Generator().manual_seed(seed)
    mix = 0.9 ** (torch.arange(k)[:, None] - torch.arange(k)).abs()
    return torch.randn(n, k, generator=draw), torch.randn(rows, k, generator=draw) @ torch.linalg.cholesky(mix).T


def test_rounding_to_nearest_is_within_half_a_step_and_repeats():
    weight, _ = correlated(16, 256, 1)
    rounded = accuracy_simulated.nearest(weight, 3)
    groups = weight.split(accuracy_simulated.GROUP, dim=1)
    for group, new in zip(groups, rounded.split(accuracy_simulated.GROUP, dim=1), strict=True):
        step = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)) / 7
        assert ((group - new).abs().amax(1) <= 1.01 * step).all()
        assert all(len(row.unique()) <= 8 for row in new)
    eight = (accuracy_simulated.nearest(weight, 8) - weight).norm()
    assert eight < (rounded - weight).norm() / 20


def test_gptq_does_better_than_nearest_and_as_nearest_where_inputs_are_apart():
    weight, x = correlated(64, 256, 2048)
    hessian = 2 / len(x) * x.T @ x
    found, nearest = accuracy_simulated.by_gptq(weight, hessian, 3), accuracy_simulated.nearest(weight, 3)
    assert (x @ (weight - found).T).norm() ** 2 <= 0.35 * (x @ (weight - nearest).T).norm() ** 2
    assert all(len(row.unique()) <= 8 for row in found[:, :128])
    apart = accuracy_simulated.by_gptq(weight, torch.diag(hessian.diagonal()), 3)
    assert torch.equal(apart, nearest)
    with pytest.raises(ValueError, match="cannot be factored"):
        accuracy_simulated.by_gptq(weight, torch.full_like(hessian, float("nan")), 3)


def test_every_bar_is_of_a_method_that_runs():
    all_names = [(method.setting, name) for method in accuracy_methods.METHODS for name in method.names]
    there = set(all_names)
    assert len(there) == len(all_names)
    assert {(m.setting, m.name) for m in accuracy_methods.METHODS if m.recovered} == set(accuracy_methods.RECOVERED)
    for target in accuracy_methods.TARGETS:
        assert target.name == "best" or (target.setting, target.name) in there
        assert target.over is None or (target.setting, target.over) in there


def test_only_what_is_asked_for_runs():
    steps = presets.PRESETS["accuracy"].steps
    assert steps((), ["by_time"]) == 1
    assert steps((), ["w3*"]) == 1 + 3
    assert steps((), ["w4a16g128"]) + steps((), ["[!w]*", "w[!4]*", "w4a16"]) == steps((), ())
    with pytest.raises(ValueError, match=r"--only w5: matches none of .*w4a16g128; .*by_time"):
        steps((), ["w4*", "w5"])
    losses = [Loss(method.setting, method.name, (0.1,)) for method in accuracy_methods.METHODS if "%" in method.setting]
    found = [figure.name for figure in accuracy.figures([one for one in losses if one.setting == "70%"])]
    assert found == ["70% sparsegpt, loss over magnitude's", "70% wanda, loss over magnitude's"]


def test_losses_that_a_file_has_are_taken_from_it(monkeypatch):
    lines = [
        {"kind": "accuracy", "setting": method.setting, "name": name, "seed": seed, "nats": 0.1 * (1 + seed)}
        for method in accuracy_methods.METHODS
        for name in method.names
        for seed in method.seeds
    ]
    measured, missing = [], ("50%", "wanda", 1)

    class Evaluator:
        dense, language = 3.0, None

        def __init__(self, _):
            pass

        def losses(self, method, seed):
            measured.append((method.setting, method.name, seed))
            yield 0.5

    monkeypatch.setattr(accuracy, "Evaluator", Evaluator)
    monkeypatch.setattr(accuracy, "load", lambda: None)
    monkeypatch.setattr(accuracy, "more", ())
    kept = [line for line in lines if (line["setting"], line["name"], line["seed"]) != missing]
    put = []
    texts = list(accuracy.accuracy(put.extend, lambda _: None, [{"kind": "run"}, *kept]))
    assert measured == [missing]
    assert len([line for line in put if line["kind"] == "accuracy"]) == len(lines)
    assert "0.3000" in texts[1]  # (0.1 + 0.5 + 0.3) / 3


def test_planted_outliers_change_neither_the_model_nor_wandas_choice(narrow_llama):
    model = narrow_llama
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    planted = copy.deepcopy(model)
    accuracy_outliers.plant(planted, 3)
    with torch.no_grad():
        assert torch.equal(planted(ids).logits, model(ids).logits)
    query = [one.model.layers[0].self_attn.q_proj for one in (model, planted)]
    assert (query[0].weight != query[1].weight).any(0).sum() == 3
    assert torch.equal(planted.lm_head.weight, model.lm_head.weight)
    for method, equal in (("wanda", True), ("magnitude", False)):
        made = [copy.deepcopy(one) for one in (model, planted)]
        for one in made:
            data = [ids] if method == "wanda" else None
            sparsify(one, "50%", method=method, calibration=data, scheme=None, goal="memory", exclude=("lm_head",))
        masks = [one.model.layers[0].self_attn.q_proj.weight != 0 for one in made]
        assert torch.equal(*masks) == equal


@pytest.mark.full
def test_a_plan_is_made_within_the_bytes_that_its_setting_takes(narrow_llama):
    model = narrow_llama
    data = torch.randint(64, (4, 2, 16), generator=torch.Generator().manual_seed(0)).unbind()
    made = {}
    for method in accuracy_methods.METHODS:
        if method.setting == accuracy_methods.W4 and method.name in ("gptq", "plan"):
            made[method.name] = copy.deepcopy(model)
            method.make(made[method.name], data)
    assert held_bytes(made["plan"]) <= held_bytes(made["gptq"]) < held_bytes(model)
    assert not torch.equal(made["plan"](data[0]).logits, made["gptq"](data[0]).logits)


def test_figures_and_table_are_of_the_means():
    losses = [Loss(method.setting, name, (0.1, 0.3)) for method in accuracy_methods.METHODS for name in method.names]
    losses = [Loss(one.setting, one.name, (0.1, 0.1, 0.2) if one.name == "gptq" else one.nats) for one in losses]
    found = {figure.name: figure for figure in accuracy.figures(losses)}
    assert len(found) == len(accuracy_methods.TARGETS)
    gptq = found["w4a16g128 gptq, loss over rtn's"]
    assert gptq.value == pytest.approx((0.4 / 3) / 0.2)
    assert gptq.met
    assert not found["50% wanda, loss over magnitude's"].met
    assert found["w8a8 rtn + smooth, loss in nats"].value == pytest.approx(0.2)
    text = accuracy.table(losses)
    assert len(text.splitlines()) == 2 + len(losses)
    assert "0.67" in text


def test_simulated_formats_round_the_blocks_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(128, 128, bias=False)

        def forward(self, x):
            return x + self.linear(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.layers = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(128, 4)

        def forward(self, x):
            for layer in self.model.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Model()
    head = model.head.weight.clone()
    x = [torch.randn(64, 128) for _ in range(4)]
    accuracy_simulated.simulate(model, 3, x)
    assert all(len(row.unique()) <= 8 for block in model.model.layers for row in block.linear.weight)
    assert torch.equal(model.head.weight, head)
