"""Sparse weights for CPUs: the layouts mask8, mask4, gather8 and blocks8. csrc/pack.h draws them, and the compiled
library (csrc/sparse.cpp) alone packs them.

mask8, mask4    a bit for each weight, and the codes that are kept: lines of n16k4 and n16k8 without their zeros
gather8         the places of the codes that are kept, which kernels follow one by one
blocks8         blocks of codes
"""

from __future__ import annotations

from functools import partial

from .. import native
from .layout import Layout


def _layout(name: str, least_zeros: float = 0.0) -> Layout:
    return Layout(
        name,
        own_pack=partial(native.pack, layout=name),
        own_unpack=partial(native.unpack, layout=name),
        device="cpu",
        least_zeros=least_zeros,
    )


LAYOUTS = (
    _layout("mask8"),
    _layout("mask4"),
    _layout("gather8", least_zeros=0.65),  # measured: the preset sparse-crossover of the bench
    _layout("blocks8"),
)
