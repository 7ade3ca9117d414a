"""Which kernels exist: csrc/kernels.def, kernels/table.py and the reference, as data. What a kernel accepts is data too, so one `why_not`
serves all of them, and the tests derive their cases from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import layouts, native
from ..kernels.table import KERNELS, TritonKernel
from ..native import KernelNames
from ..weights.scheme import Scheme, numbers_of
from ..weights.sparsity import Block, Sparsity
from . import native_cuda, targets
from .reference import ReferencePlan

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("w8a8", "w8a16", "w4a8", "w4a16")
SPARSE_FAMILIES = (*(f"sp{family}" for family in FAMILIES), "bsw8a8")
# bfloat16 weights: on CPUs the reference alone multiplies with them.
FLOAT_FAMILIES = ("w16a16", "spw16a16")
# The share of zeros from which a layout is packed: below it another is faster (bench, preset sparse-crossover).
# On AVX2 places are slow to follow for more than a few rows, so that they pay later.
LEAST_ZEROS = {"gather8": 0.65, "spw8a8_avx2_gather": 0.85, "spw8a8_avxvnni_gather": 0.85}

# Kernels that disagreed with the reference on this machine, and how: see selfcheck.py.
DISTRUSTED: dict[str, str] = {}


Plan = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One product: y (m, n) = x (m, k) w (n, k)^T. layout None: not packed yet."""

    scheme: Scheme
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str | None = None
    out_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, and what it accepts. `make(scheme, n, k)` gives the callable."""

    name: str
    scheme: str  # the family: weight and activation bits
    target: str
    layout: str
    group_sizes: tuple[int | None, ...]
    make: Callable[[Scheme, int, int], Plan] | None
    op: str = "linear"
    device: str | None = "cpu"  # None: any
    act_dtypes: tuple[torch.dtype, ...] = FLOATS
    out_dtypes: tuple[torch.dtype, ...] = FLOATS
    m_range: tuple[int, int | None] = (1, None)  # tokens; None: any number
    panel: int = 0  # number of the activation format, csrc/abi.h
    block_rows: int = 0
    exact: bool = False  # int32 accumulators: the same bits on every target and thread count
    least_zeros: float = 0.0  # of a weight that is packed for it
    flushes_subnormals: bool = False  # products of bfloat16 pairs below 2^-126 count as 0
    rounds: torch.dtype | None = None  # what it rounds float32 activations to first
    rounds_weight: bool = False  # multiplies with the weight rounded to the activations' dtype
    sparsity: Sparsity | None = None  # the one pattern that it takes; None: any of the family
    built: bool = True
    static: bool = False  # takes activations whose scale is known

    def why_not(self, problem: Problem) -> str | None:
        """The first reason that this kernel cannot solve the problem here; None if it can."""
        out_dtype = problem.out_dtype or problem.dtype
        checks = (
            (self.scheme == problem.scheme.family, f"computes {self.scheme}, not {problem.scheme.family}"),
            (self.static or not problem.scheme.static, "finds a scale for each token, takes no static ones"),
            (
                self.sparsity in (None, problem.scheme.sparsity),
                f"is for {self.sparsity}, not {problem.scheme.sparsity}",
            ),
            (self.built and self.make is not None, "not built"),
            (self.target in targets.detect().targets, targets.detect().missing.get(self.target, "")),
            (self.name not in DISTRUSTED, DISTRUSTED.get(self.name, "")),
            (self.device in (None, problem.device), f"runs on {self.device}, not on {problem.device}"),
            (problem.layout in (None, self.layout), f"reads layout {self.layout}, the weight is {problem.layout}"),
            (problem.dtype in self.act_dtypes, f"takes {_names(self.act_dtypes)}, not {problem.dtype}"),
            (out_dtype in self.out_dtypes, f"gives {_names(self.out_dtypes)}, not {out_dtype}"),
            (self.takes(problem.m), f"is for {_tokens(self.m_range)}, not {problem.m}"),
            (problem.scheme.group_size in self.group_sizes, f"has no group_size {problem.scheme.group_size}"),
            (
                problem.layout is not None or self.least_zeros <= _zeros(problem.scheme),
                f"packed from {self.least_zeros:.0%} zeros on, {problem.scheme} has {_zeros(problem.scheme):.0%}",
            ),
        )
        return next((reason for holds, reason in checks if not holds), None)

    def takes(self, m: int) -> bool:
        """Whether it serves m tokens; none at all are as one."""
        least, most = self.m_range
        return least <= max(m, 1) and (most is None or m <= most)


def specs() -> tuple[KernelSpec, ...]:
    """Every linear kernel, the preferred one last."""
    return tuple(spec for spec in all_specs() if spec.op == "linear")


@lru_cache
def all_specs() -> tuple[KernelSpec, ...]:
    """Every kernel of every op, ordered by target."""
    rows, masks = native.kernel_table(), {layout.mask for layout in layouts.table().values() if layout.mask}
    found = [_reference(family) for family in FAMILIES + SPARSE_FAMILIES + FLOAT_FAMILIES]
    found += [_triton(kernel) for kernel in KERNELS]
    found += [_cuda(row) for row in native.cuda_kernel_table()]
    for row in rows:
        if row["layout"] in masks:
            found.append(_masked(row, rows))
            continue
        found.append(_compiled(row, KernelNames(row["name"], _nearest("prepare", row, rows), row["layout"])))
        if row["layout"] and layouts.find(row["layout"]).mask:
            found.append(_expanding(row, rows))
    return tuple(sorted(found, key=lambda spec: targets.NAMES.index(spec.target)))


def kernels() -> list[dict[str, Any]]:
    """The table: name, op, scheme, target, layout, built, usable here, and why not."""
    rows = []
    for spec in all_specs():
        reason = _why_not_here(spec)
        row = {"name": spec.name, "op": spec.op, "scheme": spec.scheme, "target": spec.target, "layout": spec.layout}
        rows.append({**row, "built": spec.built, "usable": reason is None, "why_not": reason})
    return rows


def _why_not_here(spec: KernelSpec) -> str | None:
    if not spec.built:
        return "not built"
    return targets.detect().missing.get(spec.target) or DISTRUSTED.get(spec.name)


def _reference(family: str) -> KernelSpec:
    return KernelSpec(
        name=f"{family}_reference",
        scheme=family,
        target="torch",
        layout=layouts.PLAIN,
        group_sizes=_group_sizes(family),
        make=ReferencePlan,
        device=None,
        static=family.endswith("a8"),
    )


def _triton(kernel: TritonKernel) -> KernelSpec:
    return KernelSpec(
        name=kernel.name,
        scheme=kernel.family,
        target="triton",
        layout=kernel.layout,
        group_sizes=kernel.group_sizes,
        make=kernel.make if kernel.op == "linear" else None,
        op=kernel.op,
        device="cuda",
        act_dtypes=kernel.act_dtypes,
        out_dtypes=kernel.out_dtypes,
        m_range=(kernel.min_m, None),
        exact=kernel.family.endswith("a8"),
        rounds_weight=kernel.rounds_weight,
        sparsity=kernel.sparsity,
    )


def _cuda(row: Row) -> KernelSpec:
    scheme = Scheme.parse(row["scheme"])

    def make(scheme: Scheme, out_features: int, in_features: int) -> Plan:
        return native_cuda.CudaPlan(row["name"], row["layout"], scheme, out_features, in_features)

    return KernelSpec(
        name=row["name"],
        scheme=scheme.family,
        target=row["target"],
        layout=row["layout"],
        group_sizes=_group_sizes(scheme.family),
        make=make,
        device="cuda",
        act_dtypes=FLOATS[:2] if scheme.weight_bits == 16 else FLOATS,  # both operands are of one type
        m_range=(row["min_m"], row["max_m"] or None),
        rounds=torch.bfloat16 if scheme.act_bits == 16 else None,
        sparsity=scheme.sparsity,
        # w4a8_sm80 adds the groups of each part of K on their own.
        exact=scheme.act_bits == 8 and not (scheme.weight_bits == 4 and row["target"] == "sm80"),
        built=row["built"],
    )


def _nearest(op: str, row: Row, rows: list[Row], **same: object) -> str:
    """The row of an op, of a row's target or of the fastest below it that has one, that has the same values."""
    level = _level(row)
    fits = [r for r in rows if r["op"] == op and _level(r) <= level and all(r[key] == same[key] for key in same)]
    name: str = max(fits, key=_level)["name"]
    return name


