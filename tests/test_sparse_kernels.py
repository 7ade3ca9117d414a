"""Sparse kernels against the dense ones on the weight with its zeros, and how sparse weights lie packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble import native
from nybble.dispatch import reference, targets
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import KernelSpec
from nybble.layouts.packed import padded_in_features
from nybble.testing.oracle import error_bound, pack_for, random_weight, run, run_into
from nybble.weights.rounding import QuantizedWeight, pack_nibbles, unpack_nibbles
from nybble.weights.scheme import Scheme
from nybble.weights.sparsity import Block

SPARSE = [spec for spec in specs() if spec.scheme.startswith(("sp", "bs")) and spec.target in targets.detect().targets]
COMPILED = [spec for spec in SPARSE if spec.target != "torch"]
INTEGER = [spec for spec in COMPILED if spec.exact]
EIGHT = [spec for spec in INTEGER if spec.scheme.endswith("w8a8")]
DENSE = {spec.name: spec for spec in specs()}
LAYOUTS = ("mask8", "mask4", "gather8", "blocks8")
# Rows around what the kernels of the mask layout multiply at a time: two blocks of 12 or 8, then lines are made.
ROWS = (0, 1, 2, 8, 12, 13, 16, 17, 24, 25, 67)


def by(found: list[KernelSpec]):
    return pytest.mark.parametrize("spec", found, ids=lambda spec: spec.name)


def schemes(spec: KernelSpec) -> list[Scheme]:
    family = spec.scheme[2:]
    if spec.scheme.startswith("bs"):
        return [Scheme.parse(name + family) for name in ("bs16x4", "bs32x32", "bs48x64", "bs128x128")]
    groups = ("", "g32", "g64", "g128") if "w4" in family else ("",)
    names = ("sp10", "sp24", "sp90") if groups == ("",) else ("sp24", "sp90")
    return [Scheme.parse(name + family + group) for name in names for group in groups]


def scheme_of(layout: str, sparsity: str = "sp70", group: str = "") -> Scheme:
    if layout == "blocks8":
        return Scheme.parse("bs32x32w8a8")
    return Scheme.parse(f"{sparsity}w4a8{group}" if layout == "mask4" else f"{sparsity}w8a8")


def dense_spec(scheme: Scheme) -> KernelSpec:
    return DENSE[f"{scheme.dense.family}_scalar"]


def activations(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(m, k) * torch.exp2(torch.randint(-5, 6, (m, 1)))).to(dtype)


def codes_of(quantized: QuantizedWeight, scheme: Scheme, k: int) -> Tensor:
    """int (N, K), 0 where a weight is zero."""
    if scheme.weight_bits == 8:
        return quantized.qweight.int()
    return unpack_nibbles(quantized.qweight, k).int() - 8


def with_codes(quantized: QuantizedWeight, scheme: Scheme, codes: Tensor) -> QuantizedWeight:
    qweight = codes.to(torch.int8) if scheme.weight_bits == 8 else pack_nibbles((codes + 8).to(torch.uint8))
    return QuantizedWeight(qweight, quantized.scale)


def agrees(spec: KernelSpec, quantized: QuantizedWeight, scheme: Scheme, x: Tensor, bias: Tensor | None = None) -> None:
    """Bit for bit with the dense kernel in plain C++ where accumulators are integers, else within the bound."""
    got = run(spec, quantized, scheme, x, bias)
    if spec.exact:
        assert torch.equal(got, run(dense_spec(scheme), quantized, scheme.dense, x, bias))
        return
    expected = reference.linear(x, quantized, bias, scheme.dense, torch.float64)
    assert ((got.double() - expected).abs() <= error_bound(x, quantized, scheme, expected, x.dtype)).all()


# --- the same numbers as a dense weight


@by(COMPILED)
def test_as_the_dense_kernel_on_the_weight_with_its_zeros(spec: KernelSpec) -> None:
    for scheme in schemes(spec):
        for n, k in ((1, 1), (33, 70), (70, 333)):
            quantized, bias = random_weight(scheme, n, k, seed=n), torch.randn(n)
            for m in ROWS if n == 33 else (3, 30):
                agrees(spec, quantized, scheme, activations(m, k, spec.act_dtypes[0]), bias.to(spec.act_dtypes[0]))


@by(EIGHT)
def test_accumulators_are_those_of_the_dense_kernel(spec: KernelSpec) -> None:
    for scheme in schemes(spec):
        for m, n, k in ((5, 33, 70), (30, 17, 1000), (70, 50, 129)):
            quantized, x = random_weight(scheme, n, k), torch.randint(-128, 128, (m, k)).float()
            x[:, :1], x[:, -1:] = -128, 127
            out = torch.full((m, n), 0x55555555, dtype=torch.int32)
            run_into(spec, quantized, scheme, x, None, out)
            assert torch.equal(out.double(), x.double() @ quantized.qweight.double().t()), (str(scheme), m, n, k)


@by(EIGHT)
def test_accumulators_at_the_extremes_of_the_longest_k(spec: KernelSpec) -> None:
    scheme = schemes(spec)[-1]
    k = scheme.max_in_features
    quantized = random_weight(scheme, 2, k)
    quantized.qweight[0], quantized.qweight[1] = 127, -127
    x = torch.full((1, k), -128.0)
    x[0, 7] = 127
    out = torch.zeros((1, 2), dtype=torch.int32)
    run_into(spec, quantized, scheme, x, None, out)
    assert out.tolist() == [[sign * 127 * (-128 * (k - 1) + 127) for sign in (1, -1)]]


@by(COMPILED)
@pytest.mark.parametrize("kind", ["nothing", "everything", "empty-rows", "one-row", "one-column", "last-only"])
def test_weights_without_zeros_and_without_anything_else(spec: KernelSpec, kind: str) -> None:
    scheme, n, k = schemes(spec)[0], 37, 200
    codes = torch.randint(1, 7, (n, k))
    rows, columns = torch.arange(n)[:, None], torch.arange(k)
    kept = {
        "nothing": rows < 0,
        "everything": rows >= 0,
        "empty-rows": rows % 3 == 1,
        "one-row": rows == 20,
        "one-column": columns == 131,
        "last-only": (rows == n - 1) & (columns == k - 1),
    }[kind]
    quantized = with_codes(random_weight(scheme, n, k), scheme, codes * kept)
    for m in (0, 1, 24, 25, 67):
        x = activations(m, k, spec.act_dtypes[0])
        agrees(spec, quantized, scheme, x, torch.randn(n).to(x.dtype))
        if kind == "nothing":
            assert (run(spec, quantized, scheme, x) == 0).all()


@by(COMPILED)
def test_thread_count_changes_no_bit(spec: KernelSpec, threads) -> None:
    scheme = schemes(spec)[-1]
    for m, n, k in ((1, 700, 300), (61, 260, 136)):
        quantized, x = random_weight(scheme, n, k), activations(m, k, spec.act_dtypes[0])
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append((pack_for(spec, quantized, scheme, k), run(spec, quantized, scheme, x)))
        assert not torch.isnan(results[0][1]).any(), "an output was not written"
        for packed, out in results[1:]:
            assert torch.equal(packed, results[0][0]), "the packed weight"
            assert torch.equal(out, results[0][1]), (m, n, k)


# --- gather8: columns in another order


def uneven(n: int, k: int) -> QuantizedWeight:
    """Full rows and nearly empty ones by turns."""
    quantized = random_weight(Scheme.parse("w8a8"), n, k)
    thin = (torch.arange(n)[:, None] % 2 == 1) & (torch.rand(n, k) < 0.97)
    return QuantizedWeight(quantized.qweight * ~thin, quantized.scale)


def is_reordered(packed: Tensor, n: int) -> bool:
    return bool(packed[: 8 * (-(-n // 16) + 2)].view(torch.int64)[-1])


@by([spec for spec in EIGHT if spec.layout == "gather8"])
@pytest.mark.parametrize("n", [32, 61, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_differ_in_density_are_reordered(spec: KernelSpec, n: int, dtype: torch.dtype) -> None:
    k, scheme = 320, Scheme.parse("sp65w8a8")
    quantized, even = uneven(n, k), random_weight(Scheme.parse("sp32of64w8a8"), n, k)
    assert is_reordered(pack_for(spec, quantized, scheme, k), n)
    assert not is_reordered(pack_for(spec, even, scheme, k), n)
    for m in (1, 16, 17, 40):
        for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
            agrees(spec, quantized, scheme, activations(m, k, dtype), bias)
    out = torch.full((5, n), 0x55555555, dtype=torch.int32)
    x = torch.randint(-128, 128, (5, k)).float()
    x[:, 0], x[:, 1] = -128, 127
    run_into(spec, quantized, scheme, x, None, out)
    assert torch.equal(out.double(), x.double() @ quantized.qweight.double().t())
    restored = native.unpack(pack_for(spec, quantized, scheme, k), scheme, n, k, "gather8")
    assert torch.equal(restored.qweight, quantized.qweight)
    assert torch.equal(restored.scale, quantized.scale)


# --- how it lies: csrc/pack.h, counted


def aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def expected_bytes(layout: str, quantized: QuantizedWeight, scheme: Scheme, k: int) -> int:
    codes = codes_of(quantized, scheme, k)
    n = len(codes)
    tiles, eight = -(-n // 16), scheme.weight_bits == 8
    if layout == "blocks8":
        assert isinstance(scheme.sparsity, Block)
        r, c = scheme.sparsity.rows, scheme.sparsity.columns
        padded = torch.zeros(-(-n // r) * r, -(-k // c) * c, dtype=torch.int32)
        padded[:n, :k] = codes
        strips = len(padded) // r
        blocks = int(padded.view(strips, r, -1, c).transpose(1, 2).flatten(2).any(-1).sum())
        fixed = aligned(8 * (strips + 1)) + 2 * aligned(4 * len(padded))
        return fixed + aligned(4 * blocks) + blocks * r * c
    dense = "n16k4" if eight else "n16k8"
    k_padded = padded_in_features(dense, scheme.dense, k)
    scales = aligned(tiles * 16 * (4 if eight else 2 * (k_padded // (scheme.group_size or k_padded))))
    fixed = aligned(8 * (tiles + 1)) + scales + aligned(tiles * 64)
    ks, planes = (4, 1) if eight else (8, 2)
    lines = k_padded // ks
    padded = torch.zeros(tiles * 16, -(-lines // 8) * 8 * ks, dtype=torch.bool)
    padded[:n, :k] = codes != 0
    eights = padded.view(tiles, 16, -1, 8, planes, 4)  # lines whose masks stand together, nibbles low and high
    values = eights.sum((1, 3, 5)).amax(-1)
    return fixed + int(values.sum()) + values.numel() * 64 * planes + 64


def steps_of(kept: Tensor) -> int:
    """Steps of 16 columns, bool (16, K): each takes up to eight weights a column from 128 ks where the last is."""
    k_padded = max(128, -(-kept.shape[1] // 64) * 64)
    left = [row.nonzero().flatten().tolist() for row in kept]
    steps = 0
    while any(left):
        window = min(min(ks[0] for ks in left if ks) // 64 * 64, k_padded - 128)
        left = [ks[sum(k < window + 128 for k in ks[:8]) :] for ks in left]
        steps += 1
    return steps


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "gather8"])
@pytest.mark.parametrize("sparsity", ["sp24", "sp50", "sp90"])
@pytest.mark.parametrize("group", ["", "g32", "g128"])
def test_packed_bytes_are_what_the_header_says(layout: str, sparsity: str, group: str) -> None:
    scheme = scheme_of(layout, sparsity, group)
    for n, k in ((1, 1), (33, 70), (64, 128), (50, 333)):
        quantized = random_weight(scheme, n, k)
        packed = native.pack(quantized, scheme, k, layout)
        assert packed.numel() == expected_bytes(layout, quantized, scheme, k), (n, k)


@pytest.mark.parametrize("sparsity", ["sp24", "sp65", "sp90"])
def test_bytes_of_the_gather_layout(sparsity: str) -> None:
    scheme = scheme_of("gather8", sparsity)
    for n, k in ((1, 1), (33, 70), (64, 128), (50, 333)):
        quantized = random_weight(scheme, n, k)
        packed, tiles = native.pack(quantized, scheme, k, "gather8"), -(-n // 16)
        kept = torch.zeros(tiles * 16, k, dtype=torch.bool)
        kept[:n] = quantized.qweight != 0
        at = aligned(8 * (tiles + 2)) + 2 * aligned(64 * tiles)  # after start, scale and sum
        order = packed[at : at + 64 * tiles].view(torch.int32).long()
        assert torch.equal(order.sort().values, torch.arange(tiles * 16))
        assert is_reordered(packed, n) or torch.equal(order, torch.arange(tiles * 16))
        steps = sum(steps_of(tile) for tile in kept[order].view(tiles, 16, k))
        assert packed.numel() == at + aligned(64 * tiles) + aligned(2 * steps) + 256 * steps, (n, k)


@pytest.mark.parametrize("name", ["sp70w8a8", "sp70w4a8", "sp70w4a16g32"])
def test_a_stored_zero_is_a_zero(name: str) -> None:
    scheme, n, k = Scheme.parse(name), 21, 75
    quantized = random_weight(scheme, n, k)
    mask, values = native.to_bitmask(quantized.qweight, scheme, k)
    codes = codes_of(quantized, scheme, k)
    keeps = (codes != 0) | (torch.rand(n, k) < 0.2)  # more than has to be
    bits = torch.nn.functional.pad(keeps, (0, -k % 8)).view(n, -1, 8)
    wider = (bits * (1 << torch.arange(8))).sum(-1, dtype=torch.uint8)
    stored = codes[keeps]
    held = stored.to(torch.int8) if scheme.weight_bits == 8 else pack_nibbles((stored + 8).to(torch.uint8)[None])[0]
    assert len(held) > len(values)
    for of in ((mask, values), (wider, held)):
        assert torch.equal(native.from_bitmask(*of, scheme, n, k), quantized.qweight)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 300), st.floats(0, 1), st.sampled_from(["", "g32", "g64", "g128"]), st.data())
def test_unpacking_is_the_exact_inverse(layout: str, n: int, k: int, density: float, group: str, data) -> None:
    block = data.draw(st.sampled_from(["bs16x4", "bs32x8", "bs48x64"]))
    scheme = Scheme.parse(f"{block}w8a8") if layout == "blocks8" else scheme_of(layout, "sp70", group)
    generator = torch.manual_seed(data.draw(st.integers(0, 2**31)))
    quantized = random_weight(scheme, n, k, seed=n * 1000 + k)
    if layout != "blocks8":
        row_density = density * torch.rand(n, 1, generator=generator) * 2
        codes = torch.randint(-7, 8, (n, k), generator=generator)
        quantized = with_codes(quantized, scheme, codes * (torch.rand(n, k, generator=generator) < row_density))
    packed = native.pack(quantized, scheme, k, layout)
    native.check_packed(packed, scheme, n, k, layout)
    restored = native.unpack(packed, scheme, n, k, layout)
    assert restored.tensors().keys() == quantized.tensors().keys()
    for name, tensor in quantized.tensors().items():
        assert torch.equal(getattr(restored, name), tensor), name
    again = native.pack(restored, scheme, k, layout)
    assert torch.equal(again, packed)
