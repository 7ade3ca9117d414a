"""Weights whose scales and minimums have two levels, as GGUF's Q4_K has them (w4k): rounding, kernels, layers, files."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
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
from nybble.foreign.choose import choose
from nybble.foreign.fit import fit
from nybble.nn import Embedding, Linear
from nybble.testing.oracle import SHAPES, expected_output, random_weight, run, served_by
from nybble.weights.activations import ActScale
from nybble.weights.levels import Levels
from nybble.weights.rounding import Ranges, check_portable, dequantize_weight, join_codes, quantize_weight
from nybble.weights.scheme import Scheme

SPECS = [spec for spec in specs() if spec.scheme in ("w4ka8", "w4ka16") and spec.device != "cuda"]
CASES = [pytest.param(spec, scheme, id=f"{spec.name}-{scheme}") for spec in SPECS for scheme in served_by(spec)]
NAMES = ("w4ka8g32", "w4ka16g32", "w4ka16g32order", "w4ka8g32static")
DATA = Path(__file__).parent / "data" / "foreign"


def usable(spec, scheme: Scheme) -> None:
    problem = Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout)
    if (reason := spec.why_not(problem)) is not None:
        pytest.skip(f"{spec.name}: {reason}")


def test_the_weight_is_what_the_formula_says() -> None:
    scheme = Scheme.parse("w4ka16g32")
    quantized = random_weight(scheme, 5, 600)
    codes = scheme.weight_type.unpack(quantized.qweight, 600)
    weight = dequantize_weight(quantized, scheme, 600)
    for n, k in ((0, 0), (1, 31), (2, 255), (3, 256), (4, 599), (2, 544)):
        first, second = (int(quantized.levels[n, k // 32 * 2 + i]) for i in range(2))
        d, dmin = (part[n, k // 256].float() for part in (quantized.scale, quantized.minimum))
        assert weight[n, k] == d * first * int(codes[n, k]) - dmin * second


def test_rounding_is_close_and_settles() -> None:
    scheme = Scheme.parse("w4ka16g32")
    weight = torch.randn(17, 600) * torch.exp2(torch.randint(-12, 3, (17, 1)).float())
    weight[3, :64] = 0
    weight[4] = 0
    weight[5, :32] = 0.25
    quantized = quantize_weight(weight, scheme)
    check_portable(quantized, scheme, 17, 600)
    restored = dequantize_weight(quantized, scheme, 600)
    assert not restored[3, :64].any()
    assert not restored[4].any()
    of_groups = dequantize_weight(
        quantize_weight(weight, Scheme.parse("w4a16g32asym")), Scheme.parse("w4a16g32asym"), 600
    )
    for row in (0, 1, 2, 6, 16):
        error, other = ((found[row] - weight[row]).norm() for found in (restored, of_groups))
        assert error < 1.1 * other
    assert (restored[5, :32] - 0.25).abs().max() < 0.01
    ranges = Ranges.of(quantized, scheme)
    again = join_codes(scheme.weight_type.unpack(quantized.qweight, 600), ranges, scheme)
    assert all(torch.equal(again.tensors()[name], part) for name, part in quantized.tensors().items())
    mse = dequantize_weight(quantize_weight(weight, scheme, "mse"), scheme, 600)
    assert (mse - weight).norm() < (restored - weight).norm()


def test_levels_are_the_nearest() -> None:
    scale, zero = torch.rand(4, 11) + 0.01, torch.rand(4, 11) * 9
    found = Levels.nearest(scale, zero)
    products = found.products
    for got, wanted in ((products[0], scale), (-products[1], scale * zero)):
        for block in (slice(0, 8), slice(8, 11)):
            unit = wanted[:, block].amax(1, keepdim=True) / 63
            assert ((got[:, block] - wanted[:, block]).abs() <= 0.51 * unit + 2e-3 * wanted[:, block]).all()
    # Minimums are what codes of 0 stand for, whatever the scale.
    flat = replace_first(found, 0)
    assert (flat.products[0] == 0).all()
    assert (flat.zeros == 0).all()


def replace_first(levels: Levels, value: int) -> Levels:
    changed = levels.levels.clone()
    changed[:, ::2] = value
    return levels._replace(levels=changed)


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_agrees_with_the_oracle(spec, scheme: Scheme) -> None:
    usable(spec, scheme)
    for i, (m, n, k) in enumerate([*SHAPES.values(), (33, 50, 1056)]):
        m = max(m, spec.m_range[0])
        quantized, bias = random_weight(scheme, n, k, i), torch.randn(n)
        x = torch.randn(m, k).to(spec.act_dtypes[i % len(spec.act_dtypes)])
        expected, bound = expected_output(spec, scheme, x, quantized, bias)
        assert ((run(spec, quantized, scheme, x, bias).double() - expected).abs() <= bound).all(), (m, n, k)


def test_integer_kernels_give_the_same_bits_on_every_target() -> None:
    scheme = Scheme.parse("w4ka8g32")
    quantized, bias = random_weight(scheme, 77, 1000), torch.randn(77)
    exact = [
        spec for spec in SPECS if spec.exact and spec.why_not(Problem(scheme, 70, 77, 1000, layout=spec.layout)) is None
    ]
    assert len(exact) > 1
    x = torch.randn(70, 1000)
    first, *others = [run(spec, quantized, scheme, x, bias) for spec in exact]
    for spec, other in zip(exact[1:], others, strict=True):
        assert torch.equal(first, other), spec.name


def test_packing() -> None:
    for name in NAMES[:3]:
        scheme = Scheme.parse(name)
        for n, k in ((33, 200), (16, 256), (40, 1000)):
            quantized = random_weight(scheme, n, k)
            packed = layouts.pack(quantized, "n16k8", scheme, k)
            assert torch.equal(packed, native.pack(quantized, scheme, k, "n16k8"))
            for weight in (
                layouts.unpack(packed, "n16k8", scheme, n, k),
                native.unpack(packed, scheme, n, k, "n16k8"),
            ):
                assert all(torch.equal(weight.tensors()[key], part) for key, part in quantized.tensors().items())
    scheme = Scheme.parse("w4ka8g32")
    bits = native.pack(random_weight(scheme, 512, 4096), scheme, 4096, "n16k8").nbytes * 8 / (512 * 4096)
    assert bits < 4.64


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_tensors_say(name: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    scheme, x = Scheme.parse(name), torch.randn(5, 330)
    quantized, bias = random_weight(scheme, 24, 330), nn.Parameter(torch.randn(24))
    act = ActScale(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int8)) if scheme.static else None
    layer = Linear.from_quantized(quantized, 330, bias, scheme, torch.float32, act)
    expected = reference.linear(x, quantized, layer.bias, scheme, torch.float64, act)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    for key in ("scale", "minimum", "levels"):
        assert torch.equal(getattr(layer, key), getattr(quantized, key))
    again = Linear(330, 24, scheme=name)
    again.load_state_dict(layer.state_dict())
    nybble.save(nn.Sequential(layer), tmp_path)
    loaded = nn.Sequential(nn.Linear(330, 24))
    nybble.load(loaded, tmp_path)
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded[0]):  # noqa: S301 its own bytes
        assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.dequantize().weight, dequantize_weight(quantized, scheme, 330))
    layer.unpack()
    layer.to(torch.bfloat16)
    assert (layer.scale.dtype, layer.minimum.dtype) == (torch.float16, torch.float16)


def test_damaged_levels_are_refused_by_name() -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4ka8g32")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"levels: must be in \[0, 63\]"):
        layer.load_state_dict({**state, "levels": state["levels"].index_fill(1, torch.tensor([1]), 64)})
    with pytest.raises(RuntimeError, match=r"levels: \(8, 3\)"):
        layer.load_state_dict({**state, "levels": state["levels"][:, :3]})
    with pytest.raises(RuntimeError, match="scale: must be finite"):
        layer.load_state_dict({**state, "scale": state["scale"] * torch.inf})


def test_q4_k_is_held_as_it_is() -> None:
    (opened,) = open_foreign(DATA / "gguf-q4-k-m")[1].layers.values()
    weight = opened.read()
    for act_bits in (16, 8):
        chosen = choose(weight, act_bits)
        assert (str(chosen.scheme), chosen.why) == (f"w4ka{act_bits}g32", None)
        restored = dequantize_weight(chosen.quantized, chosen.scheme, weight.shape[1])
        assert torch.equal(restored, weight.dequantize())
        assert chosen.quantized.nbytes == weight.shape[0] * weight.shape[1] * 9.25 / 16
    order = torch.randperm(weight.shape[0])
    moved = fit(weight.rows(order))
    assert moved.quantized is not None
    assert torch.equal(dequantize_weight(moved.quantized, moved.scheme, weight.shape[1]), weight.dequantize()[order])
    # What is no Q4_K is held as before.
    assert str(fit(replace(weight, levels=None)).scheme) == "w4a16g32asym"


def test_rows_of_an_embedding() -> None:
    dense = nn.Embedding(40, 320)
    table = Embedding.from_dense(dense, "w4ka16g32")
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
        nybble.quantize(made, "w4ka8g32", goal="memory", method=method, calibration=[x])
        assert isinstance(made[0], Linear)
        errors.append(float((made(x) - right).norm() / right.norm()))
    assert errors[0] < 0.15
    assert errors[1] < 0.15


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4ka8", r"group_size=None: must be one of \(32,\) with w4k"),
        ("w4ka8g64", r"group_size=64: must be one of \(32,\) with w4k"),
        ("w4ka16g32asym", "w4k must be symmetric"),
        ("w8ka16", r"book='k': must be '' with w8"),
        ("sp50w4ka8g32", "sparsity=sp50: must be None"),
    ],
)
def test_what_there_is_not(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme.parse(name)
    with pytest.raises(ValueError, match="HQQ moves a zero point"):
        quantize_weight(torch.randn(4, 64), Scheme.parse("w4ka16g32"), "hqq")