def _level(row: Row) -> int:
    return targets.NAMES.index(row["target"])


def _expanding(row: Row, rows: list[Row]) -> KernelSpec:
    """A dense kernel, for weights whose zeros are left out."""
    layout = layouts.find(row["layout"]).mask
    names = KernelNames(row["name"], _nearest("prepare", row, rows), layout, expand=_nearest("expand", row, rows))
    return _compiled({**row, "name": f"sp{row['name']}", "scheme": f"sp{row['scheme']}", "layout": layout}, names)


def _masked(row: Row, rows: list[Row]) -> KernelSpec:
    """A kernel of a mask layout, and the dense one that takes over where there are many rows."""
    dense = _nearest("linear", row, rows, scheme=row["scheme"].removeprefix("sp"), panel=row["panel"])
    names = KernelNames(
        dense,
        _nearest("prepare", row, rows),
        row["layout"],
        expand=_nearest("expand", row, rows),
        few=row["name"],
    )
    return _compiled(row, names)


def _compiled(row: Row, names: KernelNames) -> KernelSpec:
    family = row["scheme"]
    bf16 = native.PANEL_DTYPES[row["panel"]] is torch.bfloat16

    def make(scheme: Scheme, out_features: int, in_features: int) -> Plan:
        return native.LinearPlan(names, scheme, out_features, in_features)

    return KernelSpec(
        name=row["name"],
        scheme=family,
        target=row["target"],
        layout=row["layout"],
        group_sizes=_group_sizes(family),
        make=make if row["op"] == "linear" else None,
        op=row["op"],
        act_dtypes=(torch.bfloat16,) if bf16 else FLOATS,
        out_dtypes=(*FLOATS, torch.int32) if family.endswith("w8a8") else FLOATS,
        panel=row["panel"],
        block_rows=row["block_rows"],
        exact=family.endswith("a8"),
        least_zeros=LEAST_ZEROS.get(row["name"], LEAST_ZEROS.get(row["layout"], 0.0)),
        flushes_subnormals=bf16,
        built=row["built"],
        static=family.endswith("a8"),
    )


def _group_sizes(family: str) -> tuple[int | None, ...]:
    return (None, *numbers_of(family)[0].group_sizes) if family else (None,)


def _zeros(scheme: Scheme) -> float:
    """The share of zeros that a scheme names; of blocks it names none."""
    return 0.0 if scheme.sparsity is None or isinstance(scheme.sparsity, Block) else scheme.sparsity.zeros


def _tokens(m_range: tuple[int, int | None]) -> str:
    least, most = m_range
    return f"{least} to {most} tokens" if most else f"{least} tokens and more"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
