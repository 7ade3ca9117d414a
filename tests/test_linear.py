"""nybble.nn.Linear where nn.Linear stood: what it looks like, and that other code can use it without knowing."""

import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nybble
from nybble import ops
from nybble.nn import Linear
from nybble.weights.scheme import Scheme

N, K = 33, 70
SCHEMES = ["w8a8", "w8a16", "w4a8", "w4a16g32", "w4a8g64asym"]
SYMMETRIC = ["w8a8", "w8a16", "w4a8", "w4a16g32", "w4a8g128"]


def dense_linear(bias=True, n=N, k=K, dtype=torch.float32):
    torch.manual_seed(7)
    return nn.Linear(k, n, bias, dtype=dtype)


def make(scheme="w8a8", bias=True, n=N, k=K, dtype=torch.float32):
    return Linear.from_dense(dense_linear(bias, n, k, dtype), scheme)


def just_loaded(layer):
    fresh = Linear(layer.in_features, layer.out_features, layer.bias is not None, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    return fresh


# --- attributes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_attributes_are_those_of_a_dense_layer(scheme, bias):
    dense, layer = dense_linear(bias), make(scheme, bias)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert str(layer.scheme) == scheme
    assert layer.training == dense.training
    assert (layer.bias is None) == (not bias)
    assert "bias" in layer._parameters
    assert layer.weight.shape == dense.weight.shape
    y = layer(torch.randn(2, 3, K))
    assert (y.shape, y.dtype) == ((2, 3, N), torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_repr_names_scheme_and_kernel(scheme):
    layer = make(scheme)
    kernel = nybble.explain(layer).kernel
    assert kernel.startswith(Scheme.parse(scheme).family)
    for text in (repr(layer), repr(nn.Sequential(layer)), repr(just_loaded(layer))):
        assert f"Linear(in_features={K}, out_features={N}, bias=True, scheme={scheme}, kernel={kernel})" in text


def test_repr_on_the_meta_device():
    assert "scheme=w8a8, kernel=none" in repr(Linear(K, N, device="meta"))


def test_a_new_layer_is_a_linear_layer_of_zeros():
    layer = Linear(K, N, scheme="w4a16g32asym")
    assert torch.equal(layer(torch.randn(3, K)), torch.zeros(3, N))
    with torch.no_grad():
        layer.bias.fill_(2)
    assert torch.equal(layer(torch.randn(3, K)), torch.full((3, N), 2.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scheme": "int8"}, "scheme='int8'"),
        ({"in_features": 0}, "in_features=0"),
        ({"out_features": -1}, "out_features=-1"),
        ({"scheme": "w8a8", "in_features": 140_000, "device": "meta"}, "in_features=140000"),
        ({"in_features": 2**31, "scheme": "w8a16", "device": "meta"}, f"in_features={2**31}"),
    ],
    ids=["scheme", "no inputs", "negative outputs", "accumulators could wrap", "too many inputs"],
)
def test_impossible_layers_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        Linear(**{"in_features": K, "out_features": N, **arguments})


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8g128", "w4a8g128asym"])
def test_the_longest_rows_that_a_scheme_accepts_can_be_computed(scheme):
    """All codes at their limits: an accumulator that wrapped would give a wrong sign."""
    k = min(Scheme.parse(scheme).max_in_features, 200_000)
    layer = Linear.from_weight(torch.ones(1, k), None, scheme)
    weight = layer.dequantized_weight()[0, 0].double()
    y = layer(torch.stack([torch.ones(k), -torch.ones(k)]))
    torch.testing.assert_close(y[:, 0].double() / (weight * k), torch.tensor([1.0, -1.0]).double(), rtol=1e-2, atol=0)


# --- from dense and back


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_dense_leaves_the_dense_layer_and_shares_its_bias(scheme):
    dense = dense_linear().eval()
    weight, version = dense.weight.detach().clone(), dense.weight._version
    layer = Linear.from_dense(dense, scheme)
    assert torch.equal(dense.weight, weight)
    assert dense.weight._version == version
    assert dense.weight.requires_grad
    assert layer.bias is dense.bias
    assert not layer.training
    error = (layer.dequantized_weight() - weight).abs().max() / weight.abs().max()
    assert 0 < error < (0.005 if layer.scheme.weight_bits == 8 else 0.1)


def test_from_dense_refuses_what_is_not_a_dense_layer():
    with pytest.raises(TypeError, match=r"dense: .*Conv1d"):
        Linear.from_dense(nn.Conv1d(3, 3, 1), "w8a8")
    with pytest.raises(TypeError, match=r"dense: .*Linear"):
        Linear.from_dense(make(), "w8a8")
    with pytest.raises(ValueError, match="method='best'"):
        Linear.from_dense(dense_linear(), "w8a8", method="best")
    broken = dense_linear()
    broken.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="weight: "):
        Linear.from_dense(broken, "w8a8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_from_dense_of_every_dtype(dtype):
    layer = make("w8a16", dtype=dtype)
    assert (layer.dtype, layer.bias.dtype, layer.weight.dtype, layer.dequantize().weight.dtype) == (dtype,) * 4
    assert layer.state_dict()["scale"].dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SYMMETRIC)
def test_dequantize_and_quantize_again_gives_the_same_codes(scheme, bias):
    layer = make(scheme, bias).eval()
    dense = layer.dequantize()
    assert type(dense) is nn.Linear
    assert not dense.training
    assert (dense.weight.shape, (dense.bias is None)) == ((N, K), not bias)
    again = Linear.from_dense(dense, scheme)
    assert torch.equal(again.qweight, layer.qweight)
    torch.testing.assert_close(again.scale, layer.scale)
    if bias:
        assert torch.equal(dense.bias, layer.bias)
        assert dense.bias.data_ptr() != layer.bias.data_ptr()


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16g32", "w4a16g64asym"])
def test_the_dense_layer_computes_the_same(scheme):
    layer = make(scheme)
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), layer.dequantize()(x))


