"""The state of nybble.nn.Linear: saved, loaded, copied, moved, shared between processes; and damaged states refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nybble.nn import Linear

N, K = 33, 71  # odd: 4-bit rows end in an unused nibble
SCHEMES = ["w8a8", "w8a8g16asym", "w8a16", "w8a16g32", "w4a8", "w4a16g32", "w4a8g64asym"]


def make(scheme="w8a8", bias=True, n=N, k=K, seed=7):
    torch.manual_seed(seed)
    return Linear.from_dense(nn.Linear(k, n, bias), scheme)


def empty_like(layer, **options):
    return Linear(layer.in_features, layer.out_features, layer.bias is not None, scheme=layer.scheme, **options)


def just_loaded(layer):
    fresh = empty_like(layer)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def unpacked(layer):
    fresh = just_loaded(layer)
    fresh.unpack()
    return fresh


def pickled(module):
    return pickle.loads(pickle.dumps(module))  # noqa: S301 its own bytes


def clone_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_same_layer(actual, expected):
    assert_same_state(actual.state_dict(), expected.state_dict())
    x = torch.randn(5, expected.in_features)
    assert torch.equal(actual(x), expected(x))


# --- state_dict


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_is_the_portable_layout(scheme, bias, packed):
    layer = make(scheme, bias) if packed else unpacked(make(scheme, bias))
    groups = layer.scheme.groups(K)
    if layer.scheme.weight_bits == 8:
        expected = {"qweight": ((N, K), torch.int8), "scale": ((N, groups), torch.float32)}
    else:
        expected = {"qweight": ((N, (K + 1) // 2), torch.uint8), "scale": ((N, groups), torch.bfloat16)}
    if not layer.scheme.symmetric:
        expected["zero_point"] = ((N, groups), expected["qweight"][1])
    if bias:
        expected["bias"] = ((N,), torch.float32)
    state = layer.state_dict()
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in state.values())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_state_dict_of_a_model_keeps_its_prefixes_and_metadata():
    model = nn.Sequential(make(), nn.Sequential(nn.ReLU(), make("w4a16g32", k=N)))
    state = model.state_dict()
    assert list(state) == ["0.qweight", "0.scale", "0.bias", "1.1.qweight", "1.1.scale", "1.1.bias"]
    assert set(state._metadata) >= {"0", "1.1"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_load_into_a_new_layer(scheme):
    layer = make(scheme)
    fresh = empty_like(layer)
    result = fresh.load_state_dict(layer.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_layer(fresh, layer)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_load_into_a_packed_layer(scheme, assign):
    layer, other = make(scheme), make(scheme, seed=8)
    x = torch.randn(5, K)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(clone_of(other.state_dict()), assign=assign)
    assert_same_layer(layer, other)


def test_loading_keeps_the_bias_parameter():
    layer, other = make(), make(seed=8)
    bias = layer.bias
    layer.load_state_dict(other.state_dict())
    assert layer.bias is bias
    assert torch.equal(bias, other.bias)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_meta_then_assign(scheme):
    layer = make(scheme)
    meta = empty_like(layer, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    meta.load_state_dict(clone_of(layer.state_dict()), assign=True)
    assert not any(p.is_meta for p in meta.parameters())
    assert_same_layer(meta, layer)


@pytest.mark.parametrize("construct", ["device", "context", "skip_init"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_meta_then_to_empty_then_load(scheme, construct):
    layer = make(scheme)
    if construct == "skip_init":
        fresh = nn.utils.skip_init(Linear, K, N, scheme=scheme)
    else:
        with torch.device("meta" if construct == "context" else "cpu"):
            fresh = Linear(K, N, scheme=scheme, device=None if construct == "context" else "meta")
        assert fresh.device.type == fresh.weight.device.type == "meta"
        assert fresh.to_empty(device="cpu") is fresh
    assert fresh.device.type == "cpu"
    fresh.load_state_dict(layer.state_dict())
    assert_same_layer(fresh, layer)


def test_a_meta_layer_infers_shapes_or_says_that_it_is_on_meta():
    layer = Linear(K, N, device="meta")
    try:
        y = layer(torch.randn(2, K, device="meta"))
    except (ValueError, RuntimeError) as error:
        assert "meta device" in str(error)  # noqa: PT017 either is right
    else:
        assert (y.shape, y.device.type) == ((2, N), "meta")
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        layer(torch.randn(2, K))


# --- damaged states


def edit(name, change):
    def apply(state):
        state[name] = change(state[name])

    return apply


def put(name, index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return edit(name, change)


DAMAGE = {
    "qweight of another dtype": ("w8a8", "qweight", edit("qweight", lambda t: t.to(torch.int16))),
    "qweight unsigned": ("w8a8", "qweight", edit("qweight", lambda t: t.view(torch.uint8))),
    "qweight dense": ("w8a8", "qweight", edit("qweight", lambda t: t.float())),
    "qweight too short": ("w8a8", "qweight", edit("qweight", lambda t: t[:-1])),
    "qweight transposed": ("w8a8", "qweight", edit("qweight", lambda t: t.t())),
    "qweight not packed in nibbles": ("w4a16g32", "qweight", edit("qweight", lambda t: t.repeat(1, 2)[:, :K])),
    "qweight empty": ("w4a16g32", "qweight", edit("qweight", lambda t: t[:0])),
    "qweight flat": ("w4a16g32", "qweight", edit("qweight", torch.flatten)),
    "nibble beyond the row": ("w4a16g32", "qweight", put("qweight", (N - 1, -1), 0x18)),
    "scale of another dtype": ("w8a8", "scale", edit("scale", lambda t: t.double())),
    "scale double": ("w4a16g32", "scale", edit("scale", lambda t: t.double())),
    "scale of another group size": ("w4a16g32", "scale", edit("scale", lambda t: t[:, :1])),
    "scale without groups": ("w8a8", "scale", edit("scale", lambda t: t[:, 0])),
    "scale NaN": ("w8a8", "scale", put("scale", (N - 1, 0), torch.nan)),
    "scale NaN in the last group": ("w4a16g32", "scale", put("scale", (0, -1), torch.nan)),
    "scale infinite": ("w4a8g64asym", "scale", put("scale", (1, 1), torch.inf)),
    "scale negative": ("w8a16", "scale", put("scale", (0, 0), -1e-3)),
    "zero_point above 15": ("w4a8g64asym", "zero_point", put("zero_point", (N - 1, 1), 16)),
    "zero_point signed": ("w4a8g64asym", "zero_point", edit("zero_point", lambda t: t.to(torch.int8))),
    "zero_point of one group": ("w4a8g64asym", "zero_point", edit("zero_point", lambda t: t[:, :1])),
    "qweight missing": ("w8a8", "qweight", lambda state: state.pop("qweight")),
    "scale missing": ("w4a16g32", "scale", lambda state: state.pop("scale")),
    "zero_point missing": ("w4a8g64asym", "zero_point", lambda state: state.pop("zero_point")),
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_states_are_refused_by_name_and_change_nothing(damage, strict, packed):
    scheme, name, apply = DAMAGE[damage]
    layer = make(scheme) if packed else unpacked(make(scheme))
    before, held = clone_of(layer.state_dict()), layer.packed
    state = clone_of(make(scheme, seed=8).state_dict())
    apply(state)
    model = nn.Sequential(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match=name) as error:
        model.load_state_dict({f"0.0.{key}": value for key, value in state.items()}, strict=strict)
    assert "0.0" in str(error.value)
    assert layer.packed is held
    assert_same_state(layer.state_dict(), before)


def test_the_code_minus_128_is_held():
    layer = make("w8a8")
    state = clone_of(layer.state_dict())
    state["qweight"][N - 1, K - 1] = -128
    layer.load_state_dict(state)
    assert layer.qweight[N - 1, K - 1] == -128
    assert layer.dequantized_weight()[N - 1, K - 1] == -128 * layer.scale[N - 1, 0]


def test_a_state_without_damage_is_accepted_where_the_damaged_ones_were_not():
    for scheme in {scheme for scheme, *_ in DAMAGE.values()}:
        layer, other = make(scheme), make(scheme, seed=8)
        layer.load_state_dict(clone_of(other.state_dict()))
        assert_same_layer(layer, other)


def test_keys_of_a_dense_layer_and_missing_keys_are_named():
    layer = make()
    with pytest.raises(RuntimeError, match="weight") as error:
        layer.load_state_dict(nn.Linear(K, N).state_dict())
    assert all(key in str(error.value) for key in ("qweight", "scale", '"weight"'))
    result = layer.load_state_dict({"bias": torch.ones(N), "other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["other"]
    assert sorted(result.missing_keys) == ["qweight", "scale"]
    assert torch.equal(layer.bias, torch.ones(N))
    assert torch.equal(layer.qweight, make().qweight)


def test_a_bias_of_another_shape_is_named():
    layer, state = make(), make(seed=8).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        layer.load_state_dict({**state, "bias": torch.zeros(N + 1)})
    assert torch.equal(layer.bias, make().bias)


# --- copies


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_are_equal_and_independent(scheme, way, packed):
    layer = (make(scheme) if packed else unpacked(make(scheme))).eval()
    before = clone_of(layer.state_dict())
    twin = way(layer)
    assert (twin.training, str(twin.scheme), twin.dtype, repr(twin)) == (False, scheme, layer.dtype, repr(layer))
    assert_same_layer(twin, layer)
    twin.load_state_dict(make(scheme, seed=8).state_dict())
    assert_same_state(layer.state_dict(), before)
    assert_same_layer(twin, make(scheme, seed=8))


def test_deepcopy_of_a_packed_layer_is_packed():
    layer = make()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.packed, layer.packed)
    assert twin.packed.data_ptr() != layer.packed.data_ptr()
    assert twin.bias is not layer.bias


def test_the_packed_weight_is_not_pickled():
    layer = make("w8a8", n=1, k=8192)  # packed, it has 16 rows
    if layer.layout == "plain":
        pytest.skip("only the reference runs here: the packed weight is the portable one")
    assert layer.packed.nbytes > 16 * 8192
    for given in (layer, unpacked(layer)):
        assert 8192 < len(pickle.dumps(given)) < 2 * 8192
    assert layer.packed is not None


def tied_model():
    model = nn.Module()
    model.first, model.second, model.third = make(), make(seed=8), make(seed=9)
    model.second.tie_to(model.first)
    return model


TIED_WAYS = {
    "deepcopy": copy.deepcopy,
    "half": lambda model: model.half().float(),
    "share_memory": lambda model: model.share_memory(),
    "to": lambda model: model.to("cpu"),
    "pickle": pickled,
    "load_state_dict": lambda model: model.load_state_dict(clone_of(model.state_dict())) and model,
}


@pytest.mark.parametrize("way", TIED_WAYS)
def test_tied_layers_keep_their_values(way):
    model = tied_model()
    x = torch.randn(3, K)
    expected = [layer(x) for layer in model.children()]
    tolerance = 1e-3 if way == "half" else 0  # the bias goes through float16
    for layer, wanted in zip(TIED_WAYS[way](model).children(), expected, strict=True):
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", [way for way in TIED_WAYS if way != "pickle"])
def test_tied_layers_stay_tied(way):
    """As layers that share one Parameter do. A pickle holds the portable tensors of each layer; nybble.save keeps ties."""
    result = TIED_WAYS[way](tied_model())
    for _ in range(2):
        assert result.first.weight_id == result.second.weight_id
        assert result.first.weight_id != result.third.weight_id
        for layer in result.children():
            layer(torch.randn(3, K))
    assert result.first.packed.data_ptr() == result.second.packed.data_ptr()


# --- moves


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dtypes_change_activations_and_bias_alone(scheme, dtype, packed):
    layer = make(scheme) if packed else unpacked(make(scheme))
    before = clone_of(layer.state_dict())
    assert layer.to(dtype) is layer
    assert (layer.dtype, layer.weight.dtype, layer.bias.dtype) == (dtype,) * 3
    state = layer.state_dict()
    assert_same_state({k: v for k, v in state.items() if k != "bias"}, {k: v for k, v in before.items() if k != "bias"})
    assert torch.equal(state["bias"], before["bias"].to(dtype))
    if dtype != torch.float64:  # float64 is no activation dtype
        assert layer(torch.randn(3, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_dtype_methods_of_a_model(method, packed):
    layer = make("w8a8") if packed else unpacked(make("w8a8"))
    scale = layer.scale.clone()
    getattr(nn.Sequential(layer), method)()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, scale)
    assert layer.dtype == getattr(torch.zeros(1), method)().dtype


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_to_meta(packed):
    layer = make("w4a8g64asym") if packed else unpacked(make("w4a8g64asym"))
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert layer.to("meta") is layer
    assert layer.device.type == layer.bias.device.type == "meta"
    state = layer.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_share_memory(packed):
    layer = make("w4a8g64asym") if packed else unpacked(make("w4a8g64asym"))
    expected = clone_of(layer.state_dict())
    layer.share_memory()
    held = [*layer.parameters(), *layer.buffers()]
    assert len(held) == (2 if packed else 4)
    assert all(tensor.is_shared() for tensor in held)
    assert_same_state(layer.state_dict(), expected)
    assert_same_layer(layer, make("w4a8g64asym"))
