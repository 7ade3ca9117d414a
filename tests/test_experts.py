"""nybble.nn.Experts: what it takes over, when it runs in one call, and when it calls its layers."""

import pytest
import torch
from torch import nn

import nybble
from nybble.nn.experts_form import form_of
from nybble.testing.contract import FusedExperts, Holder, InterleavedExperts

KINDS = [FusedExperts, InterleavedExperts]


def make(kind=FusedExperts, scheme=None, experts=4):
    torch.manual_seed(0)
    model = Holder(kind(experts, 32, 24)).eval()
    if scheme is not None:
        nybble.quantize(model, scheme, goal="memory", fuse=False)
    return model


def given(experts=4, tokens=9):
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 32), index, torch.rand(tokens, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_are_proved(kind):
    form = form_of(make(kind).layer)
    assert (form.transposed, form.gate.interleaved) == (kind is InterleavedExperts,) * 2
    assert form.gate.limit == (2.0 if kind is InterleavedExperts else 0)


class Odd(FusedExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights).abs()


class Squared(FusedExperts):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.act_fn = nn.Softsign()

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def test_what_cannot_be_proved_stays_dense_with_the_reason():
    model = Holder(Odd(4, 32, 24)).eval()
    report = nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    assert type(model.layer) is Odd
    assert "not that of known experts" in str(report)


@torch.no_grad()
def test_a_gate_that_no_kernel_has_runs_one_by_one():
    torch.manual_seed(0)
    model, args = Holder(Squared(4, 32, 24)).eval(), given()
    wanted = model(*args)
    nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    assert "known to the dense module alone" in model.layer.explain()
    assert (model(*args) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_one_call_and_one_by_one(kind):
    model, args = make(kind, "w8a8"), given()
    found = model(*args)
    assert model.layer.explain() is None
    seen = []
    model.layer.down_proj[2].register_forward_hook(lambda _, x, y: seen.append(len(y)))
    hooked = model(*args)
    assert seen == [int((args[1] == 2).sum())]
    torch.testing.assert_close(hooked, found, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_layer_that_is_swapped_or_loaded_is_used():
    model, args = make(scheme="w8a8"), given()
    before = model(*args)
    layers = model.layer.down_proj
    layers[0], layers[1] = layers[1], layers[0]
    assert not torch.equal(model(*args), before)
    layers[0], layers[1] = layers[1], layers[0]
    assert torch.equal(model(*args), before)
    state = model.state_dict()
    other = {name: torch.zeros_like(held) if name.endswith("qweight") else held for name, held in state.items()}
    model.load_state_dict(other)
    assert not model(*args).any()


def few(*experts):
    """A token for some of six experts: too few to look at all."""
    torch.manual_seed(2)
    return torch.randn(1, 32), torch.tensor([experts]), torch.rand(1, len(experts))


def broken(layer):
    layer.register_forward_hook(lambda *_: 1 / 0)


def replaced(layer):
    layer.packed = torch.zeros_like(layer.packed)


def moved(layer):
    layer.packed.set_(torch.zeros_like(layer.packed))


def biased(layer):
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


@pytest.mark.parametrize("change", [broken, replaced, moved, biased])
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
@torch.no_grad()
def test_a_change_counts_for_calls_that_name_the_expert(change, weight):
    model = make(scheme="w8a8", experts=6)
    for dtype in (torch.float32, torch.bfloat16):
        args, others = ((x.to(dtype), *rest) for x, *rest in (few(1, 4), few(0, 5, 6)))
        before, wanted = model(*args), model(*others)
        layer = model.layer._modules[weight][4]
        packed, bias = layer.packed, layer.bias
        kept = packed.clone()
        change(layer)
        assert torch.equal(model(*others), wanted)
        if change is broken:
            with pytest.raises(ZeroDivisionError):
                model(*args)
            layer._forward_hooks.clear()
        else:
            assert not torch.equal(model(*args), before)
            layer.packed, layer.bias = packed, bias
            packed.set_(kept)
        assert torch.equal(model(*args), before)
        assert torch.equal(model(*others), wanted)


@torch.no_grad()
def test_a_weight_that_moved_while_another_dtype_ran():
    model, (x, *rest), (y, *others) = make(scheme="w8a8", experts=6), few(1, 4), few(0, 5)
    assert model(x, *rest).any()
    packed = model.layer.down_proj[4].packed
    packed.set_(torch.zeros_like(packed))
    model.layer.down_proj[1].packed.set_(torch.zeros_like(packed))
    model(y.bfloat16(), *others)
    assert not model(x, *rest).any()


@torch.no_grad()
def test_biases_that_moved_are_read_where_they_are():
    model, args = make(InterleavedExperts, scheme="w8a8"), given()
    before, kept = model(*args), [layer.bias.data for layer in model.layer.down_proj]
    for layer, bias in zip(model.layer.down_proj, kept, strict=True):
        layer.bias.data = bias + 1
    assert (model(*args) - before).norm() > 0.1


@torch.no_grad()
def test_layers_of_different_schemes_run_one_by_one():
    model, args = make(), given()
    wanted = model(*args)
    nybble.quantize(model, "w8a8", goal="memory", fuse=False, include="layer.*_proj.[0-2]")
    assert "down_proj.3" in model.layer.explain() or "gate_up_proj.3" in model.layer.explain()
    assert (model(*args) - wanted).norm() < 0.05 * wanted.norm()


def test_gradients_reach_the_input():
    model, (x, index, weight) = make(scheme="w8a8"), given()
    x.requires_grad_()
    model(x, index, weight).sum().backward()
    assert x.grad.norm() > 0


def test_arguments_by_name():
    model, args = make(scheme="w8a8"), given()
    names = ("hidden_states", "top_k_index", "top_k_weights")
    with torch.no_grad():
        assert torch.equal(model.layer(args[0], **dict(zip(names[1:], args[1:], strict=True))), model(*args))
    with pytest.raises(TypeError, match="takes hidden_states, top_k_index, top_k_weights"):
        model.layer(args[0], index=args[1], top_k_weights=args[2])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_with_data_serve_experts_and_tell_those_without(method):
    model, (x, index, weight) = make(), given(tokens=64)
    index = index.clamp(max=2)
    index[:, 1] = (index[:, 0] + 1) % 3  # expert 3 gets no token
    with torch.no_grad():
        wanted = model(x, index, weight)
    report = nybble.quantize(
        model, "w4a8g32", goal="memory", method=method, calibration=[(x, index, weight)], fuse=False
    )
    assert model.layer.explain() is None
    with torch.no_grad():
        assert (model(x, index, weight) - wanted).norm() < 0.2 * wanted.norm()
    assert "gate_up_proj.3" in str(report)


@pytest.mark.parametrize("name", ["mixtral.MixtralExperts", "qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
@torch.no_grad()
def test_the_experts_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    package, cls = name.split(".")
    module = pytest.importorskip(f"transformers.models.{package}.modeling_{package}")
    config = {
        "MixtralExperts": lambda: transformers.MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=4),
        "Qwen3MoeExperts": lambda: transformers.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=24, num_experts=4),
        "GptOssExperts": lambda: transformers.GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=4),
    }[cls]()
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model, args = Holder(getattr(module, cls)(config)).eval(), given()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    wanted = model(*args)
    assert nybble.quantize(model, "w8a8", goal="memory", fuse=False).coverage > 95
    assert model.layer.explain() is None
    assert (model(*args) - wanted).norm() < 0.05 * wanted.norm()
