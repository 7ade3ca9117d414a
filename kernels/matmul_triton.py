"""y = x (M, K) w^T + bias for many tokens: the weight is dequantized to x's dtype (dequantize_triton), and torch's matmul, that
is cuBLAS, multiplies. From there on the multiplies bound the time and the weight is read and written once for all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights.scheme import Scheme
from .dequantize_triton import dequantize


class MatmulPlan:
    """Dequantization and matmul of a weight's shape, with native.LinearPlan's convention."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._shape = (scheme, out_features, in_features)

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N), contiguous, of x's dtype, = x (..., K) w^T + bias."""
        _, n, k = self._shape
        weight, rows = dequantize(packed, *self._shape, x.dtype), out.view(-1, n)
        if bias is None:
            torch.mm(x.reshape(-1, k), weight.t(), out=rows)
        else:
            torch.addmm(bias.to(x.dtype), x.reshape(-1, k), weight.t(), out=rows)
