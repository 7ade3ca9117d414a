"""What a checkpoint stores of a model: its quantized layers, its other tensors, and which of them share memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layouts.portable import from_portable, spec_of, stored_in
from ..model.eligible import name_of
from ..model.walk import named_modules, region
from ..nn.module import QuantizedModule
from ..nn.state import outlined
from ..weights.form import Form
from ..weights.scheme import Scheme
from .index import DTYPES as LAYER_DTYPES
from .index import LayerEntry
from .tensors import DTYPES, Spec
from .writing import Piece


@dataclass(frozen=True)
class Slot:
    """A parameter or persistent buffer under one of its names, and the dictionary that holds it."""

    name: str
    held_in: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that the slot holds now."""
        return cast(Tensor, self.held_in[self.key])


def slots(name: str, module: nn.Module) -> Iterator[Slot]:
    """The slots of one module without its children. Of a quantized layer, only the bias."""
    prefix = f"{name}." if name else ""
    for held_in in (module._parameters, module._buffers):
        for key, tensor in held_in.items():
            if tensor is None or key in module._non_persistent_buffers_set:
                continue
            if not isinstance(module, QuantizedModule) or key == "bias":
                yield Slot(prefix + key, held_in, key)


def portable_specs(entry: LayerEntry) -> dict[str, Spec]:
    """Shape and dtype of the portable tensors of a layer, by full name."""
    size = entry.out_features, entry.in_features
    spec = spec_of(Scheme.parse(entry.scheme), *size, entry.stored, Form.parse(entry.form))
    return {f"{entry.name}.{key}": value for key, value in spec.items()}


def layer_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The quantized layers of a model, one entry for each name. Raises ValueError if one cannot be saved."""
    entries: list[LayerEntry] = []
    layers = [(name, module) for name, module in named_modules(model) if isinstance(module, QuantizedModule)]
    first_name: dict[int, str] = {}
    for name, module in sorted(layers, key=lambda pair: not pair[1].multiplies):
        first_name.setdefault(module.weight_id, name)
    for name, module in layers:
        if module.sharding is not None:
            raise ValueError(f"{name}: is cut ({module.sharding}); save the model before it is parallelized")
        dtype = name_of(module.dtype)
        if dtype not in LAYER_DTYPES:
            raise ValueError(f"{name}: its dtype is {dtype}, can only be saved in {', '.join(LAYER_DTYPES)}")
        first = first_name[module.weight_id]
        entries.append(
            LayerEntry(
                name=name,
                kind=type(module).__name__,
                scheme=str(module.scheme),
                in_features=module.in_features,
                out_features=module.out_features,
                bias=module.bias is not None,
                dtype=dtype,
                stored=stored_in(module.scheme, module.portable()) if module.is_sparse else 0,
                tied_to=None if first == name else first,
                form=str(module.form),
            )
        )
    return tuple(entries)


def state_of(model: nn.Module, layers: tuple[LayerEntry, ...]) -> dict[str, Tensor]:
    """The model's state dict; the weights that are packed, which ``pieces_of`` makes, are on the meta device.

    Raises ValueError, with the entry's name, for one that ``load`` could not restore.
    """
    with outlined():
        state: dict[str, Any] = model.state_dict()
    known = {slot.name for name, module in named_modules(model) for slot in slots(name, module)}
    known.update(name for entry in layers for name in portable_specs(entry))
    packed = {name for entry in packed_layers(model, layers) for name in portable_specs(entry)}
    for name in [*state, *(known - state.keys())]:
        value = state.get(name)
        if name not in known or not isinstance(value, Tensor):
            raise ValueError(f"{name}: cannot be saved; only parameters and buffers under their own names can")
        if nn.parameter.is_lazy(value) or (value.is_meta and name not in packed):
            raise ValueError(f"{name}: cannot be saved; it has no values (lazy or on the meta device)")
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise ValueError(f"{name}: cannot be saved; it is a {type(value).__name__} of layout {value.layout}")
        if value.dtype not in DTYPES.values():
            raise ValueError(f"{name}: cannot be saved; its dtype is {value.dtype}")
    return state


def check_values(layers: tuple[LayerEntry, ...], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the portable tensors of a layer, which a program may have changed, are no weight."""
    for entry in layers:
        tensors = {name.rpartition(".")[2]: state[name] for name in portable_specs(entry)}
        if not any(tensor.is_meta for tensor in tensors.values()):
            try:
                from_portable(tensors, Scheme.parse(entry.scheme), entry.out_features, entry.in_features)
            except ValueError as error:
                raise ValueError(f"{entry.name}.{error}") from error


def packed_layers(model: nn.Module, layers: tuple[LayerEntry, ...]) -> dict[LayerEntry, QuantizedModule]:
    """The layers whose weights are packed, and their modules."""
    modules = dict(named_modules(model))
    found = ((entry, modules[entry.name]) for entry in layers)
    return {
        entry: module for entry, module in found if isinstance(module, QuantizedModule) and module.packed is not None
    }


def pieces_of(model: nn.Module, layers: tuple[LayerEntry, ...], stored: Mapping[str, Tensor]) -> list[Piece]:
    """What is written of ``stored``, those of ``state_of`` that are no aliases: each packed layer is one piece, and is unpacked
    when it is made."""
    pieces: list[Piece] = []
    theirs: set[str] = set()
    for entry, module in packed_layers(model, layers).items():
        specs = portable_specs(entry)
        if entry.tied_to is None:
            pieces.append(Piece(specs, partial(_named, entry.name, module)))
        theirs.update(specs)
    return pieces + [Piece.of(name, tensor) for name, tensor in stored.items() if name not in theirs]


def _named(name: str, module: QuantizedModule) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in module.portable().items()}


def aliases_of(state: Mapping[str, Tensor], layers: tuple[LayerEntry, ...]) -> dict[str, str]:
    """Name -> the name under which its tensor is stored: for tied layers, and for parameters that share memory."""
    aliases = {}
    for entry in layers:
        if entry.tied_to is not None:
            aliases.update({name: entry.tied_to + name.removeprefix(entry.name) for name in portable_specs(entry)})
    stored: dict[object, str] = {}
    for name, tensor in state.items():
        where = region(tensor)
        if name not in aliases and where is not None:
            first = stored.setdefault((where, tensor.shape, tensor.stride(), tensor.dtype), name)
            if first != name:
                aliases[name] = first
    return aliases


def index_limit(model: nn.Module) -> int:
    """An upper limit for the bytes of the index of a checkpoint of this model."""
    names = [slot.name for name, module in named_modules(model) for slot in slots(name, module)]
    names += [name for name, _ in named_modules(model)]
    # A layer has an entry and up to six tensors. JSON writes a character of a name in at most 6 bytes.
    return (1 << 20) + sum(2048 + 96 * len(name) for name in names)
