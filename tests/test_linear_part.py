"""Some outputs of a layer: the bits of the whole, whatever the layout, and their gradients."""

import pytest
import torch
from torch import nn

import nybble
from nybble import ops
from nybble.dispatch.selection import part_plan
from nybble.nn import Linear, SparseLinear

SCHEMES = ("w8a8", "w8a16", "w4a8g32asym", "w4a16g64", "w8a8static", "w8a7")
N, K = 150, 130
PARTS = ((0, 150), (0, 48), (48, 150), (112, 128), (144, 145), (7, 20))


def layer_of(scheme, bias=True):
    torch.manual_seed(0)
    dense = nn.Linear(K, N, bias)
    if scheme.startswith("sp"):
        keep = torch.rand(N, K) < 0.5
        with torch.no_grad():
            dense.weight *= keep
        return SparseLinear.from_dense(dense, scheme)
    static = {"act_range": (-4.0, 4.0)} if scheme.endswith("static") else {}
    return Linear.from_dense(dense, scheme, **static)


@pytest.mark.parametrize("scheme", [*SCHEMES, "sp50w8a8"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_part_has_the_bits_of_the_whole(scheme, bias):
    layer = layer_of(scheme, bias)
    for x in (torch.randn(1, K), torch.randn(2, 17, K), torch.randn(64, 2 * K)[:, ::2], torch.randn(0, K)):
        whole = layer(x)
        for begin, end in PARTS:
            found, wanted = layer.part(x, begin, end), whole[..., begin:end]
            if "a16" in scheme:  # kernels of floats add a single last column in another order
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
            else:
                assert torch.equal(found, wanted), (begin, end, x.shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_part_is_computed(scheme):
    layer = layer_of(scheme)
    layer.pack()
    plan = part_plan(scheme, layer.layout, (N, K), torch.float32, 4, (48, 64))
    assert plan.compiled is not None
    assert part_plan(scheme, layer.layout, (N, K), torch.float32, 4, (47, 64)) is None
    with torch.no_grad():
        x = torch.randn(4, K)
        wanted = layer(x)[:, 48:64]
        # The weight of all other outputs is damaged.
        codes = layer.quantized()
        for name in ("qweight", "scale"):
            part = getattr(codes, name)
            part[:48], part[64:] = 1, 1
        other = Linear.from_quantized(codes, K, layer.bias, layer.scheme, layer.dtype, layer.act())
        assert torch.equal(other.part(x, 48, 64), wanted)
        with pytest.raises(ValueError, match="packed"):
            plan(x, layer.packed[: len(layer.packed) // 2].contiguous(), None, torch.empty(4, 16))


def test_gradients_and_the_op():
    layer = layer_of("w8a8")
    x = torch.randn(5, K, requires_grad=True)
    wanted = torch.autograd.grad(layer(x)[:, 48:96].square().sum(), (x, layer.bias))
    found = torch.autograd.grad(layer.part(x, 48, 96).square().sum(), (x, layer.bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    args = (x, layer.packed, layer.bias, "w8a8", layer.layout, N, K, 48, 96)
    torch.library.opcheck(torch.ops.nybble.linear_part.default, args)
    for wrong in ((-1, 4), (4, 4), (0, N + 1)):
        with pytest.raises(ValueError, match=f"begin={wrong[0]}, end={wrong[1]}"):
            ops.linear_part(*args[:7], *wrong)


def test_on_meta_and_under_autocast():
    layer = Linear(K, N, device="meta")
    assert layer.part(torch.empty(3, K, device="meta"), 16, 48).shape == (3, 32)
    layer = layer_of("w8a8")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, K)
        assert torch.equal(layer.part(x, 16, 48), layer(x)[:, 16:48])


@torch.no_grad()
def test_cross_attention_multiplies_each_part_once(monkeypatch):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    query, keys, values = torch.randn(2, 5, 64), torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    model = nn.Sequential(dense)
    wanted = [dense(query, keys, one, need_weights=False)[0] for one in (keys, values)]
    nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    parts, part = [], Linear.part
    monkeypatch.setattr(Linear, "part", lambda self, x, *rows: (parts.append(rows), part(self, x, *rows))[1])
    for one, exact in zip((keys, values), wanted, strict=True):
        found = model[0](query, keys, one, need_weights=False)[0]
        assert (found - exact).norm() < 0.02 * exact.norm()
    assert parts == [(0, 64), (64, 192), (0, 64), (64, 128), (128, 192)]
    model[0].in_proj.register_forward_hook(lambda *_: None)
    assert torch.allclose(model[0](query, keys, values, need_weights=False)[0], found, atol=1e-6)
    assert len(parts) == 5
