"""Which kernels exist: the reference, kernels/table.py, csrc/kernels.def, csrc/cuda/kernels.def, and those of plug-ins.

A plug-in adds kernels by entry points of the group nybble.kernels, whose values are KernelSpecs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from .. import layouts, native, plugins
from ..kernels.table import KERNELS
from ..native import KernelNames
from ..weights.form import USUAL, Form
from ..weights.scheme import Scheme, activations_of, families, numbers_of
from . import native_cuda, targets
from .reference import ReferencePlan
from .spec import DISTRUSTED, FLOATS, GPU_GROUP_SIZES, KernelSpec, Plan

Row = dict[str, Any]

# Where a compiled kernel differs from what its row says.
_EXCEPTIONS: dict[str, Row] = {
    # Following places is slow on AVX2 for more than a few rows of activations, so it pays from more zeros on.
    "spw8a8_avx2_gather": {"least_zeros": 0.85},
    "spw8a8_avxvnni_gather": {"least_zeros": 0.85},
    # By counting (docs/arm.md): from here on about as fast as dense kernels with many rows, and faster with few.
    "spw8a8_neon_gather": {"least_zeros": 0.7},
    "spw8a8_neondot_gather": {"least_zeros": 0.9},
    # It multiplies whole groups, and is slower than AVX-512 VNNI with smaller ones (Emerald Rapids, 64 to 256 rows).
    "w8a8_amx_groups": {"group_sizes": (128,)},
    "w8a7_amx_groups": {"group_sizes": (128,)},
    # From fewer rows on than w8a16_amx, which takes the weights with one scale a row.
    "w8a16_amx_groups": {"group_sizes": (16, 32, 64, 128)},
    # It adds the groups of each part of K on their own.
    "w4a8_sm80": {"exact": False},
}
# What a row of csrc/kernels.def says of a KernelSpec.
_COLUMNS = ("name", "scheme", "target", "layout", "op", "panel", "block_rows", "built")


def specs() -> tuple[KernelSpec, ...]:
    """Every linear kernel, the preferred one last."""
    return tuple(spec for spec in all_specs() if spec.op == "linear")


@lru_cache
def all_specs() -> tuple[KernelSpec, ...]:
    """Every kernel of every op, ordered by target.

    Raises:
        plugins.PluginError: a plug-in breaks a rule.
    """
    built_in = [*_references(), *KERNELS, *map(_cuda, native.cuda_kernel_table()), *_compiled_kernels()]
    built_in = [replace(spec, **_EXCEPTIONS.get(spec.name, {})) for spec in built_in]
    found = plugins.rows("nybble.kernels", KernelSpec, built_in, _unknown_part)
    added = [replace(spec, from_plugin=True) for spec in found[len(built_in) :]]
    return tuple(sorted((*built_in, *added), key=lambda spec: targets.names().index(spec.target)))


def compiled(op: str) -> list[str]:
    """The names of the compiled kernels of an op without a scheme that can run here, the fastest last."""
    here = targets.detect().targets
    return [spec.name for spec in all_specs() if spec.op == op and spec.built and spec.target in here]


def fastest(op: str) -> str:
    """The last of them."""
    return compiled(op)[-1]


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


def _unknown_part(spec: KernelSpec) -> str | None:
    """The field of a plug-in's kernel that no table knows."""
    for field, value, known in (
        ("scheme", spec.scheme, families()),
        ("target", spec.target, targets.names()),
        ("layout", spec.layout, tuple(layouts.table())),
        ("op", spec.op, ("linear",)),
    ):
        if value not in known:
            return f"has {field}={value!r}: must be one of {', '.join(known)}"
    return "has make=None: must be callable" if spec.make is None else None


def _references() -> Iterator[KernelSpec]:
    for family in families():
        codes = activations_of(family).quantized
        yield KernelSpec(
            f"{family}_reference",
            family,
            "torch",
            layouts.PLAIN,
            ReferencePlan,
            device=None,
            static=codes,
            ordered=True,
            scales=() if family.startswith(("sp", "bs")) else numbers_of(family)[0].other_scales,
            minimum=numbers_of(family)[0].minimum,
        )


def _cuda(row: Row) -> KernelSpec:
    """A kernel of csrc/cuda/kernels.def."""
    name, scheme, layout = row["name"], Scheme.parse(row["scheme"]), row["layout"]
    return KernelSpec(
        name,
        scheme.family,
        row["target"],
        layout,
        partial(native_cuda.CudaPlan, name, layout),
        device="cuda",
        group_sizes=GPU_GROUP_SIZES if scheme.weight_bits == 4 else None,
        act_dtypes=FLOATS[:2] if scheme.weight_bits == 16 else FLOATS,  # both operands are of one type
        m_range=(row["min_m"], row["max_m"] or None),
        rounds=torch.bfloat16 if scheme.act_bits == 16 else None,
        sparsity=scheme.sparsity,
        exact=scheme.act_bits == 8,
        fixed_order=True,
        built=row["built"],
    )


