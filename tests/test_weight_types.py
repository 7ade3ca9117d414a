"""Weights of few bits whose values are no plain steps (w4nf, w4k, w3): kernels, packing, layers, passes, what there is not.

What is special to one of them stands in test_book (w4nf), test_levels (w4k) and test_planes (w3)."""

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
from nybble.dispatch.spec import Problem
from nybble.nn import Embedding, Linear
from nybble.testing.oracle import SHAPES, expected_output, random_weight, run, served_by
from nybble.weights.activations import ActScale
from nybble.weights.form import Form
from nybble.weights.rounding import dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

# Weight type -> the layout of its tiles, bits per weight as packed of a large matrix (at most), and schemes.
TYPES = {
    "w4nf": ("n16k8", 4.16, ("w4nfa16", "w4nfa16g32", "w4nfa16g64", "w4nfa16g128order")),
    "w4k": ("n16k8", 4.64, ("w4ka8g32", "w4ka16g32", "w4ka16g32order", "w4ka8g32static")),
    "w3": ("n16k32", 3.14, ("w3a8g128", "w3a16g32", "w3a8g64asym", "w3a16g128order")),
}
NAMES = [pytest.param(layout, name, id=name) for layout, _, names in TYPES.values() for name in names]
FORMS = (Form(), Form(torch.float16), Form(torch.float32, minimum=True))
SPECS = [spec for spec in specs() if spec.scheme and spec.scheme.startswith(tuple(TYPES)) and spec.device != "cuda"]
CASES = [pytest.param(spec, scheme, id=f"{spec.name}-{scheme}") for spec in SPECS for scheme in served_by(spec)]
HIDDEN = ("scale", "minimum", "levels", "book", "zero_point", "order")


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_agrees_with_the_oracle(spec, scheme: Scheme) -> None:
    problem = Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout)
    if (reason := spec.why_not(problem)) is not None:
        pytest.skip(f"{spec.name}: {reason}")
    forms = FORMS[: 3 if spec.minimum and not scheme.symmetric else 2] if spec.scheme.startswith("w3") else FORMS[:1]
    for i, (m, n, k) in enumerate([*SHAPES.values(), (33, 50, 1056)]):
        m, form = max(m, spec.m_range[0]), forms[i % len(forms)]
        quantized, bias = random_weight(scheme, n, k, i, form=form), torch.randn(n)
        x = torch.randn(m, k).to(spec.act_dtypes[i % len(spec.act_dtypes)])
        expected, bound = expected_output(spec, scheme, x, quantized, bias)
        assert ((run(spec, quantized, scheme, x, bias).double() - expected).abs() <= bound).all(), (m, n, k, form)


@pytest.mark.parametrize("name", ["w4ka8g32", "w3a8g32", "w3a8g128asym"])
def test_integer_kernels_give_the_same_bits_on_every_target(name: str) -> None:
    scheme = Scheme.parse(name)
    quantized, bias, x = random_weight(scheme, 77, 1000), torch.randn(77), torch.randn(70, 1000)
    exact = [s for s in SPECS if s.exact and s.why_not(Problem(scheme, 70, 77, 1000, layout=s.layout)) is None]
    assert len(exact) > 1
    first, *others = [run(spec, quantized, scheme, x, bias) for spec in exact]
    for spec, other in zip(exact[1:], others, strict=True):
        assert torch.equal(first, other), spec.name


@pytest.mark.parametrize(("layout", "name"), NAMES)
def test_packing(layout: str, name: str) -> None:
    scheme = Scheme.parse(name)
    for n, k in ((33, 200), (16, 256), (40, 999)):
        quantized = random_weight(scheme, n, k)
        packed = layouts.pack(quantized, layout, scheme, k)
        assert torch.equal(packed, native.pack(quantized, scheme, k, layout))
        for weight in (layouts.unpack(packed, layout, scheme, n, k), native.unpack(packed, scheme, n, k, layout)):
            assert all(torch.equal(weight.tensors()[key], part) for key, part in quantized.tensors().items())


