"""Weights whose codes index a table (NF4 and its kin): rounding, kernels, layers, and what other libraries wrote."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import nybble
from nybble import layouts, native
from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS, Problem
from nybble.nn import Linear
from nybble.testing.oracle import SHAPES, expected_output, random_weight, run, served_by
from nybble.weights.rounding import book_of, check_portable, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme
from nybble.weights.weight_type import weight_types

NF = weight_types()["w4nf"]
SPECS = [spec for spec in specs() if spec.scheme == "w4nfa16" and spec.device != "cuda"]
CASES = [pytest.param(spec, scheme, id=f"{spec.name}-{scheme}") for spec in SPECS for scheme in served_by(spec)]
NAMES = ("w4nfa16", "w4nfa16g32", "w4nfa16g64", "w4nfa16g128order")


def usable(spec, scheme: Scheme) -> None:
    problem = Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout)
    if (reason := spec.why_not(problem)) is not None:
        pytest.skip(f"{spec.name}: {reason}")


def test_the_table_is_that_of_nf4() -> None:
    # Each half has quantiles of the normal distribution at equal distances, scaled to 1.
    last = 0.9677083
    ends = torch.cat((torch.linspace(last, 0.5, 9)[:-1], torch.linspace(last, 0.5, 8)[:-1])).double()
    found = torch.special.ndtri(ends)
    table = torch.cat((-found[8:], torch.zeros(1), found[:8])).sort().values / found.max()
    assert torch.allclose(torch.tensor(NF.table).double(), table, atol=2e-6)
    assert NF.table[NF.middle] == 0.0


def test_rounding_takes_the_nearest_value() -> None:
    scheme = Scheme.parse("w4nfa16g32")
    weight = torch.randn(17, 200)
    weight[3, :64] = 0
    quantized = quantize_weight(weight, scheme)
    check_portable(quantized, scheme, 17, 200)
    assert torch.equal(quantized.book, book_of(scheme))
    table = torch.tensor(NF.table)
    for group in range(7):
        part = weight[:, group * 32 : group * 32 + 32]
        assert torch.equal(quantized.scale[:, group], part.abs().amax(-1).to(quantized.scale.dtype))
        units = part / quantized.scale[:, group, None].float().clamp(min=1e-30)
        best = (units[..., None] - table).abs().amin(-1)
        codes = NF.unpack(quantized.qweight, 200)[:, group * 32 : group * 32 + 32]
        assert torch.allclose((units - table[codes.long()]).abs(), best, atol=1e-6)
    assert not dequantize_weight(quantized, scheme, 200)[3, :64].any()
    errors = [
        (dequantize_weight(quantize_weight(weight, parsed, method), parsed, 200) - weight).norm()
        for parsed, method in ((scheme, "rtn"), (scheme, "mse"), (Scheme.parse("w4a16g32"), "rtn"))
    ]
    assert errors[1] <= errors[0] < errors[2]


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_agrees_with_the_oracle(spec, scheme: Scheme) -> None:
    usable(spec, scheme)
    for i, (m, n, k) in enumerate(SHAPES.values()):
        m, quantized, bias = max(m, spec.m_range[0]), random_weight(scheme, n, k, i), torch.randn(n)
        x = torch.randn(m, k).to(spec.act_dtypes[i % len(spec.act_dtypes)])
        expected, bound = expected_output(spec, scheme, x, quantized, bias)
        assert ((run(spec, quantized, scheme, x, bias).double() - expected).abs() <= bound).all(), (m, n, k)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_that_bfloat16_has_not_are_at_most_rounded_to_it(spec) -> None:
    scheme = Scheme.parse("w4nfa16g64")
    usable(spec, scheme)
    weight, x = torch.randn(40, 512), torch.randn(9, 512).to(spec.act_dtypes[0])
    quantized = quantize_weight(weight, scheme)
    right = reference.linear(x, quantized, None, scheme, torch.float64)
    size = x.double().abs() @ dequantize_weight(quantized, scheme, 512).double().abs().t()
    share = 2.0**-9 if spec.act_dtypes == (torch.bfloat16,) else 2.0**-20
    rounding = right.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23)
    assert ((run(spec, quantized, scheme, x).double() - right).abs() <= size * share + rounding).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_same_bits_for_any_number_of_threads(spec) -> None:
    scheme, before = Scheme.parse("w4nfa16g64"), torch.get_num_threads()
    usable(spec, scheme)
    quantized, bias = random_weight(scheme, 333, 520), torch.randn(333)
    for m in (1, 7, 70):
        x, found = torch.randn(m, 520).to(spec.act_dtypes[0]), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(spec, quantized, scheme, x, bias))
        torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_packing() -> None:
    for name in NAMES:
        scheme = Scheme.parse(name)
        quantized = random_weight(scheme, 33, 200)
        packed = layouts.pack(quantized, "n16k8", scheme, 200)
        assert torch.equal(packed, native.pack(quantized, scheme, 200, "n16k8"))
        for weight in (
            layouts.unpack(packed, "n16k8", scheme, 33, 200),
            native.unpack(packed, scheme, 33, 200, "n16k8"),
        ):
            assert all(torch.equal(weight.tensors()[key], part) for key, part in quantized.tensors().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_tensors_say(name: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    scheme, x = Scheme.parse(name), torch.randn(5, 130)
    quantized, bias = random_weight(scheme, 24, 130), nn.Parameter(torch.randn(24))
    layer = Linear.from_quantized(quantized, 130, bias, scheme, torch.float32)
    expected = reference.linear(x, quantized, layer.bias, scheme, torch.float64)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(layer.book, quantized.book)
    again = Linear(130, 24, scheme=name)
    again.load_state_dict(layer.state_dict())
    nybble.save(nn.Sequential(layer), tmp_path)
    loaded = nn.Sequential(nn.Linear(130, 24))
    nybble.load(loaded, tmp_path)
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded[0]):  # noqa: S301 its own bytes
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.book, quantized.book)
    assert torch.equal(layer.dequantize().weight, dequantize_weight(quantized, scheme, 130))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_dtypes_leave_the_table() -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4nfa16g32")
    book = layer.book.clone()
    for dtype in FLOATS:
        layer.unpack()
        layer.to(dtype)
        assert torch.equal(layer.book, book)
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert Linear(64, 8, scheme="w4nfa16g32", device="meta").book.is_meta


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -(2.0**21)])
def test_damaged_tables_are_refused_by_name(value: float) -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4nfa16g32")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="book: must be finite, and at most"):
        layer.load_state_dict({**state, "book": state["book"].index_fill(0, torch.tensor([2]), value)})
    with pytest.raises(RuntimeError, match=r"book: \(15,\)"):
        layer.load_state_dict({**state, "book": state["book"][1:]})


def test_rows_of_an_embedding() -> None:
    dense = nn.Embedding(40, 96)
    table = nybble.nn.Embedding.from_dense(dense, "w4nfa16g32")
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(table(ids), table.dequantized_weight()[ids])
    assert (table(ids) - dense(ids)).norm() < 0.12 * dense(ids).norm()


def test_a_model_and_gptq() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    x = torch.randn(256, 64)
    right, errors = model(x).detach(), []
    for method in ("rtn", "gptq"):
        made = copy.deepcopy(model)
        nybble.quantize(made, "w4nfa16g32", goal="memory", method=method, calibration=[x])
        assert isinstance(made[0], Linear)
        errors.append(float((made(x) - right).norm() / right.norm()))
    assert errors[1] < errors[0] < 0.15


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4nfa8g64", "act_bits=8: must be 16 with w4nf"),
        ("w4nfa16g64asym", "w4nf must be symmetric"),
        ("w8nfa16", r"book='nf': must be '' with w8"),
        ("sp50w4nfa16g64", "sparsity=sp50: must be None"),
    ],
)
def test_what_there_is_not(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme.parse(name)
    with pytest.raises(ValueError, match="HQQ moves a zero point"):
        quantize_weight(torch.randn(4, 64), Scheme.parse("w4nfa16g64"), "hqq")
