"""Chains of compiled steps: each step against float64, products bit for bit against separate layers, and schedules."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nybble import native
from nybble.dispatch import targets
from nybble.dispatch.registry import all_specs
from nybble.testing.chains import Tensors, layer

ROWS = [
    pytest.param(
        spec.name,
        marks=pytest.mark.skipif(spec.target not in targets.detect().targets, reason=f"no {spec.target} here"),
    )
    for spec in all_specs()
    if spec.op == "rows"
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff.
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ACTS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
kernels = pytest.mark.parametrize("rows", ROWS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(got: Tensor, right: Tensor, bound: float) -> None:
    """Within the bound, relative to the larger of 1 and the right value, and the rounding of the dtype."""
    error = (got.double() - right).abs() / right.abs().clamp(min=1.0)
    worst = float(error.max())
    assert worst <= bound + EPSILON[got.dtype], f"error {worst:.3g}"


# --- activations


@kernels
@dtypes
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype, rows: str) -> None:
    span = torch.linspace(-12, 12, 4 * 511).view(4, 511)
    x = torch.cat([span, span * 10, span * 1e-3, torch.randn(4, 511)]).to(dtype)
    y = torch.full_like(x, torch.nan)
    chain = Tensors([x, y], rows=rows)
    chain.chain.add_activate(0, 1, act)
    chain.run()
    close(y, ACTS[act](x.double()), 2.0**-20)


@kernels
@pytest.mark.parametrize("act", ACTS)
def test_activations_of_special_values(act: str, rows: str) -> None:
    x = torch.tensor([[-torch.inf, torch.nan, -1e30, 1e30, -3e38, 3e38, -0.0, 0.0, 1e-40, -88.0, -104.0, 88.8]])
    y = torch.empty_like(x)
    chain = Tensors([x, y], rows=rows)
    chain.chain.add_activate(0, 1, act)
    chain.run()
    right = ACTS[act](x.double())
    assert torch.equal(y.isnan(), right.isnan())
    finite = ~right.isnan()
    right = torch.where(right.abs() > 3.4e38, right.sign() * torch.inf, right) if act else right
    assert torch.allclose(y[finite].double(), right[finite], rtol=1e-6, atol=1e-6)


@kernels
@dtypes
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 100, 384])
def test_products_with_another(columns: int, dtype: torch.dtype, rows: str) -> None:
    x, other = random(5, columns, dtype=dtype), random(5, columns, dtype=dtype, seed=1)
    y = torch.empty_like(x)
    chain = Tensors([x, other, y], rows=rows)
    chain.chain.add_activate(0, 2, "silu", other=1)
    chain.run()
    close(y, F.silu(x.double()) * other.double(), 2.0**-20)


# --- norms


def normed(kind: str, total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    total = total.double()
    if kind == "none":
        return total
    if kind == "layer":
        return F.layer_norm(
            total,
            total.shape[-1:],
            None if weight is None else weight.double(),
            None if bias is None else bias.double(),
            eps,
        )
    scaled = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    return scaled if weight is None else scaled * (weight.double() + offset)


@kernels
@dtypes
@pytest.mark.parametrize("columns", [1, 5, 16, 64, 100, 384, 1030])
@pytest.mark.parametrize(("kind", "offset"), [("layer", 0.0), ("rms", 0.0), ("rms", 1.0), ("none", 0.0)])
def test_norms(kind: str, offset: float, columns: int, dtype: torch.dtype, rows: str) -> None:
    for residual, sums, mean in itertools.product([False, True], [False, True], [0.0, 100.0]):
        x, more = random(6, columns, dtype=dtype) + mean, random(6, columns, dtype=dtype, seed=1)
        weight = random(columns, dtype=dtype, seed=2) if kind != "none" else None
        bias = random(columns, seed=3) if kind == "layer" else None
        y, total = torch.empty_like(x), torch.empty_like(x)
        chain = Tensors([x, more, y, total], rows=rows)
        slots = {"residual": 1 if residual else -1, "sum": 3 if sums else -1}
        chain.norm(0, 2, kind, weight, bias, eps=1e-5, weight_offset=offset, **slots)
        chain.run()
        held = x + more if residual else x
        if sums:
            assert torch.equal(total, held)
        right = normed(kind, held, weight, bias, 1e-5, offset)
        # Errors of the sum of float32 values of this size; RMS norms round twice.
        bound = 2.0**-22 * (1 + mean) + (EPSILON[dtype] * 3 if kind == "rms" else 0.0)
        scale = 1.0 if weight is None else max(1.0, float(weight.double().abs().max()) + offset)
        close(y, right, bound * scale)


@kernels
def test_norms_in_place_and_into_the_residual(rows: str) -> None:
    x, more, weight = random(9, 50), random(9, 50, seed=1), random(50, seed=2)
    right = Tensors([x.clone(), more.clone(), torch.empty(9, 50)], rows=rows)
    right.norm(0, 2, "layer", weight, residual=1)
    right.run()
    same = Tensors([x.clone(), more.clone()], rows=rows)
    same.norm(0, 0, "layer", weight, residual=1, sum=1)
    same.run()
    assert torch.equal(same.given[0], right.given[2])
    assert torch.equal(same.given[1], x + more)


@kernels
def test_rows_with_a_nan_or_an_infinity_are_nan(rows: str) -> None:
    x = random(4, 40)
    x[0, 3], x[1, 39], x[2, 0] = torch.nan, torch.inf, -torch.inf
    for kind in ("layer", "rms"):
        y = torch.empty_like(x)
        chain = Tensors([x, y], rows=rows)
        chain.norm(0, 1, kind)
        chain.run()
        assert y[0].isnan().all()
        assert y[3].isfinite().all()
        right = F.layer_norm(x, (40,)) if kind == "layer" else x * x.square().mean(-1, keepdim=True).rsqrt()
        assert torch.equal(y.isnan(), right.isnan())


# --- linear layers


SETS = {
    "w8a8": ["w8a8", "w8a8", "w8a8"],
    "w4a8": ["w4a8g32", "w4a8g32asym", "w4a8g32"],
    "mixed": ["w8a8", "w4a8", "w8a16", "w8a8"],
    "ordered": ["w4a8g32", "w4a8g32order", "w4a8g32asymorder", "w4a16g32order"],
    "w8a16": ["w8a16", "w8a16"],
    "w4a16": ["w4a16g32", "w4a16g32"],
    "sparse": ["sp90w8a8", "sp50w8a8", "w8a8"],
    "blocks": ["bs16x4w8a8", "w8a7"],
}


@dtypes
@pytest.mark.parametrize("m", [1, 3, 12, 13, 70, 201])
@pytest.mark.parametrize("schemes", SETS.values(), ids=list(SETS))
def test_products_have_the_bits_of_separate_layers(schemes: list[str], m: int, dtype: torch.dtype) -> None:
    k = 96
    layers = [layer(scheme, n, k, bias=n != 65, seed=n) for scheme, n in zip(schemes, (33, 192, 65, 16), strict=False)]
    x = random(m, k, dtype=dtype)
    for threads in (1, 2, 3):
        outs = [torch.full((m, one.out_features), torch.nan, dtype=dtype) for one in layers]
        chain = Tensors([x, *outs])
        chain.linears(0, [chain.weight(one, i + 1) for i, one in enumerate(layers)])
        chain.run(threads)
        for one, out in zip(layers, outs, strict=True):
            assert torch.equal(out, one(x)), (one.scheme, threads)


@pytest.mark.parametrize("schemes", [SETS[name] for name in ("w8a8", "mixed", "w4a8", "ordered")])
@pytest.mark.parametrize("keeps", [False, True], ids=["the norm's result is not kept", "kept"])
def test_norm_before(schemes: list[str], keeps: bool) -> None:
    m, k = 37, 70
    layers = [layer(scheme, 40 + i, k, seed=i) for i, scheme in enumerate(schemes)]
    x, more, weight, bias = random(m, k), random(m, k, seed=1), random(k, seed=2), random(k, seed=3)
    total, kept = torch.empty(m, k), torch.empty(m, k)
    first = Tensors([x, more, kept])
    first.norm(0, 2, "layer", weight, bias, residual=1)
    first.run()
    right = kept.clone()
    kept.fill_(torch.nan)
    for threads in (1, 2):
        outs = [torch.empty(m, one.out_features) for one in layers]
        chain = Tensors([x, more, total, kept, *outs])
        weights = [chain.weight(one, 4 + i) for i, one in enumerate(layers)]
        slots = {"residual": 1, "sum": 2, "normed": 3 if keeps else -1}
        chain.linears(0, weights, norm=("layer", weight, bias, 1e-5), **slots)
        chain.run(threads)
        assert torch.equal(total, x + more)
        assert not keeps or torch.equal(kept, right)
        for one, out in zip(layers, outs, strict=True):
            assert torch.equal(out, one(right))


@dtypes
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "sp90w8a8", "bs16x4w8a8"])
@pytest.mark.parametrize("m", [1, 30, 200])
def test_what_follows_a_product(m: int, scheme: str, dtype: torch.dtype) -> None:
    k, n = 96, 208
    one, x = layer(scheme, n, k), random(m, k, dtype=dtype)
    other, residual = random(m, n, dtype=dtype, seed=1), random(m, n, dtype=dtype, seed=2)
    product = one(x).detach()
    for act, times, plus in itertools.product(["", "gelu", "silu"], [False, True], [False, True]):
        y = torch.empty(m, n, dtype=dtype)
        chain = Tensors([x, other, residual, y])
        chain.linears(0, [chain.weight(one, 3, act, other=1 if times else -1, residual=2 if plus else -1)])
        chain.run()
        right = ACTS[act](product.double()) * (other.double() if times else 1.0) + (residual.double() if plus else 0.0)
        close(y, right, 2.0**-19)


@pytest.mark.parametrize("schemes", [("w8a8", "w8a8"), ("w4a8g32", "w4a8g32"), ("w4a8g32", "w8a8"), ("w8a8", "w4a16")])
@pytest.mark.parametrize("m", [1, 12, 200])
def test_a_weight_may_follow_another(m: int, schemes: tuple[str, str]) -> None:
    up, gate, last = layer(schemes[0], 144, 64), layer(schemes[1], 144, 64, seed=1), layer(schemes[0], 144, 64, seed=2)
    x = random(m, 64)
    first, second, third = (torch.empty(m, 144) for _ in range(3))
    for threads in (1, 2):
        chain = Tensors([x, first, second, third])
        weights = [chain.weight(up, 1), chain.weight(gate, 2, "silu", other=1)]
        chain.linears(0, [*weights, chain.weight(last, 3, other=1, residual=2)])
        chain.run(threads)
        assert torch.equal(first, up(x))
        close(second, (F.silu(gate(x).double()) * up(x).double()).detach(), 2.0**-20)
        close(third, (last(x).double() * first.double() + second.double()).detach(), 2.0**-22)


# --- rotary positions


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        swapped = torch.cat((-b, a), -1)
    return x * cos + swapped * sin


@kernels
@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "part"), [(32, 32), (64, 64), (40, 24), (6, 6), (128, 64)])
def test_rotary_positions(head_dim: int, part: int, interleaved: bool, dtype: torch.dtype, rows: str) -> None:
    batch, length, heads = 2, 7, 3
    x = random(batch * length, heads * head_dim + 5, dtype=dtype)
    weight = random(head_dim, dtype=dtype, seed=3)
    for with_norm, repeated in itertools.product([False, True], [False, True]):
        angles = random(1 if repeated else batch, 1, length, part, seed=1, scale=3.0)
        cos, sin = angles.cos(), angles.sin()
        y, again = torch.empty(batch * length, heads * head_dim, dtype=dtype), x.clone()
        chain = Tensors([x, y, again], rows=rows)
        norm = (chain.vector(weight), 1e-6, 0.0) if with_norm else None
        more = {"offset": 5, "cos": 0, "sin": 1, "interleaved": interleaved, "norm": norm}
        chain.chain.add_rotate(0, 1, heads, **more)
        chain.chain.add_rotate(2, 2, heads, head_dim=head_dim, **more)
        chain.run(batch=batch, tables=[cos, sin])
        head = x[:, 5:].double().view(batch, length, heads, head_dim)
        if with_norm:
            head = normed("rms", head, weight, None, 1e-6, 0.0)
        turned = rotated(head[..., :part], *(t.double().view(-1, length, 1, part) for t in (cos, sin)), interleaved)
        right = torch.cat((turned, head[..., part:]), -1).view(y.shape)
        close(y, right, 2.0**-20 + (4 * EPSILON[dtype] * float(right.abs().max()) if with_norm else 0.0))
        assert torch.equal(again[:, 5:], y)
        assert torch.equal(again[:, :5], x[:, :5])


# --- attention


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Of (batch, heads, tokens, dim), bottom-right aligned."""
    score = q.double() @ k.double().mT * 0.3
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else score + mask.double()
    if causal:
        seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril(score.shape[-1] - score.shape[-2])
        score = score.masked_fill(~seen, -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v.double()


@dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 12), (5, 7), (9, 40), (2, 130)])
@pytest.mark.parametrize("masked", ["", "bool", "float"])
def test_attention(masked: str, batch: int, length: int, causal: bool, dtype: torch.dtype) -> None:
    heads, shared, dim = 4, 2, 16
    x = random(batch * length, 8 * dim, dtype=dtype)
    mask = None
    if masked:
        mask = torch.arange(length) < torch.arange(1, batch + 1)[:, None] * length // batch
        mask = mask[:, None, None, :]
        if masked == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q, k, v = x.view(batch, length, 8, dim).transpose(1, 2).split([heads, shared, shared], 1)
    right = attended(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, causal)
    right = right.transpose(1, 2).reshape(batch * length, heads * dim)
    results = []
    for threads in (1, 2):
        y = torch.full((batch * length, heads * dim), torch.nan, dtype=dtype)
        chain = Tensors([x, y])
        offsets = {"k_offset": heads * dim, "v_offset": (heads + shared) * dim}
        options = {"causal": causal, "mask": 0 if masked else -1, **offsets}
        chain.chain.add_attention(0, 0, 0, 1, heads, shared, dim, 0.3, **options)
        chain.run(threads, batch, [mask])
        close(y, right, 2.0**-18)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("queries", [1, 30])
