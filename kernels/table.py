"""The Triton kernels as rows of the table of kernels. Reading the table does not import Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch

from ..dispatch.spec import FLOATS, GPU_GROUP_SIZES, KernelSpec, Plan
from ..weights.scheme import Scheme
from ..weights.sparsity import NofM


@dataclass(frozen=True)
class Entry:
    """Makes plans. where: "module:class" in this package; the class has the interface of native.LinearPlan."""

    where: str

    def __call__(self, scheme: Scheme, out_features: int, in_features: int) -> Plan:
        """The kernel for a weight of a scheme and a shape. Imports Triton."""
        module, _, name = self.where.partition(":")
        plan: Plan = getattr(import_module(f".{module}", __package__), name)(scheme, out_features, in_features)
        return plan


_row = partial(KernelSpec, target="triton", device="cuda", fixed_order=True)
_exact = partial(_row, exact=True)
_with_int32 = partial(_exact, out_dtypes=(*FLOATS, torch.int32))
# As torch multiplies: with the weight rounded to the dtype of the activations.
_matmul = partial(_row, make=Entry("matmul_triton:MatmulPlan"), rounds_weight=True)
_sp24 = partial(_matmul, sparsity=NofM(2, 4))

KERNELS = (
    _row("quantize_triton", "", layout="plain", op="quantize"),
    _row("dequantize_triton", "", layout="frag4", op="dequantize"),
    _with_int32("w8a8_triton", "w8a8", layout="rows8", make=Entry("w8a8_triton:W8A8Plan")),
    _row("w8a16_triton", "w8a16", layout="rows8", make=Entry("a16_triton:A16Plan")),
    _exact("w4a8_triton", "w4a8", layout="frag4", group_sizes=GPU_GROUP_SIZES, make=Entry("w4a8_triton:W4A8Plan")),
    _row("w4a16_triton", "w4a16", layout="frag4", group_sizes=GPU_GROUP_SIZES, make=Entry("a16_triton:A16Plan")),
    # For many rows of activations; on GPUs with CUDA kernels, for more than these take.
    _matmul("w8a16_triton_matmul", "w8a16", layout="rows8", m_range=(65, None)),
    _matmul("w4a16_triton_matmul", "w4a16", layout="frag4", group_sizes=GPU_GROUP_SIZES, m_range=(65, None)),
    # The CUDA kernels take fewer rows of activations.
    _sp24("sp24w8a16_triton_matmul", "spw8a16", layout="quads8"),
    _sp24("sp24w4a16_triton_matmul", "spw4a16", layout="quads4", group_sizes=GPU_GROUP_SIZES),
    _sp24("sp24w16a16_triton_matmul", "spw16a16", layout="quads16"),
    _with_int32("bsw8a8_triton", "bsw8a8", layout="bsr8", make=Entry("blocks_triton:BlocksPlan")),
)
