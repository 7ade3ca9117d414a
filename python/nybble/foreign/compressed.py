"""compressed-tensors, the files of llm-compressor: which layers have which of its layouts, and with which settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint.files import CheckpointError
from . import compressed_dense as dense
from . import compressed_float as floats
from . import compressed_marlin as marlin
from . import compressed_sparse as sparse
from .compressed_setting import FORMATS, Context, dense_words, settings
from .opened import Opened, Part, opened
from .source import Source
from .tensors import Tensors
from .weight import ForeignWeight

_CACHE = tuple(f".{one}_{part}" for one in "qkv" for part in ("scale", "zero_point"))
_STATIC = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class _Layout(NamedTuple):
    """A module that has the tensors ``marks`` (``weight:uint8``: of that dtype) has this layout, if none before it in the table."""

    marks: frozenset[str]
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[str, Context], ForeignWeight]


class _FloatLayout(NamedTuple):
    """Likewise, for a layout of float weights with zeros left out."""

    marks: frozenset[str]
    needed: tuple[str, ...]
    read: Callable[[str, Context], Tensor]
    optional: tuple[str, ...] = ()


def _layout(marks: str, needed: str, optional: str, read: Callable[[str, Context], ForeignWeight]) -> _Layout:
    return _Layout(frozenset(marks.split()), tuple(needed.split()), (*optional.split(), *_STATIC), read)


_LAYOUTS: tuple[_Layout | _FloatLayout, ...] = (
    _layout("weight_packed:uint8", "weight_packed weight_scale", "weight_global_scale input_global_scale", floats.four),
    _layout("weight:float8_e4m3fn weight_scale", "weight weight_scale", "", floats.eight),
    _layout("scale_packed", "weight_packed scale_packed meta", "", marlin.marlin24),
    _layout("weight_packed", "weight_packed weight_scale weight_shape", "weight_zero_point weight_g_idx", dense.packed),
    _FloatLayout(frozenset({"row_offsets"}), ("compressed", "bitmask", "shape", "row_offsets"), sparse.bitmask_floats),
    _layout("compressed weight_scale", "compressed bitmask shape weight_scale", "weight_zero_point", sparse.codes24),
    _FloatLayout(frozenset({"compressed"}), ("compressed", "bitmask", "shape"), sparse.floats24),
    _layout("weight_scale", "weight weight_scale", "weight_zero_point weight_g_idx", dense.plain),
)
_PARTS = {part for layout in _LAYOUTS for part in (*layout.needed, *layout.optional)}
_ALONE = {"weight", "shape", *_STATIC}  # endings that other modules may have


def detect(source: Source) -> bool:
    return source.method == "compressed-tensors"


def read_file(source: Source) -> Opened:
    _check_formats(source)
    tensors = Tensors(source.path)
    context = Context(tensors, settings(source), dense_words(source))
    modules, layouts = _modules(tensors)
    if not modules:
        raise CheckpointError(
            f"{source.path}: says compressed-tensors, but has no tensor *.weight_scale, *.scale_packed or *.compressed"
        )
    quantized = {name: layout for name, layout in layouts.items() if isinstance(layout, _Layout)}
    result = opened(source, tensors, modules, lambda name: quantized[name].read(name, context))
    _check_rest(tensors, result.parts)
    floats = {
        f"{name.removesuffix('.weight')}.weight": Part(
            functools.partial(layout.read, name, context), tensors.nbytes(modules[name].values())
        )
        for name, layout in layouts.items()
        if isinstance(layout, _FloatLayout)
    }
    layers = {name: layer for name, layer in result.layers.items() if name in quantized}
    parts, notes = _without_cache(source, {**result.parts, **floats})
    return replace(result, layers=layers, parts=parts, notes=notes)


def _without_cache(source: Source, parts: dict[str, Part]) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Tensors without the scales of a quantized cache of keys and values, which stays as floats, and what is said of them."""
    scheme = source.quantization.get("kv_cache_scheme")
    left = [name for name in parts if name.endswith(_CACHE)] if scheme else []
    if not left:
        return parts, ()
    note = f"{len(left)} scales of a quantized cache of keys and values, such as {left[0]}, are not used: the cache has floats"
    return {name: part for name, part in parts.items() if name not in left}, (note,)


def _modules(tensors: Tensors) -> tuple[dict[str, dict[str, str]], dict[str, _Layout | _FloatLayout]]:
    """Module -> its tensors, and its layout."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors.entries:
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            found.setdefault(module, {})[part] = name
    modules, layouts = {}, {}
    for module, parts in found.items():
        dtypes = {f"{part}:{str(tensors.entries[name].dtype).removeprefix('torch.')}" for part, name in parts.items()}
        layout = next((row for row in _LAYOUTS if row.marks <= {*parts, *dtypes}), None)
        if layout is None:
            if wrong := sorted(parts.keys() - _ALONE):
                raise CheckpointError(f"{module}.{wrong[0]}: belongs to no layout of weights that is read")
            continue
        if lost := [part for part in layout.needed if part not in parts]:
            raise CheckpointError(f"{module}.{lost[0]}: is missing, but there is {next(iter(parts.values()))}")
        if extra := sorted(parts.keys() - {*layout.needed, *layout.optional}):
            raise CheckpointError(f"{module}.{extra[0]}: does not go with {module}.{layout.needed[0]}")
        modules[module], layouts[module] = parts, layout
    return modules, layouts


def _check_rest(tensors: Tensors, parts: Any) -> None:
    for name in parts:
        if name.endswith(".weight") and not tensors.entries[name].dtype.is_floating_point:
            raise CheckpointError(f"{name}: is {tensors.entries[name].dtype}, but has no weight_scale")


def _check_formats(source: Source) -> None:
    told = [source.quantization.get("format")]
    groups = source.quantization.get("config_groups") or {}
    if isinstance(groups, dict):
        told += [group.get("format") for group in groups.values() if isinstance(group, dict)]
    for name in told:
        if name is not None and name not in FORMATS:
            raise CheckpointError(f"{source.path}: format {name!r}: must be one of {', '.join(FORMATS)}")
    pruned = source.quantization.get("sparsity_config") or {}
    if not isinstance(pruned, dict) or pruned.get("format", "dense") not in sparse.FORMATS:
        raise CheckpointError(f"{source.path}: sparsity_config: must have a format of {', '.join(sparse.FORMATS)}")
