"""The Triton kernels as the registry calls them: packed weights, any leading dimensions, strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble import layouts
from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import KernelSpec
from nybble.kernels.table import KERNELS
from nybble.testing.oracle import error_bound, random_weight, run, served_by
from nybble.weights.rounding import QuantizedWeight, dequantize_weight
from nybble.weights.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K = 70, 200
CPU = {spec.name: spec for spec in specs()}
LINEAR = [kernel for kernel in KERNELS if kernel.op == "linear"]
MATMUL = [kernel for kernel in LINEAR if kernel.make.where.startswith("matmul_triton:")]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def scheme_of(kernel: KernelSpec) -> Scheme:
    return served_by(kernel)[-1]


def packed_of(kernel: KernelSpec, quantized: QuantizedWeight, scheme: Scheme) -> Tensor:
    return layouts.pack(quantized, kernel.layout, scheme, K).to(DEVICE)


def expect(got: Tensor, kernel: KernelSpec, quantized: QuantizedWeight, x: Tensor, bias: Tensor | None) -> None:
    scheme = scheme_of(kernel)
    if scheme.act_bits == 8:
        assert torch.equal(got, run(CPU[f"{kernel.scheme}_scalar"], quantized, scheme, x.contiguous(), bias))
        return
    expected = reference.linear(x, quantized, bias, scheme, torch.float64)
    bound = error_bound(x, quantized, scheme, expected, x.dtype)
    if kernel in MATMUL:  # weights and bias are rounded to the activations' dtype, and torch's sums on a CPU may be too
        weight = dequantize_weight(quantized, scheme, K).double()
        sums = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
        bound = bound + torch.finfo(x.dtype).eps * sums
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("kernel", LINEAR, ids=lambda kernel: kernel.name)
def test_plans(kernel: KernelSpec) -> None:
    scheme = scheme_of(kernel)
    quantized, bias = random_weight(scheme, N, K), torch.randn(N)
    packed, plan = packed_of(kernel, quantized, scheme), kernel.make(scheme, N, K)
    wide = torch.randn(24, K + 9)
    for x in (torch.randn(5, K).half(), torch.randn(2, 3, K), wide[::2, 3 : K + 3], torch.randn(K), torch.empty(0, K)):
        for term in (None, bias):
            out = torch.full((*x.shape[:-1], N), torch.nan, dtype=x.dtype, device=DEVICE)
            on_device = wide.to(DEVICE)[::2, 3 : K + 3] if x.dim() == 2 and not x.is_contiguous() else x.to(DEVICE)
            plan(on_device, packed, None if term is None else term.to(DEVICE), out)
            expect(out.cpu().reshape(-1, N), kernel, quantized, x.reshape(-1, K), term)


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in LINEAR if torch.int32 in kernel.out_dtypes], ids=lambda kernel: kernel.name
)
def test_int32_outputs_are_the_products(kernel: KernelSpec) -> None:
    scheme = scheme_of(kernel)
    quantized, x = random_weight(scheme, N, K), torch.randint(-128, 128, (3, K)).float()
    x[:, 0], x[:, 1] = -128, 127  # the codes are the values
    out = torch.full((3, N), 0x55, dtype=torch.int32, device=DEVICE)
    kernel.make(scheme, N, K)(x.to(DEVICE), packed_of(kernel, quantized, scheme), None, out)
    assert torch.equal(out.cpu(), (x.double() @ quantized.qweight.double().t()).int())


@pytest.mark.parametrize("kernel", LINEAR, ids=lambda kernel: kernel.name)
def test_shapes_that_no_weight_may_have_are_refused(kernel: KernelSpec) -> None:
    scheme = scheme_of(kernel)
    with pytest.raises(ValueError, match="in_features"):
        kernel.make(scheme, N, scheme.max_in_features + 1)


@pytest.mark.parametrize("kernel", [one for one in LINEAR if one not in MATMUL], ids=lambda kernel: kernel.name)
def test_a_row_has_the_same_bits_alone(kernel: KernelSpec) -> None:
    """Up to 16 rows: batches do not change a token's output."""
    scheme = scheme_of(kernel)
    quantized, x = random_weight(scheme, N, K), torch.randn(16, K, device=DEVICE)
    packed, plan = packed_of(kernel, quantized, scheme), kernel.make(scheme, N, K)
    together, alone = torch.empty(16, N, device=DEVICE), torch.empty(1, N, device=DEVICE)
    plan(x, packed, None, together)
    for row in (0, 7, 15):
        plan(x[row : row + 1], packed, None, alone)
        assert torch.equal(alone[0], together[row])
