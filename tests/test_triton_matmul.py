"""Dequantization and torch's matmul, with the dequantization in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nybble import layouts
from nybble.dispatch import reference
from nybble.kernels.dequantize_triton import layout_of
from nybble.kernels.matmul_triton import MatmulPlan
from nybble.testing.oracle import random_weight
from nybble.weights.scheme import Scheme


@pytest.mark.parametrize("name", ["w8a16", "w4a16g32asym", "w4a16", "sp24w8a16", "sp24w16a16", "sp24w4a16g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_the_reference(name: str, dtype: torch.dtype, with_bias: bool) -> None:
    scheme, n, k = Scheme.parse(name), 70, 100
    quantized = random_weight(scheme, n, k)
    packed = layouts.pack(quantized, layout_of(scheme), scheme, k)
    x, bias = torch.randn(5, 3, k).to(dtype), torch.randn(n) if with_bias else None
    out = torch.full((5, 3, n), torch.nan, dtype=dtype)
    MatmulPlan(scheme, n, k)(x, packed, bias, out)
    expected = reference.linear(x.view(-1, k), quantized, bias, scheme, torch.float64).view(5, 3, n)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    assert ((out.double() - expected).abs() <= tolerance * expected.abs().max()).all()