def test_attention_with_a_cache(queries: int, batch: int) -> None:
    heads, shared, dim, keys = 4, 2, 16, 50
    x, y = random(batch * queries, heads * dim), torch.empty(batch * queries, heads * dim)
    k, v = random(batch, shared, 64, dim, seed=1)[:, :, :keys], random(batch, shared, 64, dim, seed=2)[:, :, :keys]
    chain = Tensors([x, y])
    chain.chain.add_attention(0, 0, 1, 1, heads, shared, dim, 0.3, causal=True, cached=True)
    chain.run(batch=batch, tables=[k, v])
    q = x.view(batch, queries, heads, dim).transpose(1, 2)
    right = attended(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, True)
    close(y, right.transpose(1, 2).reshape(y.shape), 2.0**-18)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("queries", [1, 30])
def test_attention_with_a_cache_in_8_bits(queries: int, batch: int) -> None:
    heads, shared, dim, keys = 4, 2, 16, 50
    x, y = random(batch * queries, heads * dim), torch.empty(batch * queries, heads * dim)
    held = [random(batch, shared, 64, dim, seed=seed)[:, :, :keys] for seed in (1, 2)]
    scales = [one.abs().amax(-1, keepdim=True) / 127 for one in held]
    codes = [(one / scale).round().to(torch.int8) for one, scale in zip(held, scales, strict=True)]
    chain = Tensors([x, y])
    chain.chain.add_attention(0, 0, 1, 1, heads, shared, dim, 0.3, causal=True, cached=True, k_scale=2, v_scale=3)
    q = x.view(batch, queries, heads, dim).transpose(1, 2)
    stands_for = [code * scale for code, scale in zip(codes, scales, strict=True)]
    for tables, (k, v) in (([*codes, *scales], stands_for), ([*held, None, None], held)):
        chain.run(batch=batch, tables=tables)
        right = attended(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, True)
        close(y, right.transpose(1, 2).reshape(y.shape), 2.0**-18)
    with pytest.raises(ValueError, match="k: has dtype code"):
        chain.run(batch=batch, tables=[*codes, None, None])
    with pytest.raises(ValueError, match="k: has dtype code"):
        chain.run(batch=batch, tables=[*held, *scales])
    with pytest.raises(ValueError, match="v_scale"):
        chain.run(batch=batch, tables=[*codes, scales[0], scales[1][:, :, 1:]])