@pytest.mark.parametrize("of_type", TYPES)
def test_bits_of_a_packed_weight(of_type: str) -> None:
    layout, bits, names = TYPES[of_type]
    scheme = Scheme.parse(names[0])
    assert native.pack(random_weight(scheme, 512, 4096), scheme, 4096, layout).nbytes * 8 / (512 * 4096) < bits


@pytest.mark.parametrize(("layout", "name"), NAMES)
def test_a_layer_is_what_its_tensors_say(layout: str, name: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    scheme, k = Scheme.parse(name), 330
    x, quantized, bias = torch.randn(5, k), random_weight(scheme, 24, k), nn.Parameter(torch.randn(24))
    act = ActScale(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int8)) if scheme.static else None
    layer = Linear.from_quantized(quantized, k, bias, scheme, torch.float32, act)
    expected = reference.linear(x, quantized, layer.bias, scheme, torch.float64, act)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    again = Linear(k, 24, scheme=name)
    again.load_state_dict(layer.state_dict())
    nybble.save(nn.Sequential(layer), tmp_path)
    loaded = nn.Sequential(nn.Linear(k, 24))
    nybble.load(loaded, tmp_path)
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded[0]):  # noqa: S301 its own bytes
        assert torch.equal(other(x), layer(x))
        for key, part in quantized.tensors().items():
            if key in HIDDEN:
                assert torch.equal(getattr(other, key), part), key
    assert torch.equal(layer.dequantize().weight, dequantize_weight(quantized, scheme, k))
    torch.compiler.reset()  # it compiles a function for so many modules, no more
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(("name", "most"), [("w4nfa16g32", 0.12), ("w4ka16g32", 0.12), ("w3a16g32", 0.25)])
def test_rows_of_an_embedding(name: str, most: float) -> None:
    dense = nn.Embedding(40, 320)
    table = Embedding.from_dense(dense, name)
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(table(ids), table.dequantized_weight()[ids])
    assert (table(ids) - dense(ids)).norm() < most * dense(ids).norm()


# Rounding of levels is as good as GPTQ on a model as small as this one.
@pytest.mark.parametrize(
    ("name", "most", "better"), [("w4nfa16g32", 0.15, 1), ("w4ka8g32", 0.15, 1.5), ("w3a8g32asym", 0.3, 1)]
)
def test_a_model_and_gptq(name: str, most: float, better: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    x = torch.randn(256, 64)
    right, errors = model(x).detach(), []
    for method in ("rtn", "gptq"):
        made = copy.deepcopy(model)
        nybble.quantize(made, name, goal="memory", method=method, calibration=[x])
        assert isinstance(made[0], Linear)
        errors.append(float((made(x).detach() - right).norm() / right.norm()))
    assert errors[1] < better * errors[0] < better * most


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4nfa8g64", "act_bits=8: must be 16 with w4nf"),
        ("w4nfa16g64asym", "w4nf must be symmetric"),
        ("w8nfa16", r"book='nf': must be '' with w8"),
        ("sp50w4nfa16g64", "sparsity=sp50: must be None"),
        ("w4ka8", r"group_size=None: must be one of \(32,\) with w4k"),
        ("w4ka8g64", r"group_size=64: must be one of \(32,\) with w4k"),
        ("w4ka16g32asym", "w4k must be symmetric"),
        ("w8ka16", r"book='k': must be '' with w8"),
        ("sp50w4ka8g32", "sparsity=sp50: must be None"),
        ("w3a8", r"group_size=None: must be one of \(32, 64, 128\) with w3"),
        ("w3a16g16", r"group_size=16: must be one of \(32, 64, 128\) with w3"),
        ("sp50w3a8g32", "sparsity=sp50: must be None"),
    ],
)
def test_what_there_is_not(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme.parse(name)


@pytest.mark.parametrize("name", ["w4nfa16g64", "w4ka16g32"])
def test_hqq_has_no_zero_point_to_move(name: str) -> None:
    with pytest.raises(ValueError, match="HQQ moves a zero point"):
        quantize_weight(torch.randn(4, 64), Scheme.parse(name), "hqq")