# --- the weight that other code looks at


@pytest.mark.parametrize("loaded", [False, True], ids=["packed", "just loaded"])
def test_weight_looks_like_the_dense_one(loaded):
    layer = just_loaded(make("w4a16g32")) if loaded else make("w4a16g32")
    weight = layer.weight
    assert weight.shape == weight.size() == torch.Size((N, K))
    assert (weight.size(0), weight.size(1)) == (N, K)
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert not weight.requires_grad
    assert not isinstance(weight, torch.Tensor)
    assert f"({N}, {K})" in repr(weight)
    assert "w4a16g32" in repr(weight)


def test_torch_functions_of_weight_get_the_dequantized_one():
    layer = make("w4a16g32")
    x, weight = torch.randn(5, K), layer.dequantized_weight()
    assert torch.equal(F.linear(x, layer.weight, layer.bias), F.linear(x, weight, layer.bias))
    assert torch.equal(torch.matmul(x, torch.transpose(layer.weight, 0, 1)), x @ weight.t())
    assert torch.equal(x @ layer.weight.dequantize().t(), x @ weight.t())
    assert torch.equal(torch.linalg.vector_norm(layer.weight), torch.linalg.vector_norm(weight))
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([weight, weight]))
    assert torch.equal(torch.add(input=weight, other=layer.weight), 2 * weight)


def test_weight_of_a_half_layer_and_of_a_meta_layer():
    assert make().half().weight.dtype == torch.float16
    meta = Linear(K, N, device="meta").weight
    assert (meta.shape, meta.device.type) == ((N, K), "meta")


# --- inside models


def test_parameters_and_modules_of_a_model():
    model = nn.Sequential(nn.LayerNorm(K), make(), nn.ReLU(), make("w4a16g32", n=5, k=N))
    first = next(model[1].parameters())
    assert (first.device.type, first.dtype) == ("cpu", torch.float32)
    assert next(model.parameters()) is model[0].weight
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.bias", "3.bias"]
    assert [type(module) for module in model.children()].count(Linear) == 2
    assert model(torch.randn(4, K)).shape == (4, 5)
    assert model.eval()[1].training is False
    assert model.train()[3].training is True


def test_hooks_run():
    layer, seen = make(), []
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output) or output + 1)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0]))
    x = torch.randn(3, K, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, make()(2 * x) + 1)
    assert [tuple(tensor.shape) for tensor in seen] == [(3, N), (3, K)]


