"""Which kernels exist: csrc/kernels.def and the reference, as data. What a kernel accepts is data too, so one `why_not`
serves all of them, and the tests derive their cases from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import layouts, native, targets
from .reference import ReferencePlan
from .scheme import GROUP_SIZES, Scheme

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("w8a8", "w8a16", "w4a8", "w4a16")

Plan = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


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
    op: str
    scheme: str  # the family: weight and activation bits
    target: str
    layout: str
    device: str | None  # None: any
    act_dtypes: tuple[torch.dtype, ...]
    out_dtypes: tuple[torch.dtype, ...]
    group_sizes: tuple[int | None, ...]
    panel: int  # number of the activation format, csrc/abi.h
    block_rows: int
    exact: bool  # int32 accumulators: the same bits on every target and thread count
    flushes_subnormals: bool  # products of bfloat16 pairs below 2^-126 count as 0
    built: bool
    make: Callable[[Scheme, int, int], Plan] | None

    def why_not(self, problem: Problem) -> str | None:
        """The first reason that this kernel cannot solve the problem here; None if it can."""
        out_dtype = problem.out_dtype or problem.dtype
        checks = (
            (self.scheme == problem.scheme.family, f"computes {self.scheme}, not {problem.scheme.family}"),
            (self.built and self.make is not None, "not built"),
            (self.target in targets.detect().targets, targets.detect().missing.get(self.target, "")),
            (self.device in (None, problem.device), f"runs on {self.device}, not on {problem.device}"),
            (problem.layout in (None, self.layout), f"reads layout {self.layout}, the weight is {problem.layout}"),
            (problem.dtype in self.act_dtypes, f"takes {_names(self.act_dtypes)}, not {problem.dtype}"),
            (out_dtype in self.out_dtypes, f"gives {_names(self.out_dtypes)}, not {out_dtype}"),
            (problem.scheme.group_size in self.group_sizes, f"has no group_size {problem.scheme.group_size}"),
        )
        return next((reason for holds, reason in checks if not holds), None)


def specs() -> tuple[KernelSpec, ...]:
    """Every linear kernel, the preferred one last."""
    return tuple(spec for spec in all_specs() if spec.op == "linear")


@lru_cache
def all_specs() -> tuple[KernelSpec, ...]:
    """Every kernel of every op, ordered by target."""
    rows = native.kernel_table()
    found = [_reference(family) for family in FAMILIES] + [_compiled(row, _prepare_for(row, rows)) for row in rows]
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
    return targets.detect().missing.get(spec.target) if spec.built else "not built"


def _reference(family: str) -> KernelSpec:
    return KernelSpec(
        name=f"{family}_reference",
        op="linear",
        scheme=family,
        target="torch",
        layout=layouts.PLAIN,
        device=None,
        act_dtypes=FLOATS,
        out_dtypes=FLOATS,
        group_sizes=_group_sizes(family),
        panel=0,
        block_rows=0,
        exact=False,
        flushes_subnormals=False,
        built=True,
        make=ReferencePlan,
    )


def _prepare_for(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The prepare kernel of a row's target, or of the fastest below it that has one."""
    level = targets.NAMES.index(row["target"])
    below = {targets.NAMES.index(r["target"]): r["name"] for r in rows if r["op"] == "prepare"}
    name: str = below[max(at for at in below if at <= level)]
    return name


def _compiled(row: dict[str, Any], prepare: str) -> KernelSpec:
    name, target, family = row["name"], row["target"], row["scheme"]
    bf16 = native.PANEL_DTYPES[row["panel"]] is torch.bfloat16

    def make(scheme: Scheme, out_features: int, in_features: int) -> Plan:
        return native.LinearPlan(name, prepare, scheme, out_features, in_features)

    return KernelSpec(
        name=name,
        op=row["op"],
        scheme=family,
        target=target,
        layout=row["layout"],
        device="cpu",
        act_dtypes=(torch.bfloat16,) if bf16 else FLOATS,
        out_dtypes=(*FLOATS, torch.int32) if family == "w8a8" else FLOATS,
        group_sizes=_group_sizes(family),
        panel=row["panel"],
        block_rows=row["block_rows"],
        exact=family.endswith("a8"),
        flushes_subnormals=bf16,
        built=row["built"],
        make=make if row["op"] == "linear" else None,
    )


def _group_sizes(family: str) -> tuple[int | None, ...]:
    return (None, *GROUP_SIZES) if family.startswith("w4") else (None,)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
