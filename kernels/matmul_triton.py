"""y = x (M, K) w^T + bias for many rows of x: dequantizes the weight to x's dtype (dequantize_triton), then multiplies with
torch's matmul (cuBLAS). Bound by the multiplies; the weight is read and written once for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights.scheme import Scheme
from .dequantize_triton import dequantize


class MatmulPlan:
    """Dequantize and matmul for one weight shape; called like native.LinearPlan."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._shape = (scheme, out_features, in_features)

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x (..., K) w^T + bias to out (..., N), contiguous, of x's dtype."""
        _, n, k = self._shape
        weight, rows = dequantize(packed, *self._shape, x.dtype), out.view(-1, n)
        if bias is None:
            torch.mm(x.reshape(-1, k), weight.t(), out=rows)
        else:
            torch.addmm(bias.to(x.dtype), x.reshape(-1, k), weight.t(), out=rows)
