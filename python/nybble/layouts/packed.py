"""The table of layouts, and what can be asked of a layout by its name.

A file of this room holds the rows of a family of layouts. A plug-in adds rows by the entry points of the group
nybble.layouts.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

from torch import Tensor

from .. import plugins
from ..weights.form import USUAL, split_layout
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from . import blocks, frag, plain, quads, rows, sparse, tiles
from .layout import Layout, Spec

_FAMILIES = (plain, tiles, sparse, rows, frag, quads, blocks)


@lru_cache
def table() -> dict[str, Layout]:
    """Every layout by name: nybble's own, then those of plug-ins.

    Raises:
        plugins.PluginError: a plug-in breaks a rule.
    """
    built_in = [row for family in _FAMILIES for row in family.LAYOUTS]
    found = plugins.rows("nybble.layouts", Layout, built_in, lambda row: row.incomplete())
    return {row.name: row for row in found}


def find(layout: str) -> Layout:
    """The layout of a name, which may end in a form.

    Raises:
        ValueError: there is none, or it does not hold weights of the form.
    """
    base, form = split_layout(layout)
    row = table().get(base)
    if row is None:
        raise ValueError(f"layout={layout!r}: unknown; must be one of {', '.join(table())}")
    if form == USUAL:
        return row
    if row.of_form is None:
        raise ValueError(f"layout={layout!r}: {base} holds no weights of the form {form}")
    return row.of_form(form)


def padded(layout: str, scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """N and K with the padding of the layout."""
    return find(layout).padded(scheme, out_features, in_features)


def padded_in_features(layout: str, scheme: Scheme, in_features: int) -> int:
    """K with the padding of the layout."""
    return padded(layout, scheme, 1, in_features)[1]


def sections(layout: str, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    """Name, shape and dtype of each section of a packed weight, in order."""
    return find(layout).spec(scheme, out_features, in_features)


def offsets(layout: str, scheme: Scheme, out_features: int, in_features: int) -> dict[str, int]:
    """The first byte of each section of a packed weight; "" is the end of the last one."""
    return find(layout).offsets(scheme, out_features, in_features)


def packed_nbytes(layout: str, scheme: Scheme, out_features: int, in_features: int) -> int:
    """Bytes of the packed weight."""
    return offsets(layout, scheme, out_features, in_features)[""]


def views(packed: Tensor, layout: str, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The sections of a packed weight by name, sharing its memory."""
    return find(layout).views(packed, scheme, out_features, in_features)


def pack(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> Tensor:
    """The packed weight, uint8: by the definition in torch where the layout has one. ops.pack_as is faster."""
    row = find(layout)
    return (row.pack if row.sections is None else row.pack_sections)(quantized, scheme, in_features)


def unpack(packed: Tensor, layout: str, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """The exact inverse of pack."""
    row = find(layout)
    return (row.unpack if row.sections is None else row.unpack_sections)(packed, scheme, out_features, in_features)


def aligned(packed: Tensor) -> Tensor:
    """The packed weight at a multiple of 16 bytes, as the kernels for GPUs need it: copied if necessary."""
    address = packed.data_ptr()
    if address % 16 == 0:
        return packed
    warnings.warn(
        f"packed: its address {address:#x} is not a multiple of 16, so every call copies it; "
        "use packed.clone() once instead",
        RuntimeWarning,
        stacklevel=3,
    )
    return packed.clone()