# --- whole chains


def block(x: Tensor, hidden: int = 64, scheme: str = "w8a8") -> tuple[Tensors, Tensor]:
    """Norm, two linear layers with an activation and the residual, twice; the last norm's result is the output."""
    out = torch.full_like(x, torch.nan)
    chain = Tensors([x, out], [hidden, 4 * hidden, hidden, hidden, hidden])
    here = 0
    for i in range(2):
        up, down = layer(scheme, 4 * hidden, hidden, seed=i), layer(scheme, hidden, 4 * hidden, seed=i + 9)
        weight, bias = random(hidden, seed=i), random(hidden, seed=i + 5)
        chain.linears(here, [chain.weight(up, 3, "gelu")], norm=("layer", weight, bias, 1e-5), normed=2)
        chain.linears(3, [chain.weight(down, 4, residual=here)])
        chain.norm(4, 5 + i, "rms", weight, residual=2)
        here = 5 + i
    chain.norm(here, 1, "none", residual=0)
    return chain, out


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "w8a16"])
@pytest.mark.parametrize("m", [1, 5, 47, 96, 200, 401])
def test_schedules_do_not_change_a_bit(m: int, scheme: str) -> None:
    x = random(m, 64)
    chain, out = block(x, scheme=scheme)
    results = []
    for threads in (1, 2, 3):
        out.fill_(torch.nan)
        chain.run(threads)
        results.append(out.clone())
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])
    if scheme != "w8a16" and m > 5:  # the same rows alone
        few, out = block(x[:5].clone(), scheme=scheme)
        few.run()
        assert torch.equal(out, results[0][:5])


