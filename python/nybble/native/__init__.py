"""The compiled extension: tensors in, pointers and byte counts out. The only room that imports `_C`."""

from __future__ import annotations

# torch first: its wheels bring the OpenMP library that the extension then shares.
import torch  # noqa: F401 isort: skip

from .. import _C
from .attend import AttentionHow, attention
from .base import BF16_LINES, DTYPES, PANEL_DTYPES, memory, vector
from .cells import recurrent
from .chains import ChainWeight, chain, table
from .codes import select_nibbles, transpose_nibbles, unpack_bits
from .conv import Code, conv_call, pool_call, run_convs
from .linear import KernelNames, LinearPlan
from .lookup import LOOKUP_LAYOUTS, Lookup
from .machine import Caches, blocks, caches, cpu, cuda_kernel_table, extension, kernel_table, probe, probes
from .mixture import Experts, ExpertsSide, Gate
from .sparse import check_blocks, from_bitmask, to_bitmask
from .weights import (
    SPARSE_BITS,
    TILED,
    TiledLayout,
    all_finite,
    check_kept,
    check_packed,
    choose_smallest,
    keep_only,
    pack,
    round_weight,
    rounds,
    squared_sums,
    unpack,
    use_huge_pages,
    weight_shape,
)

__all__ = [
    "BF16_LINES",
    "DTYPES",
    "LOOKUP_LAYOUTS",
    "PANEL_DTYPES",
    "SPARSE_BITS",
    "TILED",
    "_C",
    "AttentionHow",
    "Caches",
    "ChainWeight",
    "Code",
    "Experts",
    "ExpertsSide",
    "Gate",
    "KernelNames",
    "LinearPlan",
    "Lookup",
    "TiledLayout",
    "all_finite",
    "attention",
    "blocks",
    "caches",
    "chain",
    "check_blocks",
    "check_kept",
    "check_packed",
    "choose_smallest",
    "conv_call",
    "cpu",
    "cuda_kernel_table",
    "extension",
    "from_bitmask",
    "keep_only",
    "kernel_table",
    "memory",
    "pack",
    "pool_call",
    "probe",
    "probes",
    "recurrent",
    "round_weight",
    "rounds",
    "run_convs",
    "select_nibbles",
    "squared_sums",
    "table",
    "to_bitmask",
    "transpose_nibbles",
    "unpack",
    "unpack_bits",
    "use_huge_pages",
    "vector",
    "weight_shape",
]
