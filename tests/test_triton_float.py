"""Triton's w8a16, w4a16 and w4a8, and dequantization, against the oracle and the CPU's kernels: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble import layouts
from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS
from nybble.kernels import a16_triton, w4a8_triton
from nybble.kernels.configs import SHIPPED, Config
from nybble.kernels.dequantize_triton import dequantize, layout_of
from nybble.kernels.quantize_triton import quantize
from nybble.testing.oracle import OUT_EPSILON, SHAPES, error_bound, random_weight, run, served_by
from nybble.weights.rounding import QuantizedWeight, dequantize_weight
from nybble.weights.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = {spec.name: spec for spec in specs() if spec.target == "triton"}
FLOAT = [one for name in ("w8a16_triton", "w4a16_triton") for one in served_by(TRITON[name])]
QUADS = [Scheme.parse(name) for name in ("sp24w8a16", "sp24w16a16", "sp24w4a16", "sp24w4a16g32", "sp24w4a16g64")]
INTEGER = served_by(TRITON["w4a8_triton"])
SCALAR = next(spec for spec in specs() if spec.name == "w4a8_scalar")
# What the tiles of 64 and the groups have tails for, and nothing that takes the interpreter long.
FEW = {name: SHAPES[name] for name in ("one", "odd-k", "group-tail", "rows")} | {"two-tiles": (5, 130, 128)}


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def weight_of(quantized: QuantizedWeight, scheme: Scheme, k: int) -> dict[str, Tensor]:
    layout = layout_of(scheme)
    packed = layouts.pack(quantized, layout, scheme, k).to(DEVICE)
    return layouts.views(packed, layout, scheme, len(quantized.qweight), k)


def product(
    x: Tensor, quantized: QuantizedWeight, bias: Tensor | None, scheme: Scheme, config: Config, dtype: torch.dtype
) -> Tensor:
    """By the kernel, into an output of a dtype that was poisoned before."""
    weight = weight_of(quantized, scheme, x.shape[1])
    out = torch.full((len(x), len(quantized.qweight)), torch.nan, dtype=dtype, device=DEVICE)
    x, bias = x.to(DEVICE), None if bias is None else bias.to(DEVICE)
    if scheme.act_bits == 8:
        k_padded = layouts.padded_in_features("frag4", scheme, x.shape[1])
        codes = quantize(x, k_padded, scheme.group_size, sums=True)
        w4a8_triton.multiply(codes, weight, bias, out, scheme, config)
    else:
        a16_triton.multiply(x, weight, bias, out, scheme, config)
    return out.cpu()


def close(got: Tensor, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None, scheme: Scheme) -> None:
    expected = reference.linear(x, quantized, bias, scheme, torch.float64)
    bound = error_bound(x, quantized, scheme, expected, got.dtype)
    if got.dtype == torch.bfloat16:
        bound += expected.abs() * OUT_EPSILON[got.dtype]  # the interpreter cuts bfloat16 off where a GPU rounds it
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.sampled(every=8, full=4)
@pytest.mark.parametrize("config", SHIPPED["w4a16_triton"].on("sm90"), ids=str)
@pytest.mark.parametrize("scheme", FLOAT, ids=str)
def test_float_kernels_agree_with_the_oracle(scheme: Scheme, config: Config) -> None:
    assert config in SHIPPED[f"{scheme.family}_triton"].configs
    for m, n, k in FEW.values():
        quantized, x, bias = random_weight(scheme, n, k), torch.randn(m, k).half(), torch.randn(n)
        close(product(x, quantized, bias, scheme, config, x.dtype), x, quantized, bias, scheme)


@pytest.mark.sampled(every=5, full=2)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", [Scheme.parse("w8a16"), Scheme.parse("w4a16g32asym")], ids=str)
def test_every_dtype(scheme: Scheme, dtype: torch.dtype) -> None:
    for config in SHIPPED["w4a16_triton"].configs[:2]:
        for name, (m, n, k) in SHAPES.items():
            quantized, x = random_weight(scheme, n, k), torch.randn(m, k).to(dtype)
            got = product(x, quantized, None, scheme, config, dtype)
            assert got.shape == (m, n), name
            close(got, x, quantized, None, scheme)


@pytest.mark.parametrize("scheme", FLOAT, ids=str)
def test_integer_data_gives_exact_results(scheme: Scheme) -> None:
    """Every partial sum fits 24 bits, so splitting K changes no bit."""
    quantized, x = random_weight(scheme, 70, 300, unit_scale=True), torch.randint(-7, 8, (5, 300)).float()
    expected = reference.linear(x, quantized, None, scheme, torch.float64).float()
    for config in SHIPPED["w4a16_triton"].configs:
        assert torch.equal(product(x, quantized, None, scheme, config, torch.float32), expected), config


@pytest.mark.sampled(every=20, full=3)
@pytest.mark.parametrize("config", SHIPPED["w4a8_triton"].on("sm90"), ids=str)
@pytest.mark.parametrize("scheme", INTEGER, ids=str)
def test_w4a8_has_the_bits_of_the_cpu_kernel(scheme: Scheme, config: Config) -> None:
    for dtype in (torch.float32, torch.float16):
        for name, (m, n, k) in FEW.items():
            quantized, x, bias = random_weight(scheme, n, k), torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
            got = product(x, quantized, bias, scheme, config, dtype)
            assert torch.equal(got, run(SCALAR, quantized, scheme, x, bias)), name


def test_w4a8_of_the_longest_rows_and_no_rows() -> None:
    scheme, config = Scheme.parse("w4a8g128asym"), SHIPPED["w4a8_triton"].configs[0]
    for m, n, k in ((2, 3, 9000), (0, 3, 70)):
        quantized, x = random_weight(scheme, n, k), torch.randn(m, k)
        assert torch.equal(
            product(x, quantized, None, scheme, config, x.dtype), run(SCALAR, quantized, scheme, x, None)
        )


@pytest.mark.parametrize("scheme", [Scheme.parse(name) for name in ("w8a16", "w4a16g64", "w4a8g32asym")], ids=str)
def test_a_bad_row_spoils_itself_alone(scheme: Scheme) -> None:
    quantized, clean = random_weight(scheme, 19, 70), torch.randn(20, 70)
    for config in SHIPPED[f"{scheme.family}_triton"].configs[:2]:
        good = product(clean, quantized, None, scheme, config, clean.dtype)
        for bad in (torch.nan, torch.inf):
            x = clean.clone()
            x[17, 3] = bad
            got = product(x, quantized, None, scheme, config, x.dtype)
            others = torch.arange(20) != 17
            assert torch.equal(got[others], good[others])
            assert not got[17].isfinite().any()


@pytest.mark.parametrize("scheme", [Scheme.parse(name) for name in ("w8a16", "w4a16", "w4a8g64")], ids=str)
def test_extreme_rows(scheme: Scheme) -> None:
    quantized, bias, ones = random_weight(scheme, 21, 70), torch.randn(21), torch.randn(70)
    x = torch.stack([torch.zeros(70), -torch.zeros(70), ones * 1e30, ones * 1e-30, ones * 1e-38, ones])
    config = SHIPPED[f"{scheme.family}_triton"].configs[0]
    got = product(x, quantized, None, scheme, config, x.dtype)
    assert (got[:2] == 0).all()
    close(got, x, quantized, None, scheme)
    assert torch.equal(product(x, quantized, bias, scheme, config, x.dtype)[:2], bias.expand(2, 21))


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", [*FLOAT, *QUADS], ids=str)
def test_dequantized_weights_are_the_definition(scheme: Scheme, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (17, 129), (130, 200), (64, 64)):
        quantized = random_weight(scheme, n, k)
        packed = layouts.pack(quantized, layout_of(scheme), scheme, k).to(DEVICE)
        got, expected = dequantize(packed, scheme, n, k, dtype).cpu(), dequantize_weight(quantized, scheme, k)
        if dtype == torch.bfloat16:
            assert ((got.float() - expected).abs() <= expected.abs() * 2.0**-7).all()
        else:
            assert torch.equal(got, expected.to(dtype))


def test_packing_on_the_device_gives_the_same_bytes() -> None:
    for scheme in (*FLOAT, *INTEGER, *QUADS):
        quantized, layout = random_weight(scheme, 70, 200), layout_of(scheme)
        there = QuantizedWeight(**{name: tensor.to(DEVICE) for name, tensor in quantized.tensors().items()})
        packed = layouts.pack(there, layout, scheme, 200)
        assert torch.equal(packed.cpu(), layouts.pack(quantized, layout, scheme, 200))
        back = layouts.unpack(packed, layout, scheme, 70, 200).tensors()
        assert all(torch.equal(tensor.cpu(), quantized.tensors()[name]) for name, tensor in back.items())