def encoder(x: Tensor) -> tuple[Tensors, Tensor]:
    """Two layers of an encoder with the norm after each sum."""
    hidden, heads = 64, 4
    out = torch.full_like(x, torch.nan)
    chain = Tensors([x, out], [hidden] * 6 + [4 * hidden])
    here = 0
    for i in range(2):
        weight, bias = random(hidden, seed=i), random(hidden, seed=i + 5)
        three = [layer("w8a8", hidden, hidden, seed=i + j) for j in range(4)]
        up, down = layer("w8a8", 4 * hidden, hidden, seed=i), layer("w8a8", hidden, 4 * hidden, seed=i)
        chain.linears(here, [chain.weight(one, 2 + j) for j, one in enumerate(three[:3])])
        chain.chain.add_attention(2, 3, 4, 5, heads, heads, hidden // heads, 0.25, causal=False)
        chain.linears(5, [chain.weight(three[3], 2, residual=here)])
        chain.linears(2, [chain.weight(up, 8, "gelu")], norm=("layer", weight, bias, 1e-5), normed=3)
        chain.linears(8, [chain.weight(down, 4, residual=3)])
        here = 1 if i else 6
        chain.norm(4, here, "layer", weight, bias)
    return chain, out


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (1, 130), (3, 40), (7, 24), (16, 3), (2, 200)])
def test_schedules_of_an_encoder(batch: int, length: int) -> None:
    x = random(batch * length, 64)
    results = []
    for threads in (1, 2, 3):
        chain, out = encoder(x)
        chain.run(threads, batch)
        results.append(out)
    for i in range(batch):  # each sequence alone
        chain, out = encoder(x[i * length : (i + 1) * length].clone())
        chain.run()
        results.append(torch.cat((results[0][: i * length], out, results[0][(i + 1) * length :])))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert results[0].isfinite().all()


