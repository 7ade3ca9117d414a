"""The ops as torch sees them: opcheck, what they refuse, and activations that lie in memory in unusual ways."""

import pytest
import torch
from torch import nn

from nybble import ops
from nybble.dispatch.selection import NoKernelError
from nybble.nn import Linear

from .op_arguments import arguments

N, K = 33, 70
SCHEMES = ["w8a8", "w8a16", "w4a8g32", "w4a16g64asym"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make(scheme="w8a8", bias=True, n=N, k=K):
    torch.manual_seed(7)
    return Linear.from_dense(nn.Linear(k, n, bias), scheme)


# --- opcheck


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_linear(scheme, with_bias):
    layer = make(scheme, with_bias)
    x = torch.randn(3, K, requires_grad=True)
    results = torch.library.opcheck(torch.ops.nybble.linear.default, arguments(layer, x))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, K), (K,), (2, 1, 3, K), (0, K)], ids=str)
def test_opcheck_linear_shapes_and_dtypes(shape, dtype):
    layer = make("w8a16")
    x = torch.randn(shape, dtype=dtype)
    results = torch.library.opcheck(
        torch.ops.nybble.linear.default, arguments(layer, x), test_utils=("test_schema", "test_faketensor")
    )
    assert set(results.values()) == {"SUCCESS"}
    assert layer(x).dtype == dtype
    assert layer(x).shape == (*shape[:-1], N)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a16"])
def test_opcheck_dequantize(scheme):
    _, packed, _, *rest = arguments(make(scheme), None)
    results = torch.library.opcheck(torch.ops.nybble.dequantize.default, (packed, *rest))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_catches_a_wrong_fake():
    """opcheck is a check only if it can fail: an op whose fake has the wrong dtype does."""
    with torch.library._scoped_library("nybble_test", "DEF") as library:
        library.define("wrong(Tensor x) -> Tensor")
        library.impl("wrong", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("nybble_test::wrong", lambda x: x.new_empty(x.shape, dtype=torch.int8), lib=library)
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(torch.ops.nybble_test.wrong.default, (torch.randn(3),))


def test_dequantize_is_the_weight_the_codes_stand_for():
    for scheme in SCHEMES:
        layer = make(scheme)
        _, packed, _, *rest = arguments(layer, None)
        weight = torch.ops.nybble.dequantize(packed, *rest)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, layer.dequantized_weight())


# --- what is refused


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.tensor(1.0), ["x", "()", f"in_features={K}"]),
        (torch.randn(3, K + 1), ["x", f"(3, {K + 1})", f"in_features={K}"]),
        (torch.randn(K, 3), ["x", f"({K}, 3)", f"in_features={K}"]),
        (torch.randn(0), ["x", "(0,)", f"in_features={K}"]),
        (torch.randn(3, K).double(), ["x", "torch.float64", "torch.bfloat16"]),
        (torch.ones(3, K, dtype=torch.int8), ["x", "torch.int8", "torch.bfloat16"]),
        (torch.ones(3, K, dtype=torch.bool), ["x", "torch.bool"]),
        (torch.randn(3, K, dtype=torch.complex64), ["x", "torch.complex64"]),
    ],
    ids=["0-d", "too wide", "transposed", "empty", "float64", "int8", "bool", "complex64"],
)
def test_wrong_x_is_refused_by_name(x, named):
    with pytest.raises(ValueError, match=r"^x: ") as error:
        make()(x)
    assert all(part in str(error.value) for part in named), str(error.value)


@pytest.mark.parametrize(
    ("bias", "named"),
    [
        (torch.zeros(N + 1), [f"({N + 1},)", f"({N},)"]),
        (torch.zeros(1, N), [f"(1, {N})", f"({N},)"]),
        (torch.zeros(()), ["()", f"({N},)"]),
        (torch.zeros(N, dtype=torch.float64), ["torch.float64", "torch.bfloat16"]),
        (torch.zeros(N, dtype=torch.int32), ["torch.int32", "torch.bfloat16"]),
        (torch.zeros(N, device="meta"), ["meta", "cpu"]),
    ],
    ids=["too long", "2-d", "0-d", "float64", "int32", "other device"],
)
def test_wrong_bias_is_refused_by_name(bias, named):
    # Where one tensor is on meta, the fake kernel runs; its checks are torch's RuntimeErrors.
    with pytest.raises((ValueError, RuntimeError), match=r"^bias: ") as error:
        ops.linear(*arguments(make(), torch.randn(3, K), bias=bias))
    assert all(part in str(error.value) for part in named), str(error.value)


PACKED_DAMAGE = {
    "too short": lambda packed: packed[:64].clone(),
    "empty": lambda packed: packed[:0].clone(),
    "wrong dtype": lambda packed: packed.to(torch.float32),
    "strided": lambda packed: packed.repeat_interleave(2)[::2],
    "other device": lambda packed: packed.to("meta"),
}


@pytest.mark.parametrize("damage", PACKED_DAMAGE)
def test_wrong_packed_is_refused_by_name(damage):
    layer = make()
    values = arguments(layer, torch.randn(3, K), packed=PACKED_DAMAGE[damage](layer.packed))
    with pytest.raises((ValueError, RuntimeError), match=r"^packed: "):
        ops.linear(*values)
    if damage != "other device":
        with pytest.raises(ValueError, match=r"^packed: "):
            torch.ops.nybble.dequantize(values[1], *values[3:])


