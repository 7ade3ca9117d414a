"""Triton's w8a8 against the integers of the reference and the bits of the CPU's kernel: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS
from nybble.kernels.configs import SHIPPED, Config
from nybble.kernels.quantize_triton import quantize
from nybble.kernels.w8a8_triton import NAME, multiply
from nybble.testing.oracle import SHAPES, random_weight, run
from nybble.weights.rounding import QuantizedWeight
from nybble.weights.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEME = Scheme.parse("w8a8")
SCALAR = next(spec for spec in specs() if spec.name == "w8a8_scalar")
CONFIGS = SHIPPED[NAME].on("sm90")
# The interpreter computes whole tiles: each configuration takes the shapes that it has tails for.
MOST_INTERPRETED = 64 * 64
SMALL = [config for config in CONFIGS if config.bm * config.bn <= MOST_INTERPRETED]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def laid_out(quantized: QuantizedWeight) -> dict[str, Tensor]:
    n, k = quantized.qweight.shape
    rows = -n % 16
    return {
        "codes": pad(quantized.qweight, (0, -k % 64, 0, rows)).to(DEVICE),
        "scale": pad(quantized.scale.flatten(), (0, rows)).to(DEVICE),
        "column_sum": pad(quantized.qweight.sum(1, dtype=torch.int32), (0, rows)).to(DEVICE),
    }


def product(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None, config: Config, dtype: torch.dtype) -> Tensor:
    """By the kernel, into an output of a dtype that was poisoned before."""
    weight = laid_out(quantized)
    codes = quantize(x.to(DEVICE), weight["codes"].shape[1])
    poison = 0x55555555 if dtype == torch.int32 else torch.nan
    out = torch.full((len(x), len(quantized.qweight)), poison, dtype=dtype, device=DEVICE)
    multiply(codes, weight, None if bias is None else bias.to(DEVICE), out, config)
    return out.cpu()


def corner_codes(n: int, k: int) -> Tensor:
    corners = torch.tensor([127, -128, 0, 1, -1, 126, -126, 64], dtype=torch.int8)
    return corners[torch.randint(0, len(corners), (n, k))]


@pytest.mark.sampled(every=9, full=3)
@pytest.mark.parametrize("config", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_of_the_cpu_kernel(dtype: torch.dtype, config: Config) -> None:
    for name, (m, n, k) in SHAPES.items():
        quantized, x = random_weight(SCHEME, n, k), torch.randn(m, k).to(dtype)
        for bias in (None, torch.randn(n).to(dtype)):
            assert torch.equal(product(x, quantized, bias, config, dtype), run(SCALAR, quantized, SCHEME, x, bias)), (
                name
            )


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_products_are_exact(config: Config) -> None:
    """At the corners of the codes, over tails of every block and a K that no step divides."""
    for m, n, k in [(0, 3, 5), (1, 1, 2), (config.bm + 1, config.bn + 1, config.bk + 64 + 3), (3, 17, 2000)]:
        quantized = QuantizedWeight(corner_codes(n, k), torch.ones(n, 1))
        x = corner_codes(m, k).float()
        x[:, :1], x[:, 1:2] = -128, 127  # the codes are the values
        expected = (x.double() @ quantized.qweight.double().t()).int()
        assert torch.equal(product(x, quantized, None, config, torch.int32), expected), (m, n, k)


@pytest.mark.parametrize("sign", [1, -1])
def test_longest_k_at_the_extremes(sign: int) -> None:
    k = SCHEME.max_in_features
    quantized = QuantizedWeight(torch.full((2, k), 127 * sign, dtype=torch.int8), torch.ones(2, 1))
    x = torch.full((1, k), -128.0)
    x[0, 7] = 127
    for config in SMALL[:3]:
        got = product(x, quantized, None, config, torch.int32)
        assert (got == sign * 127 * (-128 * (k - 1) + 127)).all()
    x = torch.full((1, k), 3.0)
    got = product(x, quantized, None, SMALL[0], torch.float32)
    assert torch.equal(got, run(SCALAR, quantized, SCHEME, x))


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_every_output_dtype(x_dtype: torch.dtype) -> None:
    quantized, x, bias = random_weight(SCHEME, 20, 70), torch.randn(5, 70).to(x_dtype), torch.randn(20)
    wide = product(x, quantized, bias, SMALL[0], torch.float32)
    assert torch.equal(product(x, quantized, bias, SMALL[0], torch.float16), wide.half())
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    error = (product(x, quantized, bias, SMALL[0], torch.bfloat16).float() - wide).abs()
    assert (error <= wide.abs() * 2.0**-7).all()


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=str)
def test_every_bias_dtype(bias_dtype: torch.dtype) -> None:
    quantized, x, bias = random_weight(SCHEME, 20, 70), torch.randn(5, 70), torch.randn(20).to(bias_dtype)
    assert torch.equal(product(x, quantized, bias, SMALL[0], x.dtype), run(SCALAR, quantized, SCHEME, x, bias))


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_a_bad_row_spoils_itself_alone(config: Config) -> None:
    quantized, clean = random_weight(SCHEME, 19, 70), torch.randn(20, 70)
    good = product(clean, quantized, None, config, torch.float32)
    for bad in (torch.nan, torch.inf):
        x = clean.clone()
        x[17, 3] = bad
        got = product(x, quantized, None, config, torch.float32)
        others = torch.arange(20) != 17
        assert torch.equal(got[others], good[others])
        assert got[17].isnan().all()


def test_a_row_of_zeros_gives_the_bias() -> None:
    quantized, bias = random_weight(SCHEME, 19, 70), torch.randn(19)
    for config in SMALL:
        assert torch.equal(product(torch.zeros(2, 70), quantized, bias, config, bias.dtype), bias.expand(2, 19))


def test_split_and_whole_k_are_both_shipped() -> None:
    assert {config.split_k > 1 for config in SMALL} == {True, False}
