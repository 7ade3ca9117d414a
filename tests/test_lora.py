"""LoRA by PEFT on quantized layers: gradients, adapters on disk, merging into codes, and back to the first ones."""

import copy
import math

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Linear

peft = pytest.importorskip("peft")
WIDTH = 64


@pytest.fixture(autouse=True)
def _patched():
    nybble.patch_peft()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH, bias=False)
        self.dense = nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.dense(self.two(self.act(self.one(x))))


def make(scheme="w4a16g32", **settings):
    torch.manual_seed(7)
    model = Model()
    nybble.quantize(model, scheme, goal="memory", exclude="dense")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["one", "two"], **settings}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # PEFT begins with 0
            nn.init.normal_(parameter, std=0.05)
    return adapted


def layers(adapted):
    return [adapted.base_model.model.one, adapted.base_model.model.two]


def packed(adapted):
    return [layer.get_base_layer().packed.clone() for layer in layers(adapted)]


@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a8"])
def test_a_training_step_changes_adapters_only(scheme):
    adapted, x = make(scheme), torch.randn(5, WIDTH)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    before, weights = packed(adapted), {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(x).square().sum().backward()
    optimizer.step()
    assert {name for name, p in adapted.named_parameters() if not torch.equal(p, weights[name])} == trained
    assert all(map(torch.equal, packed(adapted), before))


def test_gradients_are_those_on_the_dense_weights():
    adapted, x = make("w4a16g32"), torch.randn(5, WIDTH)
    dense = copy.deepcopy(adapted)
    for layer in layers(dense):
        layer.base_layer = layer.get_base_layer().dequantize()
    for model in (adapted, dense):
        model(x).square().sum().backward()
    wanted = dict(dense.named_parameters())
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-4)
    assert "lora.QuantizedLora" in repr(adapted)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    adapted, x = make().eval(), torch.randn(5, WIDTH)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    torch.manual_seed(7)
    fresh = Model()
    nybble.quantize(fresh, "w4a16g32", goal="memory", exclude="dense")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x), adapted(x))


@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a8", "w4nfa16g64", "w4ka16g32"])
def test_merging_rounds_the_sum_and_unmerging_is_exact(scheme):
    adapted = make(scheme, lora_alpha=16)
    before, first = packed(adapted), [layer.get_base_layer().dequantized_weight() for layer in layers(adapted)]
    bias = layers(adapted)[0].get_base_layer().bias.clone()
    adapted.merge_adapter()
    report = nybble.merge_report(adapted)
    assert [row.name.rpartition(".")[2] for row in report.layers] == ["one", "two"]
    for layer, weight, row in zip(layers(adapted), first, report.layers, strict=True):
        change = layer.get_delta_weight("default")
        wanted = Linear.from_weight(weight + change, None, scheme).dequantized_weight()
        merged = layer.get_base_layer().dequantized_weight()
        assert torch.equal(merged, wanted)
        error = (weight + change - wanted).square().sum()
        assert row.weight_db == pytest.approx(10 * math.log10((weight + change).square().sum() / error), abs=0.01)
        assert row.change_db == pytest.approx(10 * math.log10(change.square().sum() / error), abs=0.01)
        assert row.adapters == ("default",)
        assert row.scheme == scheme
    assert "in 0 rounding changes more" in str(report)
    assert '"change_db"' in report.to_json()
    assert not any(map(torch.equal, packed(adapted), before))
    adapted.unmerge_adapter()
    assert all(map(torch.equal, packed(adapted), before))
    assert torch.equal(layers(adapted)[0].get_base_layer().bias, bias)
    assert not nybble.merge_report(adapted).layers
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(adapted)[0].unmerge()


def test_two_adapters_are_rounded_once():
    adapted = make("w4a16g32")
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    before, layer = packed(adapted), layers(adapted)[0]
    first = layer.get_base_layer().dequantized_weight()
    adapted.merge_adapter(["default"])
    adapted.merge_adapter(["other"])
    assert layer.merged_adapters == ["default", "other"]
    total = first + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    wanted = Linear.from_weight(total, None, "w4a16g32").dequantized_weight()
    torch.testing.assert_close(layer.get_base_layer().dequantized_weight(), wanted, rtol=0.02, atol=1e-6)
    with adapted.disable_adapter():  # unmerges
        adapted(torch.randn(2, WIDTH))
    assert all(map(torch.equal, packed(adapted), before))


def test_merge_and_unload_gives_nybbles_layers():
    adapted, x = make("w8a16", lora_alpha=16).eval(), torch.randn(5, WIDTH)
    with torch.no_grad():
        wanted = adapted(x)
        model = adapted.merge_and_unload()
        assert type(model.one) is Linear
        assert str(model.one.scheme) == "w8a16"
        assert (model(x) - wanted).norm() < 0.01 * wanted.norm()
    assert [row.name for row in nybble.merge_report(model).layers] == ["one", "two"]


def test_a_bias_of_the_adapter_is_merged_and_unmerged():
    adapted = make("w4a16g32", lora_bias=True, target_modules=["one"])
    layer = layers(adapted)[0]
    nn.init.normal_(layer.lora_B["default"].bias)
    bias = layer.get_base_layer().bias.detach().clone()
    layer.merge()
    wanted = bias + layer.lora_B["default"].bias * layer.scaling["default"]
    torch.testing.assert_close(layer.get_base_layer().bias.detach(), wanted.detach())
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().bias, bias)


def test_all_linear_finds_quantized_and_dense_layers():
    adapted = make(target_modules="all-linear")
    assert {"one", "two", "dense"} <= set(adapted.peft_config["default"].target_modules)
    assert type(adapted.base_model.model.dense).__module__.startswith("peft.")


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': changes the base weight"),
        ({"use_dora": True}, "variant"),
    ],
)
def test_what_changes_the_base_weight_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings)


def test_a_sum_that_is_not_finite_leaves_the_layer_as_it_was():
    adapted = make()
    before, layer = packed(adapted), layers(adapted)[0]
    nn.init.constant_(layer.lora_A["default"].weight, math.inf)
    with pytest.raises(ValueError, match="default: their sum with the weight has NaN or Inf"):
        layer.merge()
    assert torch.equal(packed(adapted)[0], before[0])
    assert not layer.merged


def test_sparse_layers_train_but_are_not_merged():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(WIDTH, 96))
    nybble.sparsify(model, "50%", scheme="w8a8", method="magnitude", goal="memory")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    adapted(torch.randn(3, WIDTH)).sum().backward()
    with pytest.raises(ValueError, match="scheme='sp50w8a8': merging would fill the zeros"):
        adapted.merge_adapter()


def test_a_peft_that_nybble_does_not_know_is_refused(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils, "_maybe_include_all_linear_layers")
    with pytest.raises(ImportError, match="has no _maybe_include_all_linear_layers"):
        nybble.patch_peft()