def test_a_weight_too_small_for_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"packed: has .* needs"):
        ops.linear(*arguments(make(), torch.randn(3, K), bias=None, out_features=100 * N))


@pytest.mark.parametrize(("name", "value"), [("scheme", "w8a9"), ("scheme", ""), ("out_features", 0)])
def test_wrong_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ops.linear(*arguments(make(), torch.randn(3, K), bias=None, **{name: value}))


def test_a_layout_that_no_kernel_reads_is_refused_with_every_reason():
    layer = make()
    with pytest.raises(NoKernelError, match=rf"reads layout {layer.layout},\s+the\s+weight\s+is\s+n99k9"):
        ops.linear(*arguments(layer, torch.randn(3, K), layout="n99k9"))


def test_the_fake_refuses_the_same_shapes():
    layer = make()
    for x in (torch.randn(3, K + 1, device="meta"), torch.randn((), device="meta")):
        with pytest.raises(RuntimeError, match=r"^x: "):
            torch.ops.nybble.linear(*arguments(layer, x, packed=layer.packed.to("meta"), bias=None))


# --- where activations lie


def storage(rows, columns, dtype):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


STRIDED = {
    "row stride above K": lambda t: storage(9, K + 31, t)[:, :K],
    "row stride above K, offset": lambda t: storage(9, K + 31, t)[:, 17 : 17 + K],
    "every second row": lambda t: storage(18, K, t)[::2],
    "every second column": lambda t: storage(9, 2 * K, t)[:, ::2],
    "one row expanded": lambda t: storage(1, K, t).expand(9, K),
    "one value expanded": lambda t: storage(1, 1, t).expand(9, K),
    "overlapping rows": lambda t: storage(1, 9 + K, t).as_strided((9, K), (1, 1)),
    "transposed": lambda t: storage(K, 9, t).t(),
    "slice at an odd offset": lambda t: storage(1, 3 + 9 * K, t)[0, 3:].view(9, K),
    "1-d": lambda t: storage(1, K, t)[0],
    "1-d strided": lambda t: storage(K, 3, t)[:, 1],
    "4-d": lambda t: storage(12, K, t).view(2, 2, 3, K),
    "batch and sequence swapped": lambda t: storage(12, K, t).view(4, 3, K).transpose(0, 1),
    "3-d expanded": lambda t: storage(3, K, t).expand(4, 3, K),
    "M = 0": lambda t: storage(0, K, t),
    "a batch of 0": lambda t: storage(0, K, t).view(0, 3, K),
    "a sequence of 0": lambda t: storage(0, K, t).view(2, 0, K),
    "0 rows of a wide matrix": lambda t: storage(4, K + 5, t)[4:, :K],
}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16g32asym"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_strides_do_not_change_the_result(view, dtype, scheme):
    layer = make(scheme)
    x = STRIDED[view](dtype)
    before = x.clone()
    y = layer(x)
    assert y.shape == (*x.shape[:-1], N)
    assert y.dtype == dtype
    assert y.is_contiguous()
    flat = x.contiguous().clone().view(-1, K)
    assert torch.equal(y.view(-1, N), layer(flat))
    for row, result in zip(flat, y.view(-1, N), strict=True):
        torch.testing.assert_close(result, layer(row))
    assert torch.equal(x, before)


def test_stride_cases_are_what_their_names_say():
    views = {name: view(torch.float32) for name, view in STRIDED.items()}
    assert views["overlapping rows"].stride() == (1, 1)
    assert views["one row expanded"].stride() == (0, 1)
    assert views["slice at an odd offset"].storage_offset() == 3
    assert views["every second column"].stride(1) == 2


def test_a_lazily_negated_view():
    x = torch.complex(torch.randn(9, K), torch.randn(9, K)).conj().imag
    assert x.is_neg()
    layer = make()
    assert torch.equal(layer(x), layer(x.resolve_neg().contiguous()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_strided_bias_and_a_bias_of_another_dtype(dtype):
    layer = make("w8a16")
    x = torch.randn(3, K)
    strided = torch.randn(2 * N).to(dtype)[::2]
    assert strided.stride() == (2,)
    given, copied = (ops.linear(*arguments(layer, x, bias=bias)) for bias in (strided, strided.contiguous()))
    assert torch.equal(given, copied)
    without = ops.linear(*arguments(layer, x, bias=None))
    assert torch.allclose(given - without, strided.float().expand(3, N), atol=1e-5)


def test_a_weight_at_an_odd_address_gives_the_same_result():
    layer = make("w4a16g32")
    if layer.layout == "plain":
        pytest.skip("the plain layout is read by torch, which wants its tensors aligned")
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), layer.packed])[1:]
    assert moved.data_ptr() % 2 == 1
    x = torch.randn(5, K)
    assert torch.equal(ops.linear(*arguments(layer, x, packed=moved)), layer(x))


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_small_shapes(scheme, shape):
    n, k = shape
    layer = make(scheme, n=n, k=k)
    x = torch.randn(4, k)
    expected = x.double() @ layer.dequantized_weight().double().t() + layer.bias.double()
    # Dynamic activations are off by half a step of amax / 127 an input.
    step = x.abs().amax() / 127 * layer.dequantized_weight().abs().sum(1).max() if layer.scheme.act_bits == 8 else 0
    assert (layer(x).double() - expected).abs().max() <= step * 0.51 + 1e-5
