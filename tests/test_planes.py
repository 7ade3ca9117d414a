"""Weights of 3 bits, which lie in memory as planes of bits (w3): layout, kernels, layers, and what other libraries wrote."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import nybble
from nybble import layouts, native
from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import Problem
from nybble.foreign import open_foreign
from nybble.foreign.fit import fit
from nybble.nn import Embedding, Linear
from nybble.testing.oracle import SHAPES, expected_output, random_weight, run, served_by
from nybble.weights.form import Form
from nybble.weights.rounding import check_portable, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

SPECS = [spec for spec in specs() if spec.scheme in ("w3a8", "w3a16") and spec.device != "cuda"]
CASES = [pytest.param(spec, scheme, id=f"{spec.name}-{scheme}") for spec in SPECS for scheme in served_by(spec)]
NAMES = ("w3a16g32", "w3a8g64asym", "w3a16g128order", "w3a8g128")
FORMS = (Form(), Form(torch.float16), Form(torch.float32, minimum=True))
DATA = Path(__file__).parent / "data" / "foreign"


def usable(spec, scheme: Scheme) -> None:
    problem = Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout)
    if (reason := spec.why_not(problem)) is not None:
        pytest.skip(f"{spec.name}: {reason}")


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_agrees_with_the_oracle(spec, scheme: Scheme) -> None:
    usable(spec, scheme)
    for i, (m, n, k) in enumerate([*SHAPES.values(), (33, 50, 1056)]):
        m = max(m, spec.m_range[0])
        form = FORMS[i % 3] if spec.minimum and not scheme.symmetric else FORMS[i % 2]
        quantized, bias = random_weight(scheme, n, k, i, form=form), torch.randn(n)
        x = torch.randn(m, k).to(spec.act_dtypes[i % len(spec.act_dtypes)])
        expected, bound = expected_output(spec, scheme, x, quantized, bias)
        assert ((run(spec, quantized, scheme, x, bias).double() - expected).abs() <= bound).all(), (m, n, k, form)


def test_integer_kernels_give_the_same_bits_on_every_target() -> None:
    for name in ("w3a8g32", "w3a8g128asym"):
        scheme = Scheme.parse(name)
        quantized, bias = random_weight(scheme, 77, 1000), torch.randn(77)
        problem = Problem(scheme, 20, 77, 1000)
        exact = [spec for spec in SPECS if spec.exact and spec.why_not(problem) is None]
        assert len(exact) > 1
        x = torch.randn(20, 1000)
        first, *others = [run(spec, quantized, scheme, x, bias) for spec in exact]
        for spec, other in zip(exact[1:], others, strict=True):
            assert torch.equal(first, other), spec.name


def test_a_line_of_planes_is_what_pack_h_says() -> None:
    scheme = Scheme.parse("w3a16g32")
    quantized = random_weight(scheme, 16, 64)
    codes = scheme.weight_type.unpack(quantized.qweight, 64)
    planes = layouts.views(layouts.pack(quantized, "n16k32", scheme, 64), "n16k32", scheme, 16, 64)["codes"]
    assert planes.shape == (1, 2, 3, 16, 4)
    for n, k in ((0, 0), (3, 13), (7, 31), (15, 32), (9, 50), (4, 60), (11, 7)):
        line, place = k % 32 // 8, k % 8
        byte, half = place % 4, place // 4 * 4
        low = int(planes[0, k // 32, line // 2, n, byte]) >> half + line % 2 * 2 & 3
        high = int(planes[0, k // 32, 2, n, byte]) >> half + line & 1
        assert low + 4 * high == int(codes[n, k])


def test_packing() -> None:
    for name in NAMES:
        scheme = Scheme.parse(name)
        for n, k in ((33, 200), (16, 256), (40, 999)):
            quantized = random_weight(scheme, n, k)
            packed = layouts.pack(quantized, "n16k32", scheme, k)
            assert torch.equal(packed, native.pack(quantized, scheme, k, "n16k32"))
            for weight in (
                layouts.unpack(packed, "n16k32", scheme, n, k),
                native.unpack(packed, scheme, n, k, "n16k32"),
            ):
                assert all(torch.equal(weight.tensors()[key], part) for key, part in quantized.tensors().items())
    scheme = Scheme.parse("w3a8g128")
    assert native.pack(random_weight(scheme, 512, 4096), scheme, 4096, "n16k32").nbytes * 8 / (512 * 4096) < 3.14


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_tensors_say(name: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    scheme, x = Scheme.parse(name), torch.randn(5, 130)
    quantized, bias = random_weight(scheme, 24, 130), nn.Parameter(torch.randn(24))
    layer = Linear.from_quantized(quantized, 130, bias, scheme, torch.float32)
    expected = reference.linear(x, quantized, layer.bias, scheme, torch.float64)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    again = Linear(130, 24, scheme=name)
    again.load_state_dict(layer.state_dict())
    nybble.save(nn.Sequential(layer), tmp_path)
    loaded = nn.Sequential(nn.Linear(130, 24))
    nybble.load(loaded, tmp_path)
    for other in (again, loaded[0]):
        assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.dequantize().weight, dequantize_weight(quantized, scheme, 130))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("gptq-w3-g32", "w3a16g32"), ("ct-w3a16-g32", "w3a16g32")],
)
def test_files_of_3_bits_are_held_as_they_are(name: str, scheme: str) -> None:
    (opened,) = open_foreign(DATA / name)[1].layers.values()
    weight = opened.read()
    found = fit(weight)
    assert (str(found.scheme), found.why) == (scheme, None)
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, weight.shape[1]), weight.dequantize())


def test_zero_points_beyond_3_bits_are_held_by_4_bits() -> None:
    (opened,) = open_foreign(DATA / "gptq-w3-g32")[1].layers.values()
    weight = opened.read()
    zero = torch.full(weight.scale.shape, 8, dtype=torch.int16)
    found = fit(weight.__class__(weight.codes, 3, weight.scale, zero, weight.group_size))
    assert str(found.scheme) == "w4a16g32asym"


def test_rounding_and_rows_of_an_embedding() -> None:
    weight = torch.randn(40, 320)
    errors = {}
    for name in ("w3a16g32", "w3a16g32asym", "w4a16g32asym"):
        scheme = Scheme.parse(name)
        quantized = quantize_weight(weight, scheme)
        check_portable(quantized, scheme, 40, 320)
        errors[name] = float((dequantize_weight(quantized, scheme, 320) - weight).norm() / weight.norm())
    assert errors["w4a16g32asym"] < errors["w3a16g32asym"] < errors["w3a16g32"] < 0.25
    table = Embedding.from_dense(nn.Embedding(40, 320, _weight=weight), "w3a16g32")
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(table(ids), table.dequantized_weight()[ids])


def test_a_model_and_gptq() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    x = torch.randn(256, 64)
    right, errors = model(x).detach(), []
    for method in ("rtn", "gptq"):
        made = copy.deepcopy(model)
        nybble.quantize(made, "w3a8g32asym", goal="memory", method=method, calibration=[x])
        assert isinstance(made[0], Linear)
        errors.append(float((made(x) - right).norm() / right.norm()))
    assert errors[1] < errors[0] < 0.3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w3a8", r"group_size=None: must be one of \(32, 64, 128\) with w3"),
        ("w3a16g16", r"group_size=16: must be one of \(32, 64, 128\) with w3"),
        ("sp50w3a8g32", "sparsity=sp50: must be None"),
    ],
)
def test_what_there_is_not(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme.parse(name)