@pytest.mark.parametrize("m", [3, 150])
def test_what_a_step_writes_does_not_lie_where_it_reads(m: int) -> None:
    one, x = layer("w8a8", 64, 64), random(m, 64)
    y, total = torch.empty(m, 64), torch.empty(m, 64)
    chain = Tensors([x, y, total], [64, 64, 64])
    chain.chain.add_activate(0, 3, "relu")
    chain.linears(0, [chain.weight(one, 4, residual=3)])
    chain.norm(4, 5, "layer")
    chain.norm(5, 1, "none", residual=4)
    chain.norm(4, 2, "none")
    chain.run()
    assert torch.equal(total, one(x) + x.relu())
    close(y, F.layer_norm(total, (64,)).double() + total.double(), 2.0**-20)


def test_a_chain_may_run_in_several_threads_at_once() -> None:
    x = random(150, 64)
    chain, out = encoder(x)
    chain.run()
    outs = [torch.full_like(out, torch.nan) for _ in range(4)]

    def run(y: Tensor) -> None:
        external = [(*native.memory(tensor), 64) for tensor in (x, y)]
        for batch, length in ((3, 50), (1, 150)) * 10:
            chain.chain.run(batch, length, external, [], 2)

    threads = [threading.Thread(target=run, args=(y,)) for y in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, out) for y in outs)


def test_nothing_beside_the_outputs_is_written() -> None:
    m, held = 150, torch.full((160, 64), 7.0)
    x, out = random(m, 64), held[5 : 5 + m]
    chain = Tensors([x, out])
    one = layer("w8a8", 64, 64)
    chain.linears(0, [chain.weight(one, 1, "relu")])
    chain.run()
    assert (held[:5] == 7).all()
    assert (held[5 + m :] == 7).all()
    assert torch.equal(out, one(x).relu())


def test_no_rows() -> None:
    chain, out = block(torch.empty(0, 64))
    chain.run()
    assert out.shape == (0, 64)


