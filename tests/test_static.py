"""Static activations: one scale and zero point for all tokens, on every kernel, in a layer, compiled and on disk."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import nybble
from nybble import native
from nybble.dispatch import reference, targets
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS, Problem
from nybble.native.weights import GROUPED
from nybble.nn import Linear, SparseLinear
from nybble.testing.oracle import SHAPES, error_bound, random_weight, run, run_into, served_by
from nybble.weights.activation_type import ActivationType, activation_types
from nybble.weights.activations import HEADER, ActScale, split
from nybble.weights.rounding import quantize_weight
from nybble.weights.scheme import Scheme

A8, A7 = activation_types()[8], activation_types()[7]
# Ranges by what is special about them.
RANGES = {
    "usual": (-2.0, 3.0),
    "positive": (0.0, 1.7),
    "negative": (-0.3, 0.0),
    "narrow": (-1e-3, 1e-3),
    "tiny": (-1e-35, 1e-35),
    "huge": (-1e37, 2e37),
}
SPECS = [spec for spec in specs() if spec.static and spec.device != "cuda"]
CASES = [
    pytest.param(spec, scheme, id=f"{spec.name}-{scheme}")
    for spec in SPECS
    for scheme in (Scheme.parse(f"{dense}static") for dense in served_by(spec))
]
SPARSE = ("sp50w8a8static", "sp90w8a8static", "sp24w4a8g128static", "bs32x32w8a8static")


def usable(spec, scheme: Scheme) -> None:
    reason = spec.why_not(Problem(scheme, m=spec.m_range[0], n=1, k=1, layout=spec.layout))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Beyond every range at either end, with ties, zeros and subnormals."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-8, 9, (m, 1)))
    x[:, :: max(k // 3, 1)] = torch.tensor([0.0, -0.0, 1e30, -1e30, 0.5, 1e-42])[: x[:, :: max(k // 3, 1)].shape[1]]
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_agrees_with_the_oracle(spec, scheme: Scheme) -> None:
    usable(spec, scheme)
    for i, (m, n, k) in enumerate(SHAPES.values()):
        act = ActScale.of_range(*list(RANGES.values())[i % 4], scheme.act_type)
        quantized, x, bias = random_weight(scheme, n, k, i), inputs(m, k, FLOATS[i % 3]), torch.randn(n)
        got = run(spec, quantized, scheme, x, bias, act)
        expected = reference.linear(x, quantized, bias, scheme, torch.float64, act)
        bound = error_bound(x, quantized, scheme, expected, x.dtype, act)
        assert got.shape == (m, n)
        assert ((got.double() - expected).abs() <= bound).all(), (m, n, k)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("spec", "scheme"), [case for case in CASES if case.values[0].exact])
def test_the_same_bits_on_every_target(spec, scheme: Scheme) -> None:
    usable(spec, scheme)
    form = "_groups" if spec.layout in GROUPED else ""
    plain = next(one for one in SPECS if one.name == f"{scheme.dense.family}_scalar{form}")
    for m, n, k in SHAPES.values():
        act = ActScale.of_range(-1.0, 2.0, scheme.act_type)
        quantized, x = random_weight(scheme, n, k), inputs(m, k)
        dense = Scheme.parse(str(scheme.dense))
        assert torch.equal(run(spec, quantized, scheme, x, None, act), run(plain, quantized, dense, x, None, act))


@pytest.mark.parametrize(
    "spec",
    [one for one in SPECS if one.scheme in ("w8a8", "w8a7") and one.target != "torch" and one.layout not in GROUPED],
)
def test_accumulators_are_those_of_the_codes(spec) -> None:
    scheme = Scheme.parse(f"{spec.scheme}static")
    usable(spec, scheme)
    for low, high in RANGES.values():
        act = ActScale.of_range(low, high, scheme.act_type)
        quantized, x = random_weight(scheme, 33, 130), inputs(5, 130) * high if high else inputs(5, 130)
        out = torch.empty(5, 33, dtype=torch.int32)
        run_into(spec, quantized, scheme, x, None, out, act)
        codes = reference.quantize_static(x, act, scheme.act_type).codes
        expected = codes.long() @ quantized.qweight.long().t()
        assert torch.equal(out.long(), expected), (low, high)


def test_the_reference_rounds_as_its_docstring_says() -> None:
    act = ActScale(torch.tensor([0.5]), torch.tensor([-28], dtype=torch.int8))
    x = torch.tensor([[0.0, 0.25, 0.75, -0.25, 1e30, -1e30, 77.4, -50.1], [1.0, torch.nan, 0, 0, 0, 0, 0, 0]])
    codes, scale, zero = reference.quantize_static(x, act, A8)
    assert codes.tolist() == [[-28, -28, -26, -28, 127, -128, 127, -128], [0] * 8]
    assert scale[0] == 0.5
    assert scale[1].isnan()
    assert zero.tolist() == [-28, 0]


def test_the_error_is_half_a_step_inside_and_the_distance_outside() -> None:
    act = ActScale.of_range(-1.5, 4.5, A8)
    x = torch.rand(64, 100, dtype=torch.float64).float() * 12 - 4
    codes, scale, zero = reference.quantize_static(x, act, A8)
    restored = (codes.double() - zero[:, None]) * scale.double()[:, None]
    step = act.scale.item()
    lowest, highest = ((end - act.zero_point.item()) * step for end in (-128, 127))
    assert lowest == pytest.approx(-1.5, abs=step)
    assert highest == pytest.approx(4.5, abs=step)
    assert ((restored - x.double().clamp(lowest, highest)).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("low_high", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("act_type", [A8, A7], ids=lambda kind: kind.name)
def test_zero_has_a_code_of_its_own(low_high: tuple[float, float], act_type: ActivationType) -> None:
    act = ActScale.of_range(*low_high, act_type)
    codes, scale, zero = reference.quantize_static(torch.zeros(1, 4), act, act_type)
    assert torch.equal(codes.int() - zero, torch.zeros(1, 4, dtype=torch.int32))
    assert scale.item() == pytest.approx((low_high[1] - low_high[0]) / act_type.steps)


@pytest.mark.parametrize("low_high", [(0.0, 0.0), (0.0, 1e-39), (0.0, torch.inf), (-torch.inf, 0.0), (0.0, torch.nan)])
def test_a_range_without_a_scale_is_refused(low_high: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"range .* must be in \[2\^-126, 2\^126\]"):
        ActScale.of_range(*low_high, A8)


@pytest.mark.parametrize("scheme", ["w8a8static", "w4a8g128asymstatic", *SPARSE])
def test_a_bad_row_is_nan_and_others_are_untouched(scheme: str) -> None:
    layer, x = small_layer(scheme, 40, 70), torch.randn(6, 70)
    clean = layer(x)
    x[1, 3], x[4, 69] = torch.nan, -torch.inf
    bad = layer(x)
    assert bad[[1, 4]].isnan().all()
    assert torch.equal(bad[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def small_layer(scheme: str, n: int = 24, k: int = 37, act_range: tuple[float, float] = (-2.5, 3.0)) -> Linear:
    parsed = Scheme.parse(scheme)
    weight = torch.randn(n, k)
    if parsed.sparsity is not None:
        weight *= torch.rand(n, k) < (0.2 if "bs" in scheme else 0.5)
        if "24" in scheme:
            weight.view(-1)[:] = 0
            weight[:, ::4] = torch.randn(n, -(-k // 4))
    kind = Linear if parsed.sparsity is None else SparseLinear
    return kind.from_weight(weight, nn.Parameter(torch.randn(n)), parsed, act_range=act_range)


@pytest.mark.parametrize("scheme", ["w8a8static", "w8a7static", "w4a8static", "w4a8g32asymstatic", *SPARSE])
def test_a_layer_is_what_its_tensors_say(scheme: str) -> None:
    layer, x = small_layer(scheme), torch.randn(5, 37)
    state = layer.state_dict()
    assert state["act_scale"].dtype == torch.float32
    assert state["act_zero_point"].dtype == torch.int8
    act = ActScale.of_range(-2.5, 3.0, layer.scheme.act_type)
    assert torch.equal(layer.act_scale, act.scale)
    assert torch.equal(layer.act_zero_point, act.zero_point)
    expected = reference.linear(x, layer.quantized(), layer.bias, layer.scheme, torch.float64, act)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    again = type(layer)(37, 24, scheme=scheme)
    again.load_state_dict(state)
    assert torch.equal(again(x), layer(x))
    packed = layer.packed.clone()
    layer.unpack()
    assert isinstance(layer.act_scale, nn.Parameter)
    layer.pack()
    assert torch.equal(layer.packed, packed)
    assert torch.equal(copy.deepcopy(layer)(x), again(x))


def test_a_new_layer_has_the_scale_one() -> None:
    layer = Linear(7, 3, scheme="w8a8static")
    assert layer.act_scale.tolist() == [1.0]
    assert torch.equal(layer(torch.randn(2, 7)), layer.bias.expand(2, 3))


def test_editing_the_scale_changes_what_the_layer_computes() -> None:
    layer = small_layer("w8a8static")
    x = torch.randn(4, 37) * 10
    before = layer(x)
    layer.unpack()
    with torch.no_grad():
        layer.act_scale.mul_(16)
    assert (layer(x) - before).abs().max() > 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_changing_the_dtype_leaves_the_scale(dtype: torch.dtype) -> None:
    layer = small_layer("w8a8static")
    layer.unpack()
    layer.to(dtype)
    assert layer.act_scale.dtype == torch.float32
    assert layer.act_zero_point.dtype == torch.int8
    assert layer(torch.randn(2, 37, dtype=dtype)).dtype == dtype


def test_tokens_do_not_see_each_other_nor_do_numbers_of_them_matter() -> None:
    layer, x = small_layer("w8a8static", 33, 65), torch.randn(70, 65)
    whole = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), whole)
    assert layer(x[:0]).shape == (0, 33)
    assert torch.equal(layer(x[:1]), whole[:1])
    scaled = layer(torch.cat([x[:1], x[1:] * 100]))
    assert torch.equal(scaled[:1], whole[:1])


def test_compiled_and_with_gradients() -> None:
    layer, x = small_layer("w8a8static"), torch.randn(3, 37, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer(x).sum().backward()
    expected = layer.dequantized_weight().sum(0).expand(3, 37)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_share_a_weight_share_the_scale() -> None:
    layer, other = small_layer("w8a8static"), Linear(37, 24, bias=False, scheme="w8a8static")
    other.tie_to(layer)
    assert torch.equal(other.act_scale, layer.act_scale)


def test_other_processes_get_the_scale() -> None:
    layer, x = small_layer("w8a8static"), torch.randn(3, 37)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert torch.equal(copy.copy(layer)(x), layer(x))
    state = layer.__getstate__()
    assert "act_scale" in state["_parameters"]


@pytest.mark.parametrize("scheme", ["w8a8static", "w4a8g32asymstatic", "sp50w8a8static"])
def test_checkpoint_round_trip(scheme: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    model, x = nn.Sequential(small_layer(scheme)), torch.randn(5, 37)
    nybble.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(37, 24))
    nybble.load(fresh, tmp_path)
    assert fresh[0].scheme == Scheme.parse(scheme)
    assert torch.equal(fresh(x), model(x))


def test_a_checkpoint_with_a_damaged_scale_is_refused_by_name(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = nn.Sequential(small_layer("w8a8static"))
    model[0].packed[:4] = 0
    nybble.save(model, tmp_path)
    with pytest.raises(nybble.checkpoint.CheckpointError, match=r"0\.act_scale: 0, must be in"):
        nybble.load(nn.Sequential(nn.Linear(37, 24)), tmp_path)


def test_states_of_the_other_kind_are_refused() -> None:
    static, dynamic = small_layer("w8a8static"), Linear(37, 24, scheme="w8a8")
    with pytest.raises(RuntimeError, match="act_scale"):
        static.load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match="act_scale"):
        dynamic.load_state_dict(static.state_dict())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("act_scale", torch.zeros(1), r"act_scale: 0, must be in"),
        ("act_scale", torch.tensor([torch.nan]), r"act_scale: nan, must be in"),
        ("act_scale", torch.tensor([2.0**-127]), r"act_scale: 5.87747e-39, must be in"),
        ("act_scale", torch.ones(2), r"act_scale: \(2,\)"),
        ("act_zero_point", torch.ones(1), r"act_zero_point: \(1,\) torch.float32"),
    ],
)
def test_damaged_scales_are_refused_by_name(name: str, value: torch.Tensor, words: str) -> None:
    layer = small_layer("w8a8static")
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict({**layer.state_dict(), name: value})


def test_a_damaged_header_is_refused() -> None:
    layer, x = small_layer("w8a8static"), torch.randn(2, 37)
    layer.packed[:4] = 0
    with pytest.raises(ValueError, match="act_scale: must be in"):
        layer(x)
    layer.packed[:4] = torch.ones(1).view(torch.uint8)
    layer.packed[4:8] = torch.tensor([300], dtype=torch.int32).view(torch.uint8)
    with pytest.raises(ValueError, match="act_zero_point: must be in"):
        layer(x)
    with pytest.raises(ValueError, match="needs 64"):
        torch.ops.nybble.linear(x, layer.packed[:8], None, "w8a8static", layer.layout, 24, 37)
    with pytest.raises(ValueError, match=f"needs {HEADER}"):
        split(layer.packed[:8], layer.scheme)


def test_a_float_kernel_refuses_static_activations() -> None:
    shape = native.weight_shape(Scheme.parse("w8a16"), 3, 4)
    plan = native._C.LinearPlan("w8a16_scalar", "prepare_scalar", "", "", shape, static_activations=True, act_steps=255)
    held = ActScale.of_range(-1.0, 1.0, A8).before(torch.zeros(1024, dtype=torch.uint8))
    memory = native.memory(held)
    with pytest.raises(ValueError, match="takes float activations"):
        plan.run(memory, 0, 1, 4, memory, (0, 0), 0, memory, 0, 1)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16g128"])
def test_float_activations_cannot_be_static(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"float activations \(a16\) have no scale"):
        Scheme.parse(f"{scheme}static")


def test_names_and_relatives_of_schemes() -> None:
    for name in ("w8a8static", "w4a8g32asymstatic", "sp24w8a8static", "bs32x32w8a8static"):
        scheme = Scheme.parse(name)
        assert scheme.static
        assert str(scheme) == name
        assert str(scheme.dynamic) == name.removesuffix("static")
        assert scheme.family == scheme.dynamic.family
        assert scheme.dense.static


def test_a_static_scheme_needs_a_range_and_a_dynamic_one_none() -> None:
    dense = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="scheme='w8a8static': static activations need the range of calibration"):
        Linear.from_dense(dense, "w8a8static")
    with pytest.raises(ValueError, match="scheme='w8a8': the scheme is not static"):
        Linear.from_dense(dense, "w8a8", act_range=(-1, 1))
    with pytest.raises(ValueError, match="act=None, scheme='w8a8static': must be an ActScale for a static scheme"):
        Linear.from_quantized(quantize_weight(dense.weight, Scheme.parse("w8a8")), 8, None, "w8a8static", torch.float32)


def test_kernels_for_gpus_say_why_they_do_not_run_and_the_reference_does() -> None:
    for family in ("w8a8", "w4a8g128"):
        scheme = Scheme.parse(f"{family}static")
        for spec in specs():
            if spec.device == "cuda" and spec.scheme == scheme.family:
                reason = spec.why_not(Problem(scheme, m=1, n=64, k=64, device="cuda"))
                assert reason == "finds a scale for each token, takes no static ones"
        plain = next(spec for spec in specs() if spec.name == f"{scheme.family}_reference")
        assert plain.why_not(Problem(scheme, m=1, n=64, k=64, device="cuda")) is None


def test_explain_names_the_scheme() -> None:
    layer = small_layer("w8a8static")
    explanation = nybble.explain(layer)
    assert str(explanation).startswith("w8a8static m=1")
    assert "avx512vnni" not in targets.detect().targets or explanation.kernel == "w8a8_avx512vnni"
    assert "scheme=w8a8static" in repr(layer)
