"""Gradients through a quantized layer, and the modes that change how torch runs it: autocast, no_grad, inference_mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nybble.nn import Linear

N, K = 33, 70
SCHEMES = ["w8a8", "w8a16", "w4a8g32", "w4a16g64asym"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest gradient: one rounding of the weight, one of the result.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def make(scheme="w8a8", bias=True, n=N, k=K):
    torch.manual_seed(7)
    return Linear.from_dense(nn.Linear(k, n, bias), scheme)


def just_loaded(layer):
    fresh = Linear(layer.in_features, layer.out_features, layer.bias is not None, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def gradients(run, *inputs):
    """Of a fixed weighted sum of run's result, with respect to the inputs."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    y = run(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return torch.autograd.grad(y, inputs, weights)


def assert_near(actual, expected, dtype=torch.float32):
    assert expected.abs().max() > 0
    assert (actual.double() - expected.double()).abs().max() <= ROUNDING[dtype] * expected.abs().max()


# --- gradients


@pytest.mark.parametrize("shape", [(5, K), (K,), (2, 3, K)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_dequantized_weight(scheme, dtype, shape):
    """Exactly for float activations; straight through the rounding for integer ones."""
    layer = make(scheme)
    x = torch.randn(shape).to(dtype)
    bias = torch.randn(N).to(dtype)

    def quantized(x, bias):
        return torch.func.functional_call(layer, {"bias": bias}, (x,))

    def dense(x, bias):
        return F.linear(x.double(), layer.dequantized_weight().double(), bias.double()).to(dtype)

    given, expected = gradients(quantized, x, bias), gradients(dense, x, bias)
    for actual, wanted in zip(given, expected, strict=True):
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
        assert_near(actual, wanted, dtype)


def test_the_gradient_with_a_bias_of_another_dtype():
    layer = make()
    bias = torch.zeros(N, requires_grad=True)
    y = torch.func.functional_call(layer, {"bias": bias}, (torch.randn(6, K, dtype=torch.bfloat16),))
    y.sum().backward()
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full((N,), 6.0))


def test_gradient_of_a_strided_input_and_no_rows():
    layer = make("w8a16", bias=False)
    weight = layer.dequantized_weight()
    wide = torch.randn(5, 2 * K)
    (grad,) = gradients(lambda x: layer(x[:, ::2]), wide)
    (expected,) = gradients(lambda x: F.linear(x[:, ::2], weight), wide)
    assert_near(grad, expected)
    (empty,) = gradients(layer, torch.randn(0, K))
    assert empty.shape == (0, K)


def test_only_the_bias_trains():
    layer = make()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, before, codes = torch.randn(4, K), layer.bias.detach().clone(), layer.packed.clone()
    layer(x).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.bias, before - 2)
    assert torch.equal(layer.packed, codes)


def test_a_frozen_layer_passes_the_gradient_on():
    layer = make("w4a16g32").requires_grad_(False)
    x = torch.randn(4, K, requires_grad=True)
    y = layer(x)
    assert y.requires_grad
    y.sum().backward()
    assert_near(x.grad, layer.dequantized_weight().sum(0).expand(4, K))
    assert layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("loaded", [False, True], ids=["packed", "just loaded"])
def test_requires_grad_on_the_module_leaves_the_codes_out(loaded):
    layer = just_loaded(make()) if loaded else make()
    layer.requires_grad_(False)
    layer.bias.requires_grad_(True)
    assert all(not p.requires_grad for name, p in layer.named_parameters() if name != "bias")


def test_gradients_accumulate_and_can_be_taken_twice():
    layer = make("w8a16", bias=False)
    x = torch.randn(3, K, requires_grad=True)
    (once,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    weight = layer.dequantized_weight()
    assert_near(twice, 2 * (weight.sum(1) @ weight).expand(3, K))
    layer(x).sum().backward()
    layer(x).sum().backward()
    assert_near(x.grad, 2 * weight.sum(0).expand(3, K))


class LoRA(nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, base, rank=4):
        super().__init__()
        torch.manual_seed(11)
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16g64asym"])
def test_lora_around_frozen_layers(scheme):
    first, second = make(scheme, n=48, k=K), make(scheme, n=20, k=48)
    quantized = nn.Sequential(LoRA(first), nn.Tanh(), LoRA(second))
    dense = nn.Sequential(LoRA(first.dequantize()), nn.Tanh(), LoRA(second.dequantize()))
    x = torch.randn(6, K)
    for model in (quantized, dense):
        model(x).square().sum().backward()
    trained = {name: p for name, p in quantized.named_parameters() if p.requires_grad}
    assert sorted(trained) == ["0.down", "0.up", "2.down", "2.up"]
    expected = dict(dense.named_parameters())
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


def test_lora_learns_on_an_int8_layer():
    adapter = LoRA(make("w8a8"))
    x, target = torch.randn(32, K), torch.randn(32, N)
    optimizer = torch.optim.Adam([adapter.down, adapter.up], lr=0.02)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(adapter(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_activation_checkpointing():
    layer = make("w4a8g32")
    x = torch.randn(4, K)
    (plain,) = gradients(layer, x)
    (recomputed,) = gradients(lambda v: torch.utils.checkpoint.checkpoint(layer, v, use_reentrant=False), x)
    assert torch.equal(plain, recomputed)


def test_vmap_and_functional_call():
    layer = make()
    x = torch.randn(4, 3, K)
    mapped = torch.func.vmap(layer)(x)
    assert torch.equal(mapped, torch.stack([layer(part) for part in x]))
    without = torch.func.functional_call(layer, {"bias": torch.zeros(N)}, (x,))
    torch.testing.assert_close(without + layer.bias, layer(x))


# --- modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast(scheme, dtype):
    layer = make(scheme)
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == dtype == F.linear(x, layer.dequantized_weight()).dtype
        assert torch.equal(y, layer(x.to(dtype)))
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert torch.equal(y, layer(x.to(dtype)))
    assert layer(x).dtype == torch.float32
    error = (y.float() - layer(x)).abs().max() / layer(x).abs().max()
    assert 0 < error < 0.03


def test_gradient_under_autocast():
    layer = make("w8a16", bias=False)
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_near(x.grad, layer.dequantized_weight().sum(0).expand(5, K), torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_modes_without_gradients_give_the_same_numbers(scheme, mode):
    layer = make(scheme)
    x = torch.randn(5, K, requires_grad=True)
    with mode():
        y = layer(x)
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_first_call_without_gradients_does_not_spoil_later_training(mode):
    """The weight is packed at the first call, wherever that is; it must not become an inference tensor."""
    layer = just_loaded(make())
    x = torch.randn(5, K)
    with mode():
        layer(x)
    (grad,) = gradients(layer, x)
    assert torch.equal(grad, gradients(make(), x)[0])


def test_a_layer_made_in_inference_mode_can_be_evaluated_and_saved():
    with torch.inference_mode():
        layer = make()
    x = torch.randn(5, K)
    with torch.no_grad():
        assert torch.equal(layer(x), make()(x))
    for name, tensor in make().state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
