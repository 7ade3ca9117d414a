"""Dense 8-bit weights for GPUs: the layout rows8.

Codes int8 row by row, inputs contiguous; float32 scales; sums of the codes, which take out the zero point of the
activations. Padding: output features to 64, with scale 0; inputs to 128, with code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .gpu import TILE
from .layout import Layout, Spec, round_up

_K = 128


def _padded(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    return round_up(out_features, TILE), round_up(in_features, _K)


def _sections(scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    n, k = _padded(scheme, out_features, in_features)
    return {"codes": ((n, k), torch.int8), "scale": ((n,), torch.float32), "column_sum": ((n,), torch.int32)}


def _fill(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    codes = quantized.qweight
    n, k = _padded(scheme, len(codes), in_features)
    rows = (0, n - len(codes))
    return {
        "codes": zero_pad(codes, (0, k - in_features, *rows)),
        "scale": zero_pad(quantized.scale[:, 0], rows),
        "column_sum": zero_pad(codes.sum(dim=1, dtype=torch.int32), rows),
    }


def _collect(parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    codes = parts["codes"][:out_features, :in_features].contiguous()
    return QuantizedWeight(codes, parts["scale"][:out_features, None].clone())


LAYOUTS = (Layout("rows8", _sections, _fill, _collect, _padded, a_scale_a_row=True),)
