"""The Triton kernels as data, which the registry reads without importing Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from ..weights.scheme import Scheme
from ..weights.sparsity import NofM, Sparsity

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Plan = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]


@dataclass(frozen=True)
class TritonKernel:
    """A kernel: its family as in Scheme.family, the layout that it reads, and what it accepts.

    entry: "module:class" in this package; the class is made from (scheme, out_features, in_features) and called as
        native.LinearPlan is.
    min_m: rows of activations from which on it serves.
    rounds_weight: it multiplies with the weight rounded to the activations' dtype, as a dense layer does.
    sparsity: the one pattern of the family that it takes; None: any.
    """

    name: str
    family: str
    layout: str
    entry: str
    out_dtypes: tuple[torch.dtype, ...] = _FLOATS
    act_dtypes: tuple[torch.dtype, ...] = _FLOATS
    group_sizes: tuple[int | None, ...] = (None,)
    op: str = "linear"
    min_m: int = 1
    rounds_weight: bool = False
    sparsity: Sparsity | None = None

    def make(self, scheme: Scheme, out_features: int, in_features: int) -> Plan:
        """The kernel bound to a weight's shape. Imports Triton."""
        module, _, name = self.entry.partition(":")
        plan: Plan = getattr(import_module(f".{module}", __package__), name)(scheme, out_features, in_features)
        return plan


_WITH_INT32 = (*_FLOATS, torch.int32)
_GROUPS = (None, 32, 64, 128)
_MATMUL = "matmul_triton:MatmulPlan"
_TWO_OF_FOUR = NofM(2, 4)

KERNELS = (
    TritonKernel("quantize_triton", "", "plain", "quantize_triton:quantize", op="quantize"),
    TritonKernel("dequantize_triton", "", "frag4", "dequantize_triton:dequantize", op="dequantize"),
    TritonKernel("w8a8_triton", "w8a8", "rows8", "w8a8_triton:W8A8Plan", out_dtypes=_WITH_INT32),
    TritonKernel("w8a16_triton", "w8a16", "rows8", "a16_triton:A16Plan"),
    TritonKernel("w4a8_triton", "w4a8", "frag4", "w4a8_triton:W4A8Plan", group_sizes=_GROUPS),
    TritonKernel("w4a16_triton", "w4a16", "frag4", "a16_triton:A16Plan", group_sizes=_GROUPS),
    # With many tokens, beyond those of the CUDA kernels where there are any.
    TritonKernel("w8a16_triton_matmul", "w8a16", "rows8", _MATMUL, min_m=65, rounds_weight=True),
    TritonKernel("w4a16_triton_matmul", "w4a16", "frag4", _MATMUL, group_sizes=_GROUPS, min_m=65, rounds_weight=True),
    # The CUDA kernels serve fewer tokens.
    TritonKernel("sp24w8a16_triton_matmul", "spw8a16", "quads8", _MATMUL, rounds_weight=True, sparsity=_TWO_OF_FOUR),
    TritonKernel(
        "sp24w4a16_triton_matmul",
        "spw4a16",
        "quads4",
        _MATMUL,
        group_sizes=_GROUPS,
        rounds_weight=True,
        sparsity=_TWO_OF_FOUR,
    ),
    TritonKernel("sp24w16a16_triton_matmul", "spw16a16", "quads16", _MATMUL, rounds_weight=True, sparsity=_TWO_OF_FOUR),
    TritonKernel("bsw8a8_triton", "bsw8a8", "bsr8", "blocks_triton:BlocksPlan", out_dtypes=_WITH_INT32),
)
