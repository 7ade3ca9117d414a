"""Attention with products of 8 bits: every kernel to the last bit, what it does with NaN, and the option of the op."""

import math
from contextlib import ExitStack

import pytest
import torch

from nybble import native
from nybble.attention import attention
from nybble.dispatch.registry import compiled, fastest
from nybble.testing import attentions, chains
from nybble.testing.attention8 import attention8
from nybble.testing.attentions import codes_of, draw, masks, reference
from nybble.testing.guard import guarded

KERNELS = compiled("attention8")
# batch, heads, kv_heads, queries, keys, head_dim, value_dim
SHAPES = [
    (1, 2, 2, 96, 96, 64, 64),
    (1, 1, 1, 263, 131, 32, 48),
    (2, 8, 1, 13, 300, 40, 7),
    (1, 4, 2, 61, 257, 7, 130),
    (1, 1, 1, 97, 128, 1, 1),
    (1, 1, 1, 530, 129, 100, 31),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MOST = 0.04  # of the norm of the difference to attention in floats over that of the result


def run(kernel, *tensors, **how):
    return attentions.run(fastest("attention"), *tensors, int8=kernel, **how)


def off(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_bits_of_the_oracle(kernel, shape):
    q, k, v = draw(shape)
    for name, how in masks(shape).items():
        got = run(kernel, q, k, v, **how)
        assert torch.equal(got, attention8(q, k, v, **how)), name
        assert off(got, reference(q, k, v, **how)) < MOST, name


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bit_inputs_are_rounded_once(kernel, dtype):
    q, k, v = draw((1, 2, 1, 100, 150, 33, 20), dtype)
    assert torch.equal(run(kernel, q, k, v, causal=True), attention8(q, k, v, causal=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_in_codes_keep_them(kernel):
    """Of keys and values in codes the kernel makes codes as of what they stand for."""
    q, k, v = draw((1, 4, 2, 100, 150, 32, 24))
    (k, k_scale, stands_for_k), (v, v_scale, stands_for_v) = codes_of(k), codes_of(v)
    got = run(kernel, q, k, v, scales=(k_scale, v_scale))
    assert torch.equal(got, run(kernel, q, stands_for_k.float(), stands_for_v.float()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_common_part_of_the_keys_costs_no_accuracy(kernel):
    q, k, v = draw((1, 1, 1, 100, 200, 64, 64))
    moved = k + 100 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    assert off(run(kernel, q, moved, v), reference(q, moved, v)) < MOST


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_hidden_costs_no_accuracy(kernel):
    q, k, v = draw((1, 1, 1, 100, 200, 64, 64))
    mask = (torch.arange(200) < 150).expand(1, 1, 100, 200)
    expected = reference(q, k, v, mask)
    k[..., 150:, :] = 1e30
    assert off(run(kernel, q, k, v, mask), expected) < MOST


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_inf_make_nan_of_the_queries_that_see_them(kernel, value):
    q, k, v = draw((1, 1, 1, 200, 200, 40, 24))
    clean = run(kernel, q, k, v, causal=True)
    for which, place in (("q", 70), ("k", 140), ("v", 140)):
        given = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        given[which][0, 0, place, 5] = value
        got = run(kernel, given["q"], given["k"], given["v"], causal=True)[0, 0]
        bad = torch.arange(200) == place if which == "q" else torch.arange(200) >= place
        assert got[bad].isnan().all(), which
        if which == "q":
            assert torch.equal(got[~bad], clean[0, 0][~bad])
        else:
            assert off(got[~bad], reference(q, k, v, causal=True)[0, 0][~bad]) < MOST


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_sees_nothing_gives_0(kernel):
    q, k, v = draw((1, 1, 1, 100, 100, 16, 16))
    mask = (torch.arange(100) < 50).expand(100, 100).clone()
    mask[3] = False
    for kind in (mask, torch.zeros(100, 100).masked_fill(~mask, -math.inf)):
        got = run(kernel, q, k, v, kind)
        assert not got[0, 0, 3].any()
        assert got[0, 0, 4].all()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_tiny_and_huge_keys(kernel, scale):
    q, k, v = draw((1, 1, 1, 100, 100, 16, 16))
    got = run(kernel, q, k * scale, v, scale=0.25 if scale < 1 else 0.25 / scale)
    assert torch.equal(got, attention8(q, k * scale, v, scale=0.25 if scale < 1 else 0.25 / scale))
    assert off(got, reference(q, k * scale, v, scale=0.25 if scale < 1 else 0.25 / scale)) < MOST


def test_bits_do_not_depend_on_threads():
    q, k, v = draw((1, 4, 2, 600, 700, 32, 32))
    expected = attention8(q, k, v, causal=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attention(q, k, v, causal=True, int8=True), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_leaves_its_memory(kernel, dtype, flush):
    queries, keys, width, value_width = 99, 131, 17, 15
    with ExitStack() as stack:
        sizes = (1, 2, queries, width), (1, 2, keys, width), (1, 2, keys, value_width), (1, queries, 2, value_width)
        q, k, v, out = regions = [stack.enter_context(guarded(size, dtype, flush)) for size in sizes]
        mask = stack.enter_context(guarded((1, 1, queries, keys), torch.bool, flush))
        for region in (q, k, v):
            region.tensor.copy_(torch.randn(region.tensor.shape))
        mask.tensor.copy_(torch.rand(mask.tensor.shape) > 0.2)
        given = [region.tensor for region in (q, k, v)]
        how = native.AttentionHow(0.5, int8=kernel)
        seen, y = mask.tensor.expand(1, 2, queries, keys), out.tensor.transpose(1, 2)
        native.attention(fastest("attention"), *given, y, seen, None, how)
        assert torch.equal(y, attention8(*given, mask=seen, scale=0.5))
        assert all(region.intact() for region in (*regions, mask))


# --- the option


def test_few_queries_or_keys_are_computed_in_floats():
    for queries, keys in ((1, 500), (95, 500), (500, 95)):
        q, k, v = draw((1, 1, 1, queries, keys, 32, 32))
        assert torch.equal(attention(q, k, v, int8=True), attention(q, k, v))
    q, k, v = draw((1, 1, 1, 96, 96, 32, 32))
    assert not torch.equal(attention(q, k, v, int8=True), attention(q, k, v))


def test_the_op_is_the_function():
    q, k, v = draw((1, 2, 1, 100, 120, 32, 32))
    torch.library.opcheck(torch.ops.nybble.attention.default, (q, k, v), {"int8": True, "causal": True})
    got = torch.ops.nybble.attention(q, k, v, causal=True, int8=True)
    assert torch.equal(got, attention8(q, k, v, causal=True))


def test_gradients_are_refused():
    q, k, v = draw((1, 1, 1, 100, 100, 8, 8))
    with pytest.raises(NotImplementedError, match="int8=True"):
        attention(q.requires_grad_(), k, v, int8=True)


def test_a_kernel_of_another_op_is_refused():
    q, k, v = draw((1, 1, 1, 100, 100, 8, 8))
    out = torch.empty_like(q)
    with pytest.raises(ValueError, match='kernel8="attention_scalar": not a kernel of attention8'):
        native.attention(
            "attention_scalar", q, k, v, out, None, None, native.AttentionHow(1.0, int8="attention_scalar")
        )
    with pytest.raises(ValueError, match='kernel="attention8_scalar": not a kernel of attention'):
        native.attention("attention8_scalar", q, k, v, out, None, None, native.AttentionHow(1.0))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_a_chain(batch):
    q, k, v = draw((batch, 4, 2, 300, 300, 16, 24))
    rows = [one.transpose(1, 2).reshape(batch * 300, -1).contiguous() for one in (q, k, v)]
    out = torch.empty(batch * 300, 4 * 24)
    chain = chains.Tensors([*rows, out])
    chain.chain.add_attention(0, 1, 2, 3, 4, 2, 16, 0.25, causal=True, int8=fastest("attention8"))
    chain.run(batch=batch)
    expected = attention8(q, k, v, scale=0.25, causal=True).transpose(1, 2).reshape(batch * 300, -1)
    assert torch.equal(out, expected)