def test_external_matrices_may_have_gaps() -> None:
    wide, out = random(20, 100), torch.zeros(20, 90)
    chain = Tensors([wide[:, 3:67], out[:, :64]])
    chain.norm(0, 1, "rms")
    chain.run()
    assert (out[:, 64:] == 0).all()
    close(out[:, :64], normed("rms", wide[:, 3:67], None, None, 1e-5, 0.0), 2.0**-22)


# --- what is refused


def two() -> Tensors:
    return Tensors([torch.zeros(4, 64), torch.zeros(4, 32)], [64, 32])


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda c: c.norm(0, 1, "layer"), "y=1: the slot has 32 columns, must have 64"),
        (lambda c: c.norm(0, 9, "layer"), "y=9: must be a slot, 0 to 3"),
        (lambda c: c.norm(0, 2, "group"), 'kind="group": must be one of "none", "layer", "rms"'),
        (lambda c: c.norm(2, 0, "layer"), r"step 0 \(norm\): reads slot 2, which no step before it writes"),
        (lambda c: c.norm(0, 2, "layer", torch.ones(63)), "weight: has 252 bytes, needs 256"),
        (lambda c: c.norm(0, 2, "rms", eps=-1.0), "eps: must be finite and not negative"),
        (lambda c: c.norm(0, 2, "rms", None, torch.ones(64)), "bias: only layer norms have one"),
        (lambda c: c.norm(0, 2, "layer", sum=2), "sum=2: must not be y"),
        (lambda c: c.chain.add_activate(0, 2, "mish"), 'act="mish": must be one of "", "gelu"'),
        (lambda c: c.linears(0, [c.weight(layer("w8a8", 30, 64), 1)]), "y=1: the slot has 32 columns, must have 30"),
        (lambda c: c.linears(1, [c.weight(layer("w8a8", 32, 64), 3)]), "x=1: the slot has 32 columns, must have 64"),
        (lambda c: c.linears(0, []), "weights: must be 1 to 8"),
        (lambda c: c.linears(0, [c.weight(layer("w8a8", 32, 64), 1, other=1)]), "y=1: only later weights"),
        (
            lambda c: c.linears(0, [c.weight(layer("w8a8", 32, 64), 1), c.weight(layer("w8a8", 32, 48), 3)]),
            r"weights\[1\]: has 48 inputs, the first weight has 64",
        ),
        (lambda c: c.chain.add_rotate(0, 2, 3, cos=0, sin=0, interleaved=False, offset=9), "offset=9"),
        (lambda c: c.chain.add_rotate(0, 2, 2, cos=-1, sin=0, interleaved=False), "cos, sin: must be indexes"),
        (
            lambda c: c.chain.add_attention(0, 0, 0, 1, 4, 4, 16, 1.0, causal=False, k_offset=1),
            "k_offset=1: 64 columns",
        ),
        (lambda c: c.chain.add_attention(0, 0, 0, 0, 4, 4, 16, 1.0, causal=False), "y=0: must not be another slot"),
        (lambda c: c.chain.add_attention(0, 0, 0, 1, 4, 3, 16, 1.0, causal=False), "heads=4: must be a multiple of"),
    ],
)
def test_steps_that_do_not_fit_are_refused(add, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(two())


def test_runs_that_do_not_fit_are_refused() -> None:
    chain = two()
    chain.linears(0, [chain.weight(layer("w8a8", 32, 64), 1)])
    good = [(*native.memory(tensor), tensor.stride(0)) for tensor in chain.given]
    for external, message in (
        (good[:1], "external: has 1 matrices, must have 2"),
        ([(*good[0][:2], 63), good[1]], r"external\[0\]: stride=63"),
        ([(good[0][0], 100, 64), good[1]], r"external\[0\]: has 100 bytes, needs 1024"),
        ([good[0], (good[1][0], 10**6, 40)], r"step 0 \(linears\): y=1: has a row stride of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            chain.chain.run(1, 4, external, [], 2)
    with pytest.raises(ValueError, match="batch, length"):
        chain.chain.run(-1, 4, good, [], 2)
    turning = two()
    turning.chain.add_rotate(0, 0, 2, head_dim=32, cos=0, sin=1, interleaved=False)
    for tables, message in (
        ([], "cos=0: this run has no such table"),
        ([torch.zeros(1, 1, 5, 32)] * 2, r"cos: has size \(1, 1, 5, ...\)"),
        ([torch.zeros(1, 1, 4, 34)] * 2, "cos: turns 34 elements of a head of 32"),
        ([torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 4, 16)], "sin: must turn as much as cos"),
    ):
        with pytest.raises(ValueError, match=message):
            turning.run(tables=tables)
