"""Old constants and functions that are no single name any more: ``_moved`` finds them here for one release.

The docstring of each is what the warning says to use instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from .dispatch.registry import all_specs
from .layouts import PLAIN, table
from .text import Table
from .weights.scheme import Scheme, families
from .weights.weight_type import weight_types


def group_sizes() -> tuple[int, ...]:
    """nybble.weights.weight_type.weight_types()["w4"].group_sizes"""
    return weight_types()["w4"].group_sizes


def dense_families() -> tuple[str, ...]:
    """nybble.weights.scheme.families(), without those of sparse and of 16-bit weights, and of codes of a table"""
    return tuple(
        family for family in families() if family.startswith("w") and "w16" not in family and "nf" not in family
    )


def sparse_families() -> tuple[str, ...]:
    """nybble.weights.scheme.families(), those that start with sp or bs, without those of 16-bit weights"""
    return tuple(family for family in families() if not family.startswith("w") and "w16" not in family)


def float_families() -> tuple[str, ...]:
    """nybble.weights.scheme.families(), those of 16-bit weights"""
    return tuple(family for family in families() if "w16" in family)


def least_zeros() -> dict[str, float]:
    """Layout.least_zeros of each row of nybble.layouts.table(), KernelSpec.least_zeros of each of registry.all_specs()"""
    layouts = {name: row.least_zeros for name, row in table().items() if row.least_zeros}
    return layouts | {spec.name: spec.least_zeros for spec in all_specs() if spec.least_zeros}


def mask_of() -> dict[str, str]:
    """Layout.mask of each row of nybble.layouts.table()"""
    return {name: row.mask for name, row in table().items() if row.mask}


def masks() -> tuple[str, ...]:
    """Layout.mask of each row of nybble.layouts.table()"""
    return tuple(mask_of().values())


def in_torch() -> tuple[str, ...]:
    """the rows of nybble.layouts.table() whose own_pack is None"""
    return tuple(name for name, row in table().items() if row.own_pack is None)


def gpu_layouts() -> tuple[str, ...]:
    """the rows of nybble.layouts.table() whose own_pack is None, without PLAIN"""
    return tuple(name for name in in_torch() if name != PLAIN)


def text_table(rows: Sequence[Sequence[str]], left_aligned: Collection[int]) -> list[str]:
    """nybble.text.Table(rows, left_aligned).lines()"""
    return Table(rows, left_aligned, width=None).lines()


def group_scale(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """nybble.Scheme.weight_type.scales(low, high, symmetric)"""
    return scheme.weight_type.scales(low, high, scheme.symmetric)


def group_codes(values: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """nybble.Scheme.weight_type.nearest(values, scale, zero)"""
    return scheme.weight_type.nearest(values, scale, zero)
