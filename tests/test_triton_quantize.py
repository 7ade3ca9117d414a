"""Triton's activations as codes against the reference, bit for bit: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm, silu

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.dispatch import reference
from nybble.dispatch.spec import FLOATS
from nybble.kernels import quantize_triton
from nybble.kernels.quantize_triton import Codes, block_of, quantize, rms_norm_quantize, silu_mul_quantize
from nybble.weights.activation_type import activation_types

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0, 5), (1, 1), (3, 70), (5, 256), (7, 129), (2, 9000)]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, k) * torch.exp2(torch.randint(-6, 7, (m, 1)))).to(dtype)


def padded(k: int, multiple: int = 64) -> int:
    return -(-k // multiple) * multiple


def check(got: Codes, x: Tensor) -> None:
    """Codes, scales and zero points are the reference's, and codes beyond K are 0."""
    k = x.shape[1]
    expected = reference.quantize_activations(x, activation_types()[8])
    assert torch.equal(got.codes[:, :k].cpu(), expected.codes)
    assert not got.codes[:, k:].any()
    assert torch.equal(got.scale.nan_to_num(nan=-1).cpu(), expected.scale.nan_to_num(nan=-1))
    assert torch.equal(got.zero.cpu(), expected.zero)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("m", "k"), [shape for shape in SHAPES if shape[0]])
def test_codes_are_the_reference_bit_for_bit(m: int, k: int, dtype: torch.dtype) -> None:
    x = activations(m, k, dtype)
    check(quantize(x.to(DEVICE), padded(k)), x)
    check(quantize(x.to(DEVICE), k), x)


def test_no_rows() -> None:
    got = quantize(torch.empty(0, 5, device=DEVICE), 64, 32, True)
    assert [tuple(t.shape) for t in got if t is not None] == [(0, 64), (0,), (0,), (0, 2)]


def test_rows_may_be_strided() -> None:
    x = activations(6, 300, torch.float32)
    check(quantize(x.to(DEVICE)[::2, 7:107], 128), x[::2, 7:107])


def test_extreme_rows() -> None:
    ones = torch.randn(70)
    sizes = (1e30, 1e38, 3e38, 1e-30, 1e-38, 1e-41, 1e-45, 1)
    rows = [torch.zeros(70), -torch.zeros(70), ones.abs(), -ones.abs(), torch.full((70,), 3.5)]
    x = torch.stack([*rows, *((ones / ones.abs().max()) * size for size in sizes)])
    check(quantize(x.to(DEVICE), 128), x)


def test_ties_round_to_even() -> None:
    """With a range of 255 the codes are the values, rounded."""
    x = torch.tensor([[-128.0, 127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5]])
    got = quantize(x.to(DEVICE), 64)
    assert got.codes[0, :10].tolist() == [-128, 127, 0, 2, 2, 0, -2, -2, 126, -128]
    check(got, x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_row_spoils_itself_alone(bad: float) -> None:
    clean = activations(4, 200, torch.float32)
    for column in (0, 127, 128, 199):
        x = clean.clone()
        x[2, column] = bad
        got = quantize(x.to(DEVICE), 256, 64, True)
        check(got, x)
        assert got.scale[2].isnan()
        assert got.sums is not None
        assert not got.sums[2].any()


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 70), (5, 256), (2, 9000)])
def test_sums_of_groups(m: int, k: int, group_size: int | None) -> None:
    x = activations(m, k, torch.float16)
    got = quantize(x.to(DEVICE), padded(k, 128), group_size, True)
    check(got, x)
    groups = got.codes.int().unflatten(1, (-1, group_size or padded(k, 128)))
    assert got.sums is not None
    assert torch.equal(got.sums, groups.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("k", [1, 70, 300])
def test_rms_norm_of_exact_values(k: int) -> None:
    """Values of one magnitude have themselves over it as their norm, exactly; powers of two weigh them."""
    x = (torch.randint(0, 2, (4, k)) * 2.0 - 1) * torch.tensor([[1.0], [2.0], [0.5], [64.0]])
    weight = torch.exp2(torch.randint(-3, 4, (k,)).float())
    check(rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), 0.0, padded(k)), x.sign() * weight)


def close(got: Codes, expected: Tensor) -> None:
    """float32 of another order: a code may differ by one where a value stands at a tie, and few do."""
    wanted = reference.quantize_activations(expected, activation_types()[8])
    difference = (got.codes[:, : expected.shape[1]].cpu().int() - wanted.codes).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert torch.allclose(got.scale.cpu(), wanted.scale, rtol=1e-5, atol=0)
    assert (got.zero.cpu() - wanted.zero).abs().max() <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    x, weight = activations(5, 300, dtype), torch.randn(300).to(dtype)
    got = rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), 1e-6, 320)
    close(got, rms_norm(x.float(), (300,), weight.float(), 1e-6))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_times_up_is_torchs(dtype: torch.dtype) -> None:
    both = activations(5, 600, dtype)
    gate, up = both[:, :300], both[:, 300:]
    on_device = both.to(DEVICE)
    close(silu_mul_quantize(on_device[:, :300], on_device[:, 300:], 320), silu(gate.float()) * up.float())


def test_fused_rows_are_spoilt_alone_too() -> None:
    x, weight = activations(3, 70, torch.float32), torch.randn(70)
    x[1, 5] = torch.nan
    for got in (
        rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), 1e-6, 128),
        silu_mul_quantize(x.to(DEVICE), x.to(DEVICE), 128),
    ):
        assert got.scale.isnan().tolist() == [False, True, False]
        assert not got.codes[1].any()


def test_blocks_hold_every_group_whole_and_threads_few_values() -> None:
    for k in (1, 64, 128, 129, 4096, 65793):
        block, warps = block_of(k)
        assert block % 128 == 0
        assert block // (32 * warps) <= 16
        assert block >= min(k, quantize_triton.LARGEST_BLOCK)


def test_codes_are_padded_with_zeros_that_change_no_sum() -> None:
    x = activations(2, 65, torch.float32)
    short, long = (quantize(x.to(DEVICE), k, 32, True) for k in (96, 192))
    assert torch.equal(pad(short.codes, (0, 96)), long.codes)
    assert short.sums is not None
    assert long.sums is not None
    assert torch.equal(pad(short.sums, (0, 3)), long.sums)
