"""The ops of rows as torch sees them: opcheck, fakes, gradients, what they refuse, and their values through the ops."""

import pytest
import torch
import torch.nn.functional as F

from nybble import rows
from nybble.testing.chains import layer

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
K = 70


def arguments(x, schemes=("w8a8", "w4a8g32"), **changed):
    """Of nybble::linears."""
    layers = [layer(scheme, 33 + i, K, seed=i) for i, scheme in enumerate(schemes)]
    named = {
        "x": x,
        "packed": [one.packed for one in layers],
        "bias": [one.bias.detach() for one in layers],
        "scheme": [str(one.scheme) for one in layers],
        "layout": [one.layout for one in layers],
        "out_features": [one.out_features for one in layers],
        "act": [],
        "other": [],
        "residual": [],
        "norm": "none",
        "norm_weight": None,
        "norm_bias": None,
        "eps": 1e-5,
    }
    return layers, tuple({**named, **changed}.values())


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, K), (K,), (2, 1, 3, K), (0, K)], ids=str)
def test_opcheck(shape, dtype):
    x, vector = torch.randn(shape, dtype=dtype), torch.randn(K)
    calls = [
        (torch.ops.nybble.norm.default, (x, None, vector, vector, "layer", 1e-5, 0.0)),
        (torch.ops.nybble.norm.default, (x, x + 1, vector.to(dtype), None, "rms", 1e-5, 1.0)),
        (torch.ops.nybble.activate.default, (x, x + 1, "silu")),
        (torch.ops.nybble.linears.default, arguments(x, norm="rms", norm_weight=vector)[1]),
    ]
    for op, given in calls:
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


def test_norm_gives_the_norm_and_the_sum():
    x, more, weight, bias = torch.randn(2, 5, K), torch.randn(2, 5, K), torch.randn(K), torch.randn(K)
    y, total = rows.norm(x.transpose(0, 1), more.transpose(0, 1), weight, bias)
    assert torch.equal(total, (x + more).transpose(0, 1))
    torch.testing.assert_close(y, F.layer_norm(total, (K,), weight, bias))
    y, total = rows.norm(x, kind="rms", weight=weight, weight_offset=1.0)
    torch.testing.assert_close(y, F.rms_norm(x, (K,), weight + 1, 1e-5))
    assert total.shape == (0,)


def test_activate():
    x, other = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(rows.activate(x, other, "gelu"), F.gelu(x) * other)
    torch.testing.assert_close(rows.activate(x.t(), act="tanh"), x.t().tanh())


def test_linears():
    x = torch.randn(3, 4, K)
    layers, given = arguments(x)
    for one, y in zip(layers, rows.linears(*given), strict=True):
        assert torch.equal(y, one(x))
    other, residual = [torch.randn(3, 4, 33), None], [None, torch.randn(3, 4, 34)]
    first, second = rows.linears(*arguments(x, act=["silu", ""], other=other, residual=residual)[1])
    torch.testing.assert_close(first, F.silu(layers[0](x)) * other[0])
    torch.testing.assert_close(second, layers[1](x) + residual[1])


def test_compiled():
    x, vector = torch.randn(5, K), torch.randn(K)
    _, given = arguments(x, norm="layer", norm_weight=vector)

    def run(x):
        return rows.linears(x, *given[1:])[0].relu()

    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


def test_gradients_are_refused():
    x = torch.randn(2, K, requires_grad=True)
    for y in (rows.norm(x)[0], rows.activate(x, act="gelu"), rows.linears(*arguments(x)[1])[0]):
        with pytest.raises(NotImplementedError, match="have no gradients: run them"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rows.norm(x.double()), "x: torch.float64 on cpu, must be one of"),
        (lambda x: rows.norm(x, x[:1]), r"residual: \(1, 70\) torch.float32, must be \(2, 70\)"),
        (lambda x: rows.norm(x, weight=torch.ones(3)), r"weight: \(3,\) torch.float32 on cpu, must be \(70,\)"),
        (lambda x: rows.norm(x, kind="batch"), 'kind="batch": must be one of'),
        (lambda x: rows.activate(x, act="selu"), 'act="selu": must be one of'),
        (lambda x: rows.activate(x, x.half()), "other: .* torch.float16, must be"),
        (lambda x: rows.linears(*arguments(x, bias=[None])[1]), "bias: has 1 items, must have one for each of 2"),
        (
            lambda x: rows.linears(*arguments(x, packed=[torch.zeros(8, dtype=torch.uint8)] * 2)[1]),
            "packed: has 8 bytes",
        ),
        (lambda x: rows.linears(*arguments(x, other=[x, None])[1]), r"other\[0\]: .* must be \(2, 33\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, K))
