"""Attention on CPUs: every kernel against float64, masks, lengths and strides of all kinds, and the torch op."""

import math
from contextlib import ExitStack

import pytest
import torch
from torch.nn import functional

from nybble import native
from nybble.attention import _attention, attention
from nybble.bench import attention as bench
from nybble.dispatch.registry import compiled
from nybble.testing.attentions import codes_of, draw, masks, reference, run
from nybble.testing.guard import guarded

KERNELS = compiled("attention")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Most of the norm of the difference over that of the result; half a unit in the last place of the output dtype and more.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# batch, heads, kv_heads, queries, keys, head_dim, value_dim
SHAPES = [
    (2, 4, 2, 12, 12, 32, 32),
    (1, 3, 3, 197, 197, 64, 64),
    (2, 4, 1, 5, 300, 80, 40),
    (1, 8, 2, 1, 257, 64, 64),
    (1, 2, 1, 1, 2050, 16, 24),
    (1, 4, 1, 2, 1100, 8, 130),
    (1, 2, 2, 40, 17, 7, 3),
    (1, 2, 1, 270, 300, 128, 128),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 4, 2, 33, 129, 100, 256),
    (3, 1, 1, 16, 1, 5, 9),
]


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_agrees_with_float64(kernel, shape):
    tensors = draw(shape)
    for name, how in masks(shape).items():
        got = run(kernel, *tensors, **how)
        assert torch.isfinite(got).all(), name
        assert error(got, reference(*tensors, **how)) < BOUNDS[torch.float32], name


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bit_inputs_are_rounded_once(kernel, dtype):
    for shape in SHAPES[:6]:
        tensors = draw(shape, dtype)
        for name in ("none", "causal", "padding", "float"):
            how = masks(shape)[name]
            got = run(kernel, *tensors, **how)
            assert got.dtype == dtype
            assert error(got, reference(*tensors, **how)) < BOUNDS[dtype], (shape, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_int8_keys_and_values_are_what_they_stand_for(kernel, dtype):
    for shape in SHAPES:
        q, k, v = draw(shape, dtype)
        (k, k_scale, keys), (v, v_scale, values) = codes_of(k), codes_of(v)
        for name, how in masks(shape).items():
            got = run(kernel, q, k, v, scales=(k_scale, v_scale), **how)
            assert got.dtype == dtype
            assert error(got, reference(q, keys, values, **how)) < BOUNDS[dtype], (shape, name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_error_is_like_that_of_torch(kernel):
    for shape in ((1, 4, 4, 128, 128, 32, 32), (1, 2, 2, 60, 1500, 64, 64), (1, 4, 4, 1, 2048, 64, 64)):
        tensors = draw(shape)
        expected = reference(*tensors)
        theirs = error(functional.scaled_dot_product_attention(*tensors), expected)
        assert error(run(kernel, *tensors), expected) < 2 * theirs + 1e-7


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_threads(kernel):
    before = torch.get_num_threads()
    try:
        for shape in SHAPES:
            (q, k, v), how = draw(shape), masks(shape)["causal"]
            (k8, k_scale, _), (v8, v_scale, _) = codes_of(k), codes_of(v)
            for tensors, scales in (((q, k, v), None), ((q, k8, v8), (k_scale, v_scale))):
                found = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(run(kernel, *tensors, scales=scales, **how))
                assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [1, 20], ids=["few", "many"])
def test_a_query_that_sees_nothing_gives_0(kernel, queries):
    tensors = draw((1, 2, 1, queries, 9, 16, 16))
    assert (run(kernel, *tensors, mask=torch.zeros(1, 1, queries, 9, dtype=torch.bool)) == 0).all()
    assert (run(kernel, *tensors, mask=torch.full((queries, 9), -math.inf)) == 0).all()
    q, k, v = draw((1, 2, 1, queries + 3, 3, 16, 16))
    early = run(kernel, q, k, v, causal=True)
    assert (early[:, :, :queries] == 0).all()
    assert error(early, reference(q, k, v, causal=True)) < 2e-6
    assert (run(kernel, q, k[:, :, :0], v[:, :, :0]) == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lowest_number_is_a_mask_as_in_torch(kernel):
    lowest = torch.finfo(torch.float32).min
    for queries in (1, 24):
        tensors = draw((1, 2, 2, queries, 40, 16, 16))
        mask = torch.zeros(queries, 40)
        mask[:, 7:] = lowest
        assert error(run(kernel, *tensors, mask=mask), reference(*tensors, mask=mask)) < 2e-6
        mask[0] = lowest  # sees all keys alike
        theirs = functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        assert error(run(kernel, *tensors, mask=mask), theirs.double()) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_masked_keys_have_no_weight_at_all(kernel):
    q, k, v = draw((1, 2, 2, 30, 50, 16, 16))
    mask = torch.ones(50, dtype=torch.bool)
    mask[::3] = False
    huge = torch.where(mask[:, None], v, 1e30)
    for queries in (1, 30):
        assert torch.equal(
            run(kernel, q[:, :, :queries], k, v, mask=mask), run(kernel, q[:, :, :queries], k, huge, mask=mask)
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_inf_give_nan_where_they_do_in_torch(kernel, value):
    for queries, place in ((1, 3), (21, 3), (21, 20)):
        for which in range(3):
            tensors = draw((1, 2, 2, queries, 21, 16, 16))
            tensors[which][0, 1, min(place, tensors[which].shape[2] - 1), 5] = value
            q, k, v = tensors
            theirs = (q @ k.mT / 4).softmax(-1) @ v
            got = run(kernel, *tensors)
            assert torch.equal(torch.isnan(got), torch.isnan(theirs)), (queries, place, which)
            assert torch.equal(torch.isinf(got), torch.isinf(theirs)), (queries, place, which)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    q, k, v = draw((1, 2, 2, 20, 33, 16, 16))
    for queries in (1, 20):
        got = run(kernel, q[:, :, :queries] * 1e4, k * 1e4, v)
        assert error(got, reference(q[:, :, :queries] * 1e4, k * 1e4, v)) < 1e-5


@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_leaves_its_memory(kernel, dtype, flush):
    for queries, keys, width, value_width in ((1, 1, 1, 3), (1, 21, 17, 15), (2, 530, 9, 33), (19, 31, 5, 18)):
        with ExitStack() as stack:
            sizes = (1, 2, queries, width), (1, 2, keys, width), (1, 2, keys, value_width), (1, queries, 2, value_width)
            q, k, v, out = regions = [stack.enter_context(guarded(size, dtype, flush)) for size in sizes]
            mask = stack.enter_context(guarded((1, 1, queries, keys), torch.bool, flush))
            for region in (q, k, v):
                region.tensor.copy_(torch.randn(region.tensor.shape))
            mask.tensor.copy_(torch.rand(mask.tensor.shape) > 0.2)
            seen = mask.tensor.expand(1, 2, queries, keys)
            native.attention(
                kernel,
                *(region.tensor for region in (q, k, v)),
                out.tensor.transpose(1, 2),
                seen,
                None,
                native.AttentionHow(0.5),
            )
            expected = reference(q.tensor, k.tensor, v.tensor, mask=seen, scale=0.5)
            assert error(out.tensor.transpose(1, 2), expected) < 2 * BOUNDS[dtype]
            assert all(region.intact() for region in (*regions, mask))


@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_leaves_the_memory_of_codes(kernel, flush):
    for queries, keys, width, value_width in ((1, 1, 1, 3), (1, 21, 17, 15), (2, 530, 9, 33), (19, 31, 5, 18)):
        q, k, v = draw((1, 2, 2, queries, keys, width, value_width))
        (k, k_scale, stands_for_k), (v, v_scale, stands_for_v) = codes_of(k), codes_of(v)
        with ExitStack() as stack:
            held = [stack.enter_context(guarded(tuple(t.shape), t.dtype, flush)) for t in (k, v, k_scale, v_scale)]
            for region, tensor in zip(held, (k, v, k_scale, v_scale), strict=True):
                region.tensor.copy_(tensor)
            k, v, k_scale, v_scale = (region.tensor for region in held)
            got = run(kernel, q, k, v, scales=(k_scale, v_scale))
            assert error(got, reference(q, stands_for_k, stands_for_v)) < BOUNDS[torch.float32]
            assert all(region.intact() for region in held)


# --- the op


def test_the_result_lies_as_projections_read_it():
    out = attention(*draw((2, 4, 2, 12, 12, 32, 8)))
    assert out.shape == (2, 4, 12, 8)
    assert out.transpose(1, 2).is_contiguous()


def test_the_op_is_the_function():
    q, k, v = draw((1, 4, 2, 6, 9, 16, 8))
    how = {"causal": True, "window": 3}
    assert torch.equal(attention(q, k, v, **how), torch.ops.nybble.attention(q, k, v, **how))
    columns = q.transpose(2, 3).contiguous().transpose(2, 3)  # the last stride is not 1
    assert torch.equal(attention(columns, k, v, **how), attention(q, k, v, **how))


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", ["none", "causal", "bool", "float", "slopes"])
def test_opcheck(name):
    shape = (2, 4, 2, 5, 7, 8, 6)
    how = dict(masks(shape)[name])
    tensors = [t.requires_grad_() for t in draw(shape)]
    extra = (how.pop("mask", None), how.pop("slopes", None))
    results = torch.library.opcheck(torch.ops.nybble.attention.default, (*tensors, *extra), how)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["none", "causal", "window", "bool", "padding", "float", "slopes"])
def test_gradients_are_those_of_the_reference(name):
    shape = (2, 4, 2, 6, 9, 16, 8)
    how = masks(shape)[name]
    found = []
    for function in (attention, reference):
        tensors = [t.detach().requires_grad_() for t in draw(shape)]
        function(*tensors, **how).float().square().sum().backward()
        found.append([t.grad for t in tensors])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs.double()) < 1e-5


def int8_call():
    """Arguments of attention with codes, and the result."""
    q, k, v = draw((2, 4, 2, 6, 9, 16, 8))
    (k, k_scale, keys), (v, v_scale, values) = codes_of(k), codes_of(v)
    return (q, k, v), {"k_scale": k_scale, "v_scale": v_scale}, reference(q, keys, values, causal=True)


def test_the_op_takes_int8_codes():
    tensors, scales, expected = int8_call()
    found = attention(*tensors, causal=True, **scales)
    assert error(found, expected) < 2e-6
    compiled = torch.compile(lambda *of: attention(*of, causal=True, **scales), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), found)
    extra = (None, None, *scales.values())
    results = torch.library.opcheck(torch.ops.nybble.attention.default, (*tensors, *extra), {"causal": True})
    assert set(results.values()) == {"SUCCESS"}


