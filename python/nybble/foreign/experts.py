"""Experts: a tensor set for each in files, fused in the model, which is opened into a layer for each weight of each.

Files have gate, up and down projection of each expert; the model of transformers has the first two in one weight.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..nn.experts import Experts
from ..nn.experts_form import Form, form_of, looks_like_experts
from .opened import Layer, Opened, Part
from .weight import ForeignWeight

# What files call the projections, and modules whose names transformers has changed.
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_MOVED = {".block_sparse_moe.": ".mlp."}
_MEMBER = re.compile(rf"(?P<module>.+)\.(?P<expert>\d{{1,6}})\.(?P<role>{'|'.join(_ROLES)})(?P<rest>\.\w+)?")

_One = TypeVar("_One", Layer, Part)


def for_model(opened: Opened, model: nn.Module) -> Opened:
    """The checkpoint with the names of a model, whose experts are opened where theirs are quantized."""
    fused = {name: module for name, module in model.named_modules() if looks_like_experts(module)}
    if not fused:
        return opened
    layers, parts = _renamed(opened.layers, fused), _renamed(opened.parts, fused)
    quantized = {match["module"] for name in layers if (match := _MEMBER.fullmatch(name))}
    for name, module in fused.items():
        if name not in quantized:
            continue
        form = _form(name, module)
        model.set_submodule(name, Experts.from_dense(module))
        layers = _fused(layers, name, form, functools.partial(_joined_layer, interleaved=_interleaved(form)))
        parts = _fused(parts, name, form, functools.partial(_joined_part, interleaved=_interleaved(form)))
    return replace(opened, layers=layers, parts=parts)


def _renamed(named: Mapping[str, _One], fused: Mapping[str, nn.Module]) -> dict[str, _One]:
    moved = {old: new for old, new in _MOVED.items() if any(new in f".{name}" for name in fused)}
    result = {}
    for name, one in named.items():
        for old, new in moved.items():
            name = name.replace(old, new)
        result[name] = one
    return result


def _form(name: str, module: nn.Module) -> Form:
    form = form_of(module)
    if isinstance(form, str):
        raise CheckpointError(f"{name}: {form}")
    if form.gate is None:
        raise CheckpointError(f"{name}: which rows of its first weight are the gate's is not known")
    return form


def _interleaved(form: Form) -> bool:
    return form.gate is not None and form.gate.interleaved


def _fused(
    named: Mapping[str, _One], module: str, form: Form, join: Callable[[str, _One, _One], _One]
) -> dict[str, _One]:
    """The same with the names of opened experts: ``gate_up_proj.3`` for gate_proj and up_proj of expert 3."""
    result: dict[str, _One] = {}
    pairs: dict[str, dict[str, _One]] = {}
    for name, one in named.items():
        match = _MEMBER.fullmatch(name)
        if match is None or match["module"] != module:
            result[name] = one
            continue
        role, end = _ROLES[match["role"]], f".{int(match['expert'])}{match['rest'] or ''}"
        if role == "down":
            result[f"{module}.{form.down}{end}"] = one
        else:
            pairs.setdefault(f"{module}.{form.up}{end}", {})[role] = one
    gated = form.gate is not None and form.gate.gated
    for name, pair in pairs.items():
        if pair.keys() != ({"gate", "up"} if gated else {"up"}):
            raise CheckpointError(
                f"{name}: has {' and '.join(sorted(pair))}, must have {'gate and up' if gated else 'up'}"
            )
        result[name] = join(name, pair["gate"], pair["up"]) if gated else pair["up"]
    return result


def _joined_layer(name: str, gate: Layer, up: Layer, interleaved: bool) -> Layer:
    def read() -> ForeignWeight:
        return _joined(name, gate.read(), up.read(), interleaved)

    return Layer(read, gate.nbytes + up.nbytes)


def _joined_part(name: str, gate: Part, up: Part, interleaved: bool) -> Part:
    return Part(lambda: _rows(gate.read(), up.read(), interleaved), gate.nbytes + up.nbytes)


def _rows(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """The rows of both: first those of the gate, or one of each in turn."""
    return torch.stack((gate, up), 1).flatten(0, 1) if interleaved else torch.cat((gate, up))


def _joined(name: str, gate: ForeignWeight, up: ForeignWeight, interleaved: bool) -> ForeignWeight:
    """One weight of the rows of two."""
    for field in ("shape", "bits", "per_byte", "group_size", "factor", "arithmetic", "flat_shape"):
        first, second = getattr(gate, field), getattr(up, field)
        if first != second or (field == "flat_shape" and first is not None):
            raise CheckpointError(
                f"{name}: gate and up have {field} {first} and {second}: they are one weight in the model"
            )
    for field in ("groups", "book"):
        if not _same(getattr(gate, field), getattr(up, field)):
            raise CheckpointError(f"{name}: gate and up have other {field}: they are one weight in the model")
    if (gate.minimum is None) != (up.minimum is None):
        raise CheckpointError(f"{name}: one of gate and up has no minimum")
    static = _same(gate.input_scale, up.input_scale) and _same(gate.input_zero, up.input_zero)
    return replace(
        gate,
        codes=_rows(gate.codes, up.codes, interleaved),
        scale=_rows(gate.scale, up.scale, interleaved),
        zero=_joined_zero(gate, up, interleaved),
        minimum=None if gate.minimum is None or up.minimum is None else _rows(gate.minimum, up.minimum, interleaved),
        input_scale=gate.input_scale if static else None,
        input_zero=gate.input_zero if static else None,
    )


def _joined_zero(gate: ForeignWeight, up: ForeignWeight, interleaved: bool) -> Tensor | int:
    if isinstance(gate.zero, int) and isinstance(up.zero, int) and gate.zero == up.zero:
        return gate.zero
    return _rows(_zeros(gate), _zeros(up), interleaved)


def _zeros(weight: ForeignWeight) -> Tensor:
    if isinstance(weight.zero, int):
        return torch.full(weight.scale.shape, weight.zero, dtype=torch.int16)
    return weight.zero


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
