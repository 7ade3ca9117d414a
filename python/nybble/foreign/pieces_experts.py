"""Opened experts as the linear layers that files have: gate, up and down projection of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from ..nn.experts import Experts
from ..nn.linear import Linear
from .held import Held

_NAMES = ("gate_proj", "up_proj", "down_proj")


def why_not(model: nn.Module, module: Experts) -> str | None:
    """Why a module's experts cannot be written one by one, or None."""
    gate = module.form.gate
    if gate is None or not gate.gated or gate.interleaved:
        return "experts whose first weight is not a gate above an up projection"
    if any(not isinstance(layer, Linear) or layer.bias is not None for layer in module.members()):
        return "experts that are not all quantized, or have biases"
    if not _reads_one_by_one(model):
        return f"transformers reads no *.experts.0.{_NAMES[0]} into this model"
    return None


def _reads_one_by_one(model: nn.Module) -> bool:
    """Whether transformers fuses the projections of single experts into the model's weights."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or "transformers" not in sys.modules:
        return False
    known: Any = import_module("transformers.conversion_mapping")
    sources = [name for row in known.get_checkpoint_conversion_mapping(kind) or () for name in row.source_patterns]
    return all(any(source.endswith(f".experts.*.{name}.weight") for source in sources) for name in _NAMES)


def held(name: str, module: Experts) -> Iterator[Held]:
    """The projections of each expert."""
    ups, downs = (module.get_submodule(part).children() for part in (module.form.up, module.form.down))
    for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
        assert isinstance(up, Linear) and isinstance(down, Linear)  # noqa: S101, PT018
        half = up.out_features // 2
        yield Held(f"{name}.{i}.gate_proj", _rows(up, slice(half)))
        yield Held(f"{name}.{i}.up_proj", _rows(up, slice(half, None)))
        yield Held(f"{name}.{i}.down_proj", down)


def _rows(layer: Linear, rows: slice) -> Linear:
    part = layer.quantized().rows(rows)
    return type(layer).from_quantized(part, layer.in_features, None, layer.scheme, layer.dtype, layer.act())