def test_gradients_with_int8_codes_are_refused():
    (q, k, v), scales, _ = int8_call()
    with pytest.raises(NotImplementedError, match="int8 keys and values"):
        attention(q.requires_grad_(), k, v, **scales)
    with torch.no_grad():
        attention(q, k, v, **scales)


def test_gradients_of_masks_are_refused():
    q, k, v = draw((1, 2, 2, 3, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="no gradient for mask"):
        attention(q, k, v, torch.zeros(3, 3, requires_grad=True))


def test_compiled_in_one_graph():
    tensors = draw((1, 4, 2, 6, 9, 16, 8))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors, causal=True) * 2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ["q", "(2, 3, 4)", "four"]),
        ({"q": torch.zeros(1, 4, 3, 8).double()}, ["q", "torch.float64"]),
        ({"k": torch.zeros(1, 2, 5, 8).half()}, ["k", "torch.float16"]),
        ({"k": torch.zeros(1, 2, 5, 9)}, ["k", "(1, 2, 5, 9)"]),
        ({"k": torch.zeros(2, 2, 5, 8)}, ["k", "(2, 2, 5, 8)"]),
        ({"v": torch.zeros(1, 2, 4, 8)}, ["v", "(1, 2, 4, 8)"]),
        ({"k": torch.zeros(1, 3, 5, 8), "v": torch.zeros(1, 3, 5, 8)}, ["k", "3 heads", "4 heads"]),
        ({"mask": torch.zeros(3, 5, dtype=torch.int32)}, ["mask", "torch.int32"]),
        ({"mask": torch.zeros(3, 4)}, ["mask", "(3, 4)", "(1, 4, 3, 5)"]),
        ({"mask": torch.zeros(1, 1, 1, 3, 5)}, ["mask", "(1, 1, 1, 3, 5)"]),
        ({"slopes": torch.zeros(2)}, ["slopes", "(2,)", "(4,)"]),
        ({"k": torch.zeros(1, 2, 5, 8, dtype=torch.int8)}, ["k", "torch.int8"]),
        ({"k_scale": torch.zeros(1, 2, 5)}, ["v_scale=None"]),
        ({"v_scale": torch.zeros(1, 2, 5)}, ["k_scale=None"]),
        ({"k_scale": torch.zeros(1, 2, 5), "v_scale": torch.zeros(1, 2, 4)}, ["v_scale", "(1, 2, 4)", "(1, 2, 5)"]),
        ({"k_scale": torch.zeros(1, 2, 5).half(), "v_scale": torch.zeros(1, 2, 5)}, ["k_scale", "torch.float16"]),
        ({"k_scale": torch.zeros(1, 2, 5), "v_scale": torch.zeros(1, 2, 5)}, ["k", "torch.float32", "torch.int8"]),
        ({"window": 4}, ["window=4", "causal"]),
        ({"window": -1, "causal": True}, ["window=-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name(changed, named):
    fits = {"q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}
    with pytest.raises(ValueError, match=f"^{named[0]}") as refused:
        attention(**{**fits, **changed})
    assert all(part in str(refused.value) for part in named), str(refused.value)
    with pytest.raises(ValueError, match=f"^{named[0]}"):
        _attention(**{**fits, **changed})


# --- the bench


@pytest.mark.parametrize("kind", ["", "causal", "padding", "bool", "float"])
def test_figures_compare_equal_results(kind, monkeypatch):
    case = bench.Case("small", 2, 4, 2, 9, 11, 16, kind)
    monkeypatch.setattr(bench, "CASES", (case._replace(keys=9) if kind == "causal" else case,))
    found = list(bench.attention_figures(0.0))
    assert [figure.name.split()[-4] for figure in found] == ["fp32,", "bf16,"]
    assert all(figure.value > 0 and figure.bound == bench.LEAST and not figure.at_most for figure in found)


def test_figures_refuse_wrong_results(monkeypatch):
    monkeypatch.setattr(bench, "CASES", bench.CASES[-4:-3])
    monkeypatch.setattr(bench, "attention", lambda q, *rest, **how: torch.zeros_like(q))
    with pytest.raises(AssertionError):
        next(bench.attention_figures(0.0))
