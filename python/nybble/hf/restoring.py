"""Loads a model that nybble quantized and ``save_pretrained`` wrote: transformers reads the tensors into nybble's modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..checkpoint.index import LayerEntry
from ..checkpoint.model import portable_specs
from ..checkpoint.restore import check_fits
from ..fusion.block import fuse_again
from ..layouts.portable import from_portable
from ..model.eligible import bias_of, dense_weight, is_linear_like, name_of
from ..model.opened import opened
from ..model.walk import named_modules, sites, swap
from ..nn.kinds import quantized_classes
from ..nn.module import QuantizedModule
from ..weights.activations import ActScale
from .stored import Description, StoredLayer
from .work import Work, forget_ties, holders_of, ignore_unexpected, mark_around, names_in


class Restoring(Work):
    """See Work. The modules have the stored tensors, on the meta device until they are loaded, and are then packed.

    Raises CheckpointError where the description is damaged, or does not fit the model.
    """

    def __init__(self, model: Any, stored: Mapping[str, Any]) -> None:
        self.told = Description.parse(stored)
        self.names = names_in(model, [layer.name for layer in self.told.layers])
        if not self.names:
            raise CheckpointError(
                f"{self.told.layers[0].name}: the model has no such module, nor any other of the file"
            )
        self.entries: dict[str, LayerEntry] = {}
        inside = set(self.names.values())

        def has_layers(names: tuple[str, ...]) -> bool:
            return any(one.startswith(f"{name}.") for one in inside for name in names)

        with opened(model, only=has_layers), torch.no_grad():
            self._swap(model)
        forget_ties(model, inside)
        mark_around(model, inside)
        ignore_unexpected(model, _markers((layer.name for layer in self.told.layers), self.names))

    def _swap(self, model: Any) -> None:
        modules = dict(named_modules(model))
        places = {id(site.module): site for site in sites(model)}
        new: dict[int, QuantizedModule] = {}
        layers = {layer.name: layer for layer in self.told.layers if layer.name in self.names}
        for layer in sorted(layers.values(), key=lambda layer: layer.name in self.told.ties):
            mine = self.names[layer.name]
            old = modules.get(mine)
            if old is None or not is_linear_like(old):
                raise CheckpointError(f"{mine}: a quantized layer in the checkpoint, the model has no such layer")
            self.entries[layer.name] = entry = _entry(layer, mine, old)
            if id(old) in new:
                continue  # one module with two names
            new[id(old)] = module = _empty(entry, old)
            first = self.told.ties.get(layer.name)
            if first is not None and first not in layers:
                raise CheckpointError(f"{first}: has the codes of {layer.name}, and the model has no such module")
            specs = _specs(entry)
            if first is not None:
                specs = {key: one for key, one in specs.items() if key not in _specs(self.entries[first])}
            module.hold_unpacked(
                {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in specs.items()}
            )
        swap((places[key], one) for key, one in new.items())

    def modules(self, model: Any) -> Iterator[nn.Module]:
        """As Work.modules."""
        return holders_of(model, self.names.values())

    def finish(self, model: Any) -> None:
        """Pack the modules, and tie those that share codes."""
        modules = dict(named_modules(model))
        groups: dict[str, list[str]] = {}
        for name in self.entries:
            groups.setdefault(self.told.ties.get(name, name), []).append(name)
        for first, names in groups.items():
            same = (modules[self.names[name]] for name in (first, *names))
            self._pack(first, list({id(module): module for module in same}.values()))
        mine = names_in(model, self.told.fused)
        fuse_again(model, mine.values(), [mine[name] for name in self.told.fused_int8 if name in mine])

    def _pack(self, first: str, layers: list[Any]) -> None:
        """layers: those that share the codes of the first."""
        entry, holder = self.entries[first], layers[0]
        held = _loaded(entry, holder, _specs(entry))
        try:
            codes = from_portable(held, holder.scheme, entry.out_features, entry.in_features)
            leader = next((layer for layer in layers if layer.multiplies), holder)
            own = held if leader is holder else _loaded(entry, leader, leader._parameters)
            act = ActScale.of_tensors(own, leader.scheme.act_type) if leader.scheme.static else None
        except ValueError as error:
            raise CheckpointError(f"{entry.name}.{error}") from error
        leader.hold(codes, act)
        for layer in layers:
            if layer is not leader:
                layer.tie_to(leader)


def _entry(layer: StoredLayer, mine: str, old: nn.Module) -> LayerEntry:
    """A stored layer with the shape that it has in the model."""
    weight = dense_weight(old)
    if weight.dim() != 2:
        raise CheckpointError(f"{mine}: its weight has {weight.dim()} dimensions in the model, must have 2")
    n, k = weight.shape
    dtype, bias = name_of(weight.dtype), bias_of(old) is not None
    entry = LayerEntry(mine, layer.kind, layer.scheme, k, n, bias, dtype, layer.stored, None, layer.form)
    check_fits(entry, old)
    return replace(entry, dtype=layer.dtype or dtype)


def _empty(entry: LayerEntry, old: nn.Module) -> QuantizedModule:
    cls = quantized_classes()[entry.kind]
    try:
        new = cls.on_meta(entry.out_features, entry.in_features, entry.scheme, getattr(torch, entry.dtype))
    except ValueError as error:
        raise CheckpointError(f"{entry.name}: {error}") from error
    new.adopt(old).bias = bias_of(old)
    return new.train(old.training)


def _specs(entry: LayerEntry) -> dict[str, Any]:
    """Shape and dtype of the tensors of a layer, without its name."""
    return {key.removeprefix(f"{entry.name}."): spec for key, spec in portable_specs(entry).items()}


def _loaded(entry: LayerEntry, module: Any, specs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that transformers has read into a module. It may have given some scales a wider dtype."""
    known = _specs(entry)
    found = {}
    for key in specs:
        value = module._parameters.get(key)
        if key == "bias" or value is None:
            continue
        if not getattr(value, "_is_hf_initialized", False):
            raise CheckpointError(f"{entry.name}.{key}: is missing in the checkpoint")
        found[key] = value.detach().to(known[key][1]) if key in known else value.detach()
    return found


def _markers(names: Iterable[str], mine: Mapping[str, str]) -> Iterator[str]:
    """Patterns of the numbers in the place of dense weights, which are no news to transformers; see stored.state_of."""
    for name in names:
        one = mine.get(name, name)
        yield rf"^(\w+\.)?{re.escape(one)}(\.weight)?$"
        yield rf"^{re.escape(one.rpartition('.')[0])}$"