def _compiled_kernels() -> Iterator[KernelSpec]:
    """The kernels of csrc/kernels.def. Each dense one also multiplies sparse weights, line by line."""
    rows, known = native.kernel_table(), layouts.table()
    masks = {layout.mask for layout in known.values() if layout.mask}
    for row in rows:
        if row["layout"] in masks:
            yield _masked(row, rows)
            continue
        yield _compiled(row, KernelNames(row["name"], _nearest("prepare", row, rows), row["layout"]))
        if row["layout"] and known[row["layout"]].mask and f"sp{row['scheme']}" in families():
            yield _expanding(row, rows, known[row["layout"]].mask)
        yield from _narrower(row, rows)


def _nearest(op: str, row: Row, rows: list[Row], **same: object) -> str:
    """The kernel of an op with the same values, of the row's target, or else of the fastest below it that has one."""
    level = _level(row)
    fits = [r for r in rows if r["op"] == op and _level(r) <= level and all(r[key] == same[key] for key in same)]
    name: str = max(fits, key=_level)["name"]
    return name


def _level(row: Row) -> int:
    return targets.names().index(row["target"])


def _expanding(row: Row, rows: list[Row], layout: str) -> KernelSpec:
    """A dense kernel, for sparse weights that are expanded to its layout."""
    names = KernelNames(row["name"], _nearest("prepare", row, rows), layout, expand=_nearest("expand", row, rows))
    return _compiled({**row, "name": f"sp{row['name']}", "scheme": f"sp{row['scheme']}", "layout": layout}, names)


def _narrower(row: Row, rows: list[Row]) -> Iterator[KernelSpec]:
    """A dense kernel, for activations of fewer bits: their codes are codes of more bits too. Not where the target has a
    kernel of its own for them."""
    for family in families():
        if not _is_narrower(family, row["scheme"]):
            continue
        mine = family, row["target"], row["layout"]
        if not any((other["scheme"], other["target"], other["layout"]) == mine for other in rows):
            names = KernelNames(row["name"], _nearest("prepare", row, rows), row["layout"])
            yield _compiled({**row, "name": row["name"].replace(row["scheme"], family), "scheme": family}, names)


def _is_narrower(family: str, than: str) -> bool:
    """Whether a family differs from another in that its activations have fewer bits."""
    if not than or not activations_of(than).quantized:
        return False
    act, wide = activations_of(family), activations_of(than)
    return act.bits < wide.bits and family.removesuffix(act.name) == than.removesuffix(wide.name)


def _masked(row: Row, rows: list[Row]) -> KernelSpec:
    """A kernel of a mask layout, with the dense kernel that takes over for many rows of activations."""
    dense = _nearest("linear", row, rows, scheme=row["scheme"].removeprefix("sp"), panel=row["panel"])
    prepare, expand = _nearest("prepare", row, rows), _nearest("expand", row, rows)
    return _compiled(row, KernelNames(dense, prepare, row["layout"], expand=expand, few=row["name"]))


def _compiled(row: Row, names: KernelNames) -> KernelSpec:
    codes = bool(row["scheme"]) and activations_of(row["scheme"]).quantized
    bf16 = native.PANEL_DTYPES[row["panel"]] is torch.bfloat16
    return KernelSpec(
        **{key: row[key] for key in _COLUMNS},
        make=partial(_plan, names) if row["op"] == "linear" else None,
        act_dtypes=(torch.bfloat16,) if bf16 else FLOATS,
        m_range=(row["least_rows"], None),
        out_dtypes=(*FLOATS, torch.int32) if codes and _gives_sums(row) else FLOATS,
        exact=codes,
        least_zeros=layouts.find(row["layout"]).least_zeros if row["layout"] else 0.0,
        flushes_subnormals=bf16,
        rounds_book=bf16,
        static=codes,
        ordered=True,
        scales=_scales(row),
        minimum=bool(_scales(row)) and row["panel"] != native.BF16_LINES,
    )


def _gives_sums(row: Row) -> bool:
    """Whether a product has one int32 sum: all of K has one scale, and weights have 8 bits."""
    return numbers_of(row["scheme"])[0].bits == 8 and layouts.find(row["layout"]).of_form is None


def _scales(row: Row) -> tuple[torch.dtype, ...]:
    """Dtypes of scales that a compiled kernel reads, besides the usual one: all that its layout holds."""
    if not row["layout"] or layouts.find(row["layout"]).of_form is None:
        return ()
    return numbers_of(row["scheme"])[0].other_scales


def _plan(names: KernelNames, scheme: Scheme, out_features: int, in_features: int, form: Form = USUAL) -> Plan:
    return native.LinearPlan(names, scheme, out_features, in_features, form)
