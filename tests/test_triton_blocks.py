"""Triton's block-sparse products, and how their weights lie packed: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS
from nybble.kernels.blocks_triton import BlockShape, BlocksPlan, multiply, rows_of, stages_of
from nybble.layouts import blocks as blocks_gpu
from nybble.testing.oracle import SHAPES, random_weight, run
from nybble.weights.rounding import QuantizedWeight
from nybble.weights.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALAR = next(spec for spec in specs() if spec.name == "bsw8a8_scalar")
SCHEMES = [Scheme.parse(f"{blocks}w8a8") for blocks in ("bs16x4", "bs32x32", "bs48x64", "bs64x64", "bs128x128")]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def product(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    n, k = quantized.qweight.shape
    out = torch.full((len(x), n), 0x55 if dtype == torch.int32 else torch.nan, dtype=dtype, device=DEVICE)
    packed = blocks_gpu.pack(quantized, scheme, k).to(DEVICE)
    BlocksPlan(scheme, n, k)(x.to(DEVICE), packed, None if bias is None else bias.to(DEVICE), out)
    return out.cpu()


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bits_of_the_cpu_kernel(scheme: Scheme) -> None:
    for name, (m, n, k) in SHAPES.items():
        for dtype in (torch.float32, torch.float16):
            quantized, x, bias = random_weight(scheme, n, k), torch.randn(m, k).to(dtype), torch.randn(n)
            got = product(x, quantized, bias, scheme, dtype)
            assert torch.equal(got, run(SCALAR, quantized, scheme, x, bias)), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_exact(scheme: Scheme) -> None:
    quantized, x = random_weight(scheme, 130, 300), torch.randint(-128, 128, (20, 300)).float()
    x[:, 0], x[:, 1] = -128, 127  # the codes are the values
    expected = (x.double() @ quantized.qweight.double().t()).int()
    assert torch.equal(product(x, quantized, None, scheme, torch.int32), expected)


def test_a_weight_without_blocks_gives_the_bias() -> None:
    scheme, bias = SCHEMES[1], torch.randn(70)
    quantized = QuantizedWeight(torch.zeros(70, 100, dtype=torch.int8), torch.ones(70, 1))
    assert torch.equal(product(torch.randn(3, 100), quantized, bias, scheme, torch.float32), bias.expand(3, 70))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_float_blocks(size: int, dtype: torch.dtype) -> None:
    """Small integers, whose sums are exact in float32, with a strip without blocks."""
    n, k, m = 3 * size, 4 * size, 17
    start = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    index = torch.tensor([1, 3, 0, 1, 2], dtype=torch.int32)
    values = torch.randint(-8, 9, (5, size, size)).to(dtype)
    dense = torch.zeros(n, k)
    for strip in range(3):
        for block in range(int(start[strip]), int(start[strip + 1])):
            at = int(index[block]) * size
            dense[strip * size : (strip + 1) * size, at : at + size] = values[block].float()
    x, bias = torch.randint(-8, 9, (m, k)).to(dtype), torch.randint(-8, 9, (n,)).to(dtype)
    out = torch.full((m, n), torch.nan, device=DEVICE)
    weight = {"start": start.to(DEVICE), "index": index.to(DEVICE), "codes": values.to(DEVICE)}
    multiply(x.to(DEVICE), weight, bias.to(DEVICE), out, BlockShape(size, size, size, size))
    assert torch.equal(out.cpu(), x.float() @ dense.t() + bias.float())


def test_a_bad_row_spoils_itself_alone() -> None:
    quantized, clean = random_weight(SCHEMES[1], 40, 70), torch.randn(20, 70)
    x = clean.clone()
    x[17, 3] = torch.nan
    got, good = (product(rows, quantized, None, SCHEMES[1], torch.float32) for rows in (x, clean))
    others = torch.arange(20) != 17
    assert torch.equal(got[others], good[others])
    assert got[17].isnan().all()


# --- the layout


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpack_inverts_pack(scheme: Scheme) -> None:
    for m, n, k in SHAPES.values():
        quantized = random_weight(scheme, n, k, seed=m)
        packed = blocks_gpu.pack(quantized, scheme, k)
        back = blocks_gpu.unpack(packed, scheme, n, k)
        assert torch.equal(back.qweight, quantized.qweight)
        assert torch.equal(back.scale, quantized.scale)
        blocks_gpu.check(packed, scheme, n, k)


def test_sections_lie_where_the_layout_says() -> None:
    scheme = Scheme.parse("bs16x4w8a8")
    qweight = torch.zeros(20, 12, dtype=torch.int8)
    qweight[0, 4], qweight[19, 11] = 3, -5
    packed = blocks_gpu.pack(QuantizedWeight(qweight, torch.full((20, 1), 0.5)), scheme, 12)
    found = blocks_gpu.views(packed, scheme, 20, 12)
    assert found["start"].tolist() == [0, 1, 2]
    assert found["index"].tolist() == [1, 2]
    assert found["codes"].shape == (2, 16, 32)
    assert found["codes"].nonzero().tolist() == [[0, 0, 0], [1, 3, 3]]
    assert found["column_sum"][[0, 19]].tolist() == [3, -5]
    assert found["scale"].tolist() == [0.5] * 20 + [0.0] * 12
    assert all(tensor.data_ptr() % 64 == packed.data_ptr() % 64 for name, tensor in found.items() if name != "index")
    assert packed.numel() == 64 + 128 + 128 + 2 * 512 + 8


@pytest.mark.parametrize("section", ["start", "index", "codes", "column_sum"])
def test_damage_is_refused(section: str) -> None:
    scheme = SCHEMES[1]
    packed = blocks_gpu.pack(random_weight(scheme, 64, 128), scheme, 128)
    found = blocks_gpu.views(packed, scheme, 64, 128)[section]
    found.view(-1)[-1] = 99 if section != "codes" else -128
    with pytest.raises(ValueError, match=r"block|qweight|packed"):
        blocks_gpu.check(packed, scheme, 64, 128)


def test_wrong_sizes_are_refused() -> None:
    scheme = SCHEMES[1]
    packed = blocks_gpu.pack(random_weight(scheme, 64, 128), scheme, 128)
    for damaged in (packed[:-1], packed[:100]):
        with pytest.raises(ValueError, match="packed"):
            blocks_gpu.views(damaged, scheme, 64, 128)
    with pytest.raises(ValueError, match="has no blocks"):
        blocks_gpu.block_of(Scheme.parse("w8a8"))


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_what_is_in_flight_fits(shared: int) -> None:
    for size in (32, 64, 128):
        shape = BlockShape(size, size, size, size)
        for m in (1, 16, 17, 100, 5000):
            rows = rows_of(m)
            assert rows >= min(m, 128)
            for itemsize in (1, 2):
                stages = stages_of(shape, rows, itemsize, shared)
                in_flight, most = stages // 2 * (size + rows) * size * itemsize, min(160 << 10, shared - 1024)
                assert in_flight <= most
                assert stages == 8 or in_flight > most // 2
