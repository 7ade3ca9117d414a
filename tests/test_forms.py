"""Weights whose scales are of another dtype than the usual one, or that have float minimums, as other libraries write them: every kernel,
layout and module."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble import layouts, native, ops
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import KernelSpec, Problem
from nybble.foreign import ForeignWeight
from nybble.foreign.fit import fit
from nybble.native.weights import GROUPED
from nybble.testing.checks import Subject, activations, seed_of
from nybble.testing.oracle import SHAPES, random_weight, run, schemes_of, served_by
from nybble.weights.form import USUAL, Form, split_layout
from nybble.weights.rounding import QuantizedWeight, dequantize_weight
from nybble.weights.scheme import Scheme

FORMS = [Form(torch.float16), Form(torch.float32)]
MINIMUMS = [Form(scale, minimum=True) for scale in (None, torch.float16, torch.float32)]
EIGHT = [Form(torch.bfloat16), Form(torch.float16)]  # of 8 bits, whose usual scales are float32
EIGHT_MINIMUMS = [Form(scale, minimum=True) for scale in (None, torch.bfloat16, torch.float16)]
BY_FORM = pytest.mark.parametrize("form", FORMS, ids=str)


def forms_of(scheme: Scheme) -> list[Form]:
    """Other forms than the usual one."""
    forms, minimums = (EIGHT, EIGHT_MINIMUMS) if scheme.weight_bits == 8 else (FORMS, MINIMUMS)
    return forms if scheme.symmetric else forms + minimums


CASES = [
    pytest.param(spec, scheme, form, id=f"{spec.name}-{scheme}-{form}")
    for spec in specs()
    if spec.scales and spec.device != "cuda"
    for scheme in served_by(spec)
    if scheme.weight_bits != 8 or scheme.group_size in (None, 16)  # whose loop is that of 4 bits
    for form in forms_of(scheme)
    if not form.minimum or spec.minimum
]


def usable(spec: KernelSpec, scheme: Scheme, form: Form) -> Subject:
    size = {"m": spec.m_range[0], "n": 1, "k": 1}
    reason = spec.why_not(Problem(scheme, **size, dtype=spec.act_dtypes[0], layout=spec.layout, form=form))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")
    return Subject(spec, scheme)


def with_scales(quantized: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    least = None if quantized.minimum is None else quantized.minimum.to(dtype)
    return replace(quantized, scale=quantized.scale.to(dtype), minimum=least)


@pytest.mark.sampled(every=10, full=2)
@pytest.mark.parametrize(("spec", "scheme", "form"), CASES)
def test_scales_of_any_dtype_agree_with_the_oracle(spec: KernelSpec, scheme: Scheme, form: Form) -> None:
    subject = usable(spec, scheme, form)
    for name, (m, n, k) in SHAPES.items():
        for dtype in spec.act_dtypes:
            seed = seed_of(scheme, name)
            x = activations(subject.tokens(m), k, dtype, seed)
            subject.compare((name, dtype), random_weight(scheme, n, k, seed, form=form), x, torch.ones(n, dtype=dtype))


@pytest.mark.sampled(every=10, full=2)
@pytest.mark.parametrize(("spec", "scheme", "form"), CASES)
def test_the_same_scales_give_the_same_bits(spec: KernelSpec, scheme: Scheme, form: Form) -> None:
    """As bfloat16 and as another dtype: nothing but the way they are read differs."""
    subject, dtype = usable(spec, scheme, form), form.scale or torch.float32
    for name, (m, n, k) in SHAPES.items():
        quantized = with_scales(random_weight(scheme, n, k, form=Form(None, form.minimum)), torch.bfloat16)
        x = activations(subject.tokens(m), k, subject.dtype, seed_of(name))
        assert torch.equal(with_scales(quantized, dtype).scale.float(), quantized.scale.float())
        assert torch.equal(subject.run(with_scales(quantized, dtype), x), subject.run(quantized, x)), name


def test_minimums_are_zero_points_times_scales() -> None:
    """-zero_point * scale as a minimum: the same weight, and, where sums are exact, the same output."""
    scheme, n, k = Scheme.parse("w4a8g32asym"), 33, 130
    quantized = random_weight(scheme, n, k, unit_scale=True)
    assert quantized.zero_point is not None
    least = replace(quantized, zero_point=None, minimum=-quantized.zero_point.to(torch.bfloat16))
    assert torch.equal(dequantize_weight(least, scheme, k), dequantize_weight(quantized, scheme, k))
    x = torch.randint(-100, 101, (7, k)).float()
    x[:, 0], x[:, 1] = -128, 127
    for spec in specs():
        if spec.minimum and spec.why_not(Problem(scheme, 7, n, k, form=MINIMUMS[0])) is None:
            assert torch.equal(Subject(spec, scheme).run(least, x), Subject(spec, scheme).run(quantized, x))


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        pytest.param(scheme, form, id=f"{scheme}-{form}")
        for scheme in (*schemes_of("w4a8"), *schemes_of("w8a8"))
        for form in forms_of(scheme)
    ],
)
def test_integer_kernels_agree_bit_for_bit(scheme: Scheme, form: Form) -> None:
    here = [s for s in specs() if s.exact and s.why_not(Problem(scheme, s.m_range[0], 1, 1, form=form)) is None]
    for name, (m, n, k) in SHAPES.items():
        quantized, x = random_weight(scheme, n, k, form=form), activations(m, k, torch.float32, seed_of(name))
        first, *others = [run(spec, quantized, scheme, x) for spec in here]
        for spec, other in zip(here[1:], others, strict=True):
            assert torch.equal(first, other), f"{spec.name} and {here[0].name} differ on {name}"


@BY_FORM
def test_a_subnormal_float16_scale_is_read(form: Form) -> None:
    scheme = Scheme.parse("w4a16g32")
    quantized = random_weight(scheme, 20, 96)
    tiny = QuantizedWeight(quantized.qweight, torch.full((20, 3), 3 * 2.0**-24).to(form.scale))
    dense = dequantize_weight(tiny, scheme, 96)
    for spec in specs():
        if spec.scales and spec.why_not(Problem(scheme, spec.m_range[0], 20, 96, form=form)) is None:
            assert torch.allclose(run(spec, tiny, scheme, torch.eye(96)[:32] * 2.0**20), dense.t()[:32] * 2.0**20)


@pytest.mark.parametrize("form", [*FORMS, *MINIMUMS, EIGHT[0], EIGHT_MINIMUMS[1]], ids=str)
@pytest.mark.parametrize(
    "name",
    ["w4a8", "w4a8asym", "w4a8g32", "w4a8g64asym", "w4a8g16asym", "w4a16g128", "w8a8g32", "w8a8asym", "w8a8g16asym"],
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 129), (33, 70), (48, 256)])
def test_packing(name: str, form: Form, n: int, k: int) -> None:
    scheme = Scheme.parse(name)
    if form not in forms_of(scheme):
        pytest.skip("not another form of this scheme")
    quantized = random_weight(scheme, n, k, form=form)
    for base in (*(("n16k8", "n16k16n") if scheme.weight_bits == 4 else GROUPED), layouts.PLAIN):
        layout = form.of_layout(base)
        packed = layouts.pack(quantized, layout, scheme, k)
        assert packed.numel() == layouts.packed_nbytes(layout, scheme, n, k)
        assert torch.equal(ops.pack_as(quantized, layout, scheme, k), packed)
        for found in (layouts.unpack(packed, layout, scheme, n, k), ops.unpack(packed, layout, scheme, n, k)):
            for key, tensor in quantized.tensors().items():
                assert getattr(found, key).dtype == tensor.dtype
                assert torch.equal(getattr(found, key), tensor), key


def test_a_layout_holds_one_form() -> None:
    scheme = Scheme.parse("w4a16g32")
    half, usual = random_weight(scheme, 4, 32, form=FORMS[0]), random_weight(scheme, 4, 32)
    for quantized, layout in ((half, "n16k8"), (usual, "n16k8+f16"), (half, "plain+f32")):
        with pytest.raises(ValueError, match=rf"scale: torch.*; layout '{layout[:5]}.*' holds torch"):
            layouts.pack(quantized, layout, scheme, 32)
        with pytest.raises(ValueError, match="scale: torch"):
            ops.pack_as(quantized, layout, scheme, 32)
    for layout, rule in (("n16k4+f16", "holds no weights"), ("mask4+f32", "holds no weights"), ("n16k8+x", "form='x'")):
        with pytest.raises(ValueError, match=rule):
            layouts.find(layout)
    assert [split_layout(name) for name in ("n16k8", "plain+f16")] == [("n16k8", USUAL), ("plain", FORMS[0])]


def test_kernels_without_minimums_say_so() -> None:
    scheme = Scheme.parse("w4a16g32asym")
    problem = Problem(scheme, 1, 64, 64, torch.bfloat16, form=MINIMUMS[2])
    lacking = [spec for spec in specs() if spec.scheme == "w4a16" and not spec.minimum and spec.device != "cuda"]
    assert {spec.name for spec in lacking} == {"w4a16_amx"}
    for spec in lacking:
        here = replace(spec, built=True, target="scalar", m_range=(1, None))
        assert here.why_not(problem) == "takes no float minimums in place of zero points"


@BY_FORM
def test_kernels_that_do_not_read_them_say_so(form: Form) -> None:
    for spec in specs():
        if not spec.scales and spec.scheme.startswith("w4"):
            scheme = served_by(spec)[0]
            assert (spec.why_not(Problem(scheme, 1, 64, 64, device=spec.device or "cpu", form=form)) or "") != ""
            everything = {"built": True, "target": "scalar", "scales": ()}
            kernel = KernelSpec("x", spec.scheme, layout=spec.layout, make=spec.make, **everything)
            reason = kernel.why_not(Problem(scheme, 1, 64, 64, form=form))
            assert reason == f"reads no scales of {str(form.scale).removeprefix('torch.')}"


LAYOUTS_OF_OTHERS = {"sp50w4a8g32": "mask4", "sp50w8a8": "mask8", "sp24w8a16": "n16k4"}


@BY_FORM
@pytest.mark.parametrize("name", LAYOUTS_OF_OTHERS)
def test_other_weights_have_no_such_scales(name: str, form: Form) -> None:
    layer_type = nybble.nn.SparseLinear if name.startswith("sp") else nybble.nn.Linear
    layer = layer_type(64, 8, scheme=name)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    wrong = torch.float16 if layer.scale.dtype == form.scale else form.scale
    state["scale"] = state["scale"].to(wrong)
    with pytest.raises(RuntimeError, match=rf"scale: \(8, .\) {wrong}"):
        layer.load_state_dict(state)
    scheme = Scheme.parse(name)
    with pytest.raises(ValueError, match="scale_dtype"):
        native.weight_shape(scheme, 8, 64, LAYOUTS_OF_OTHERS[name], form)


# --- modules


def layer_of(form: Form, scheme: str = "w4a16g32asym", n: int = 40, k: int = 96) -> nybble.nn.Linear:
    quantized = random_weight(Scheme.parse(scheme), n, k, form=form)
    return nybble.nn.Linear.from_quantized(quantized, k, None, scheme, torch.float32)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        *((scheme, form) for scheme in ("w4a16g32asym", "w4a8g128", "w4a8static", "w4a16g16") for form in FORMS),
        *((scheme, form) for scheme in ("w4a16g32asym", "w4a8asym", "w4a8g16asym") for form in MINIMUMS),
        *((scheme, form) for scheme in ("w8a8", "w8a16g32asym", "w8a8static", "w8a7g16") for form in EIGHT),
        *((scheme, form) for scheme in ("w8a16g32asym", "w8a8asym", "w8a8g16asym") for form in EIGHT_MINIMUMS),
    ],
)
def test_a_layer_keeps_its_scales(form: Form, scheme: str, tmp_path: Path) -> None:
    quantized = random_weight(Scheme.parse(scheme), 40, 96, form=form)
    act = (-4.0, 4.0) if "static" in scheme else None
    layer = nybble.nn.Linear(96, 40, scheme=scheme)
    state = layer.state_dict() | quantized.tensors()
    if form.minimum:
        del state["zero_point"]
    if act:
        state["act_scale"] = torch.full((1,), 0.03)
    layer.load_state_dict(state)
    usual = layer.scheme.weight_type.scale
    assert (layer.scale.dtype, layer.form) == (form.scale or usual, form)
    assert (layer.minimum is None) is not form.minimum
    assert split_layout(layer.layout)[1] == form
    weight = dequantize_weight(quantized, layer.scheme, 96)
    assert torch.equal(layer.dequantized_weight(), weight)
    x = torch.randn(5, 96)
    if layer.scheme.act_bits == 16:
        torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias, rtol=1e-4, atol=1e-4)
    held = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), unpacked(layer)):  # noqa: S301
        assert same(layer, other)
        assert torch.equal(other(x), held)
    assert layer.half().float().scale.dtype == (form.scale or usual)
    assert torch.equal(layer.dequantized_weight(), weight)
    model, fresh = nn.Sequential(layer), nn.Sequential(nn.Linear(96, 40))
    nybble.save(model, tmp_path)
    nybble.load(fresh, tmp_path)
    assert same(model, fresh)
    assert torch.equal(fresh(x), model(x))


def unpacked(layer: nybble.nn.Linear) -> nybble.nn.Linear:
    other = copy.deepcopy(layer)
    other.unpack()
    return other


def test_loading_another_form_changes_a_layer_and_not_those_that_share_its_weight() -> None:
    first, second = layer_of(USUAL), layer_of(USUAL)
    second.tie_to(first)
    before = second.dequantized_weight()
    for form in (FORMS[0], *MINIMUMS):
        other = layer_of(form)
        first.load_state_dict(other.state_dict())
        assert same(first, other)
        assert torch.equal(second.dequantized_weight(), before)
    first.load_state_dict(second.state_dict())
    assert same(first, second)
    second.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert same(second, other)


@pytest.mark.parametrize("form", FORMS + MINIMUMS, ids=str)
@pytest.mark.parametrize("scheme", ["w4a16g32asym", "w4a8g32asym", "w4a16g16asym"])
def test_some_outputs_alone(form: Form, scheme: str) -> None:
    layer, x = layer_of(form, scheme, n=70), torch.randn(3, 96)
    whole = layer(x)
    assert layer.packed is not None
    assert layer.layout is not None
    for begin, end in ((0, 16), (16, 70), (32, 33)):
        part = ops.linear_part(x, layer.packed, None, scheme, layer.layout, 70, 96, begin, end)
        assert torch.equal(part, whole[:, begin:end])


@pytest.mark.parametrize("form", FORMS + MINIMUMS, ids=str)
def test_compiled_and_differentiated(form: Form) -> None:
    layer, x = layer_of(form), torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantized_weight().sum(0).expand(3, 96), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("w4a16", FORMS[0]), ("w4a16", FORMS[1]), *(("w4a16g32asym", form) for form in FORMS + MINIMUMS)],
)
def test_rows_of_a_table(form: Form, scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    quantized = random_weight(parsed, 50, 96, form=form)
    table = nybble.nn.Embedding(50, 96, scheme=scheme)
    table.load_state_dict(quantized.tensors())
    ids, dense = torch.tensor([3, 49, 0, 3]), dequantize_weight(quantized, parsed, 96)
    assert torch.equal(table(ids), dense[ids])
    assert table.layout == form.of_layout("plain")
    head = nybble.nn.Linear.from_quantized(quantized, 96, None, scheme, torch.float32)
    table.tie_to(head)
    assert torch.equal(table(ids), dense[ids])


# --- foreign weights


def test_a_float_minimum_is_held() -> None:
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    scale, least = torch.rand(8, 2) + 0.01, torch.randn(8, 2)
    weight = ForeignWeight(codes, 4, scale, 0, 32, minimum=least)
    found = fit(weight)
    assert str(found.scheme) == "w4a16g32asym"
    assert found.quantized is not None
    assert found.scheme is not None
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, 64), codes * spread(scale) + spread(least))
    assert "negative scales beside" in str(fit(replace(weight, scale=-scale)).why)
    assert str(fit(replace(weight, bits=5)).scheme) == "w8a16g32asym"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_dtype_that_has_the_scales(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    scale = (torch.rand(8, 2) + 0.01).to(dtype).float()
    found = fit(ForeignWeight(codes, 4, scale, 8, 32))
    assert found.quantized is not None
    assert found.scheme is not None
    assert found.quantized.scale.dtype == dtype
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, 64), (codes.float() - 8) * spread(scale))


def spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(32, dim=1)


def test_a_convolution_holds_them() -> None:
    quantized = random_weight(Scheme.parse("w4a16g32"), 8, 4 * 9, form=FORMS[1])
    conv = nybble.nn.Conv2d.from_dense(nn.Conv2d(4, 8, 3), "w4a16g32")
    conv.load_state_dict(conv.state_dict() | quantized.tensors())
    x = torch.randn(1, 4, 6, 6)
    dense = conv.dequantize()
    torch.testing.assert_close(conv(x), dense(x), rtol=1e-4, atol=1e-4)