def encoder_with(linear1, linear2, **options):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, **options).eval()
    if linear1 is not None:
        layer.linear1, layer.linear2 = linear1, linear2
    return layer


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("which", ["layer", "encoder", "encoder with padding"])
def test_torch_fused_encoder_does_not_pass_by_the_layer(monkeypatch, which, activation):
    """In eval mode torch hands plain weights to one fused kernel; a quantized layer must still be the one that runs."""
    plain = encoder_with(None, None, activation=activation)
    quantized = [Linear.from_dense(linear, "w8a16") for linear in (plain.linear1, plain.linear2)]
    layer = encoder_with(*quantized, activation=activation)
    dense = encoder_with(*(linear.dequantize() for linear in quantized), activation=activation)
    x = torch.randn(2, 5, 64)
    models, options = (layer, dense), {}
    if which != "layer":
        models = tuple(nn.TransformerEncoder(one, 2).eval() for one in models)
    if which == "encoder with padding":
        options["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    calls, run = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda *arguments: calls.append(1) or run(*arguments))
    with torch.inference_mode():
        y = models[0](x, **options)
    assert len(calls) == (2 if which == "layer" else 4)
    kept = ~options.get("src_key_padding_mask", torch.zeros(2, 5, dtype=torch.bool))
    unfused = models[1](x, **options)  # gradients are on: torch takes the plain path
    assert unfused.requires_grad
    torch.testing.assert_close(y[kept], unfused[kept].detach(), rtol=1e-4, atol=1e-4)


# --- memory and threads


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_copy_of_the_weight_is_held(scheme):
    layer = make(scheme, n=256, k=512)
    layer.unpack()
    portable = layer.nbytes
    assert {"qweight", "scale"} < {name for name, _ in layer.named_parameters()}
    layer(torch.randn(1, 512))
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {id(tensor) for tensor in tensors} == {id(layer.packed), id(layer.bias)}
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert held == layer.nbytes == layer.packed.nbytes + layer.bias.nbytes
    assert held <= portable * 1.03  # 64-byte alignment, and the column sums of 8-bit weights
    leftovers = [v for v in layer.__dict__.values() if isinstance(v, torch.Tensor)]
    assert leftovers == []


def test_reading_the_weight_does_not_keep_it():
    layer = make()
    packed = layer.packed
    assert layer.qweight.shape == (N, K)
    assert layer.state_dict()["qweight"].shape == (N, K)
    assert layer.weight.dequantize().shape == (N, K)
    assert layer.packed is packed
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_pack_and_unpack_are_inverse():
    layer = make("w4a8g64asym")
    portable = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, K)
    y, packed = layer(x), layer.packed.clone()
    layer.unpack()
    layer.unpack()
    assert layer.packed is None
    assert {name: p.dtype for name, p in layer.named_parameters()} == {n: t.dtype for n, t in portable.items()}
    layer.pack()
    layer.pack()
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer(x), y)


def test_first_calls_from_many_threads():
    interval, failures = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)
    try:
        for scheme in SCHEMES * 4:
            layer = make(scheme)
            fresh, barrier = just_loaded(layer), threading.Barrier(8)
            x = torch.randn(3, K)
            expected = layer(x)

            def first(fresh=fresh, barrier=barrier, x=x, expected=expected):
                barrier.wait()
                try:
                    if not torch.equal(fresh(x), expected):
                        failures.append("another result")
                except Exception as error:  # noqa: BLE001 whatever it is, the test shows it
                    failures.append(error)

            threads = [threading.Thread(target=first) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


# --- tied weights


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: make("w4a16g32"), "32"),
        (lambda: make("w8a8", n=N + 1), str(N + 1)),
        (lambda: make("w8a8", k=K + 1), str(K + 1)),
        (lambda: Linear(K, N, device="meta"), "meta"),
    ],
    ids=["scheme", "outputs", "inputs", "meta"],
)
def test_a_weight_that_does_not_fit_cannot_be_shared(other, named):
    layer = make()
    before = layer.packed
    with pytest.raises(ValueError, match="other: ") as error:
        layer.tie_to(other())
    assert named in str(error.value)
    assert layer.packed is before


def test_tied_layers_share_one_weight():
    first, second = make(), Linear.from_dense(nn.Linear(K, N), "w8a8")
    assert first.weight_id != second.weight_id
    second.tie_to(first)
    assert first.weight_id == second.weight_id
    assert first.packed.data_ptr() == second.packed.data_ptr()
    x = torch.randn(3, K)
    torch.testing.assert_close(first(x) - first.bias, second(x) - second.bias)
    third = just_loaded(first)
    second.tie_to(third)
    assert second.weight_id == third.weight_id != first.weight_id


@pytest.mark.parametrize("m", [0, -1])
def test_no_rows_have_no_explanation(m):
    layer = nybble.nn.Linear.from_dense(nn.Linear(8, 4), "w8a8")
    with pytest.raises(ValueError, match=f"m={m}: must be at least 1"):
        nybble.explain(layer, m=m)
