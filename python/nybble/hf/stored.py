"""What ``save_pretrained`` writes of nybble's layers: a description for config.json, and tensors by name.

Layers that share codes have them under the first of their names in the model, which is that of the embedding, so that the
inner model can be loaded without its head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..checkpoint.index import LayerEntry
from ..checkpoint.model import layer_entries, portable_specs
from ..fusion.block import fused_modules
from ..model.eligible import name_of
from ..nn.composite import CompositeModule
from ..nn.kinds import kind_of, quantized_classes
from ..nn.module import QuantizedModule
from ..weights.form import Form
from ..weights.scheme import Scheme

VERSION = 1
_KEYS = {"version", "layers", "ties", "fused", "fused_int8"}
_NAME = re.compile(r"[\w.]{1,4096}")


def describe(model: nn.Module) -> dict[str, Any]:
    """The layers of a model, those that are alike together; which share codes; and which modules run fused."""
    entries = layer_entries(model)
    usual = _dtype_of(entries)
    groups: dict[tuple[str, str, str, int, str], list[str]] = {}
    for entry in entries:
        key = (entry.kind, entry.scheme, entry.form, entry.stored, "" if entry.dtype == usual else entry.dtype)
        groups.setdefault(key, []).append(entry.name)
    told: dict[str, Any] = {"version": VERSION, "layers": []}
    for (kind, scheme, form, stored, dtype), names in groups.items():
        rest = {"form": form, "stored": stored, "dtype": dtype}
        told["layers"].append(
            {"kind": kind, "scheme": scheme, **{key: one for key, one in rest.items() if one}, "names": names}
        )
    fused = {name: one.int8 for name, one in fused_modules(model).items() if one.first is not None}
    parts: dict[str, Any] = {
        "ties": ties_of(entries),
        "fused": list(fused),
        "fused_int8": [name for name, int8 in fused.items() if int8],
    }
    return told | {key: one for key, one in parts.items() if one}


def ties_of(entries: tuple[LayerEntry, ...]) -> dict[str, str]:
    """Each layer that shares codes -> the first layer with the same."""
    first: dict[str, str] = {}
    ties = {}
    for entry in entries:
        one = first.setdefault(entry.tied_to or entry.name, entry.name)
        if one != entry.name:
            ties[entry.name] = one
    return ties


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by name; codes that are shared once.

    In the place of each dense weight is one number: where nybble was not imported, transformers would leave the layer random
    with a warning, but it refuses a weight of another shape.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, QuantizedModule):
            module.pack()  # else the scales would pass for the model's dtype
    entries = layer_entries(model)
    named = {entry.name: entry for entry in entries}
    state: dict[str, Tensor] = model.state_dict()
    for alias, one in ties_of(entries).items():
        for key in portable_specs(replace(named[one], name=alias)):
            state.pop(key, None)
    for entry in entries:
        state[_dense_name(modules, entry.name)] = torch.zeros(1, dtype=torch.uint8)
    return state


def _dense_name(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name that the weight of a layer has in the dense model."""
    above = name.rpartition(".")[0]
    if isinstance(modules.get(above), CompositeModule):
        return name
    if isinstance(modules.get(above.rpartition(".")[0]), CompositeModule):
        return above
    return f"{name}.{kind_of(modules[name]).weight.key}"


def _dtype_of(entries: tuple[LayerEntry, ...]) -> str:
    """The dtype of most layers, which is the model's."""
    found = [entry.dtype for entry in entries]
    return max(found, key=found.count, default=name_of(torch.float32))


@dataclass(frozen=True)
class StoredLayer:
    """A layer of a saved model. ``dtype``: of its activations, where it is not that of the model, or "". As LayerEntry else."""

    name: str
    kind: str
    scheme: str
    form: str
    stored: int
    dtype: str


@dataclass(frozen=True)
class Description:
    """What ``describe`` says, checked."""

    layers: tuple[StoredLayer, ...]
    ties: Mapping[str, str]
    fused: tuple[str, ...]
    fused_int8: tuple[str, ...]

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Description:
        """Raises CheckpointError, with the field, for what ``describe`` does not write."""
        version = told.get("version")
        if version != VERSION:
            raise _wrong("version", version, f"this nybble reads {VERSION}; update nybble")
        if unknown := told.keys() - _KEYS:
            raise _wrong("stored", sorted(unknown), f"has other keys than {', '.join(sorted(_KEYS))}")
        groups = told.get("layers")
        if not isinstance(groups, list) or not groups:
            raise _wrong("layers", groups, "must be a list of groups of layers")
        layers = tuple(layer for i, group in enumerate(groups) for layer in _group(f"layers[{i}]", group))
        names = [layer.name for layer in layers]
        if len(set(names)) < len(names):
            raise _wrong("layers", max(names, key=names.count), "is there twice")
        ties = told.get("ties", {})
        if not isinstance(ties, dict) or not {*ties, *ties.values()} <= set(names) or {*ties} & {*ties.values()}:
            raise _wrong("ties", ties, "must name layers, and for each the one that has its codes")
        fused, int8 = (_names(key, told.get(key, []), empty=True) for key in ("fused", "fused_int8"))
        return cls(layers, ties, fused, int8)


def _group(where: str, group: object) -> list[StoredLayer]:
    if not isinstance(group, dict):
        raise _wrong(where, group, "must be an object")
    kind, scheme, form, dtype = (group.get(key, "") for key in ("kind", "scheme", "form", "dtype"))
    stored = group.get("stored", 0)
    if kind not in tuple(quantized_classes()):
        raise _wrong(f"{where}.kind", kind, f"must be one of {', '.join(quantized_classes())}")
    if dtype not in ("", "float32", "bfloat16", "float16"):
        raise _wrong(f"{where}.dtype", dtype, "must be float32, bfloat16 or float16")
    if not isinstance(stored, int) or isinstance(stored, bool) or not 0 <= stored < 1 << 40:
        raise _wrong(f"{where}.stored", stored, "must be a number of values")
    try:
        Scheme.parse(scheme)
        Form.parse(form)
    except (TypeError, ValueError) as error:
        raise _wrong(where, (scheme, form), str(error)) from error
    return [
        StoredLayer(name, kind, scheme, form, stored, dtype) for name in _names(f"{where}.names", group.get("names"))
    ]


def _names(where: str, names: object, empty: bool = False) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise _wrong(where, names, "must be a list of names of modules")
    for one in names:
        if not _NAME.fullmatch(one) and not (empty and one == ""):
            raise _wrong(where, one, "must be the name of a module")
    return tuple(names)


def _wrong(where: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.stored: {where}: {str(value)[:80]!r}: {rule}")
