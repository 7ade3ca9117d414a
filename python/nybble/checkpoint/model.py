"""The model's side of a checkpoint: which tensors it has, and how loaded ones go into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import setitem
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layouts.portable import from_portable, spec_of, stored_in
from ..model.eligible import dense_weight, is_linear_like, name_of, why_bound, why_structure
from ..model.walk import named_modules, region, sites, swap
from ..nn import Linear, SparseLinear
from ..weights.scheme import Scheme
from .files import CheckpointError
from .index import DTYPES as LAYER_DTYPES
from .index import Index, LayerEntry
from .tensors import DTYPES, Spec, listed


@dataclass(frozen=True)
class Slot:
    """A parameter or persistent buffer, under one of its names, in the dictionary that holds it."""

    name: str
    held_in: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        """What the slot holds now."""
        return cast(Tensor, self.held_in[self.key])


def slots(name: str, module: nn.Module) -> Iterator[Slot]:
    """The slots of one module without its children; of a quantized layer only the bias."""
    prefix = f"{name}." if name else ""
    for held_in in (module._parameters, module._buffers):
        for key, tensor in held_in.items():
            if tensor is None or key in module._non_persistent_buffers_set:
                continue
            if not isinstance(module, Linear) or key == "bias":
                yield Slot(prefix + key, held_in, key)


def codes_of(entry: LayerEntry) -> dict[str, Spec]:
    """Shape and dtype of the stored codes of a layer, by full name."""
    spec = spec_of(Scheme.parse(entry.scheme), entry.out_features, entry.in_features, entry.stored)
    return {f"{entry.name}.{key}": value for key, value in spec.items()}


def layer_entries(model: nn.Module) -> tuple[LayerEntry, ...]:
    """The quantized layers of a model, one entry for each name. Raises ValueError for one that cannot be saved."""
    entries: list[LayerEntry] = []
    first_name: dict[int, str] = {}
    for name, module in named_modules(model):
        if not isinstance(module, Linear):
            continue
        dtype = name_of(module.dtype)
        if dtype not in LAYER_DTYPES:
            raise ValueError(f"{name}: a layer in {dtype} cannot be saved, only in {', '.join(LAYER_DTYPES)}")
        first = first_name.setdefault(module.weight_id, name)
        entries.append(
            LayerEntry(
                name=name,
                kind="SparseLinear" if isinstance(module, SparseLinear) else "Linear",
                scheme=str(module.scheme),
                in_features=module.in_features,
                out_features=module.out_features,
                bias=module.bias is not None,
                dtype=dtype,
                stored=stored_in(module.scheme, module.portable()),
                tied_to=None if first == name else first,
            )
        )
    return tuple(entries)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict. Raises ValueError, naming the entry, for what ``load`` could not restore."""
    state: dict[str, Any] = model.state_dict()
    known = {slot.name for name, module in named_modules(model) for slot in slots(name, module)}
    known.update(name for entry in layer_entries(model) for name in codes_of(entry))
    for name in [*state, *(known - state.keys())]:
        value = state.get(name)
        if name not in known or not isinstance(value, Tensor):
            raise ValueError(f"{name}: cannot be saved; only parameters and buffers can, each under its own name")
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise ValueError(f"{name}: cannot be saved; it has no values (lazy or on the meta device)")
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise ValueError(f"{name}: cannot be saved; it is a {type(value).__name__} of layout {value.layout}")
        if value.dtype not in DTYPES.values():
            raise ValueError(f"{name}: cannot be saved; its dtype is {value.dtype}")
    return state


def aliases_of(state: Mapping[str, Tensor], layers: tuple[LayerEntry, ...]) -> dict[str, str]:
    """The names whose tensor is stored under another name: codes of tied layers, and parameters that share memory."""
    aliases = {}
    for entry in layers:
        if entry.tied_to is not None:
            aliases.update({name: entry.tied_to + name.removeprefix(entry.name) for name in codes_of(entry)})
    stored: dict[object, str] = {}
    for name, tensor in state.items():
        where = region(tensor)
        if name not in aliases and where is not None:
            first = stored.setdefault((where, tensor.shape, tensor.stride(), tensor.dtype), name)
            if first != name:
                aliases[name] = first
    return aliases


def index_limit(model: nn.Module) -> int:
    """More bytes than the index of a checkpoint of this model can have."""
    names = [slot.name for name, module in named_modules(model) for slot in slots(name, module)]
    names += [name for name, _ in named_modules(model)]
    # a layer has an entry and up to six tensors; each name stands in few places, escaped in at most 6 bytes a character
    return (1 << 20) + sum(2048 + 96 * len(name) for name in names)


class Restore:
    """A checkpoint that is about to go into a model: first checked, then filled aside, then applied at once."""

    def __init__(self, model: nn.Module, index: Index) -> None:
        self.index = index
        self.modules = dict(named_modules(model))
        self.sites = {id(site.module): site for site in sites(model)}
        self.new: dict[int, Linear] = {}
        self.first: dict[int, LayerEntry] = {}
        for entry in index.layers:
            self._plan_layer(entry)
        self._check_layers()
        self.slots = [slot for name, module in self.modules.items() for slot in self._slots_after(name, module)]
        self.expected: dict[str, Spec] = {
            slot.name: (tuple(slot.tensor.shape), slot.tensor.dtype) for slot in self.slots
        }
        for entry in index.layers:
            self.expected.update(codes_of(entry))
        self._check_names()
        self._check_ties()
        self.values: dict[str, Tensor] = {}

    def _plan_layer(self, entry: LayerEntry) -> None:
        old = self.modules.get(entry.name)
        if old is None:
            raise CheckpointError(f"{entry.name}: the checkpoint has a quantized layer, the model no such module")
        _check_fits(entry, old)
        first = self.first.setdefault(id(old), entry)
        if first is entry:
            new = {"Linear": Linear, "SparseLinear": SparseLinear}[entry.kind](
                entry.in_features, entry.out_features, False, scheme=entry.scheme, device="meta", dtype=_dtype(old)
            )
            new.bias = old.bias  # type: ignore[assignment]
            self.new[id(old)] = new.train(old.training)
        elif entry.tied_to is None or entry.tied_to not in (first.name, first.tied_to):
            raise CheckpointError(f"{entry.name}: is {first.name} in the model, but not in the checkpoint")

    def _check_layers(self) -> None:
        names = {entry.name for entry in self.index.layers}
        for name, module in self.modules.items():
            if name in names:
                continue
            if isinstance(module, Linear):
                raise CheckpointError(f"{name}: is quantized in the model and dense in the checkpoint")
            if id(module) in self.new:
                raise CheckpointError(
                    f"{name}: is {self.first[id(module)].name} in the model, but not in the checkpoint"
                )
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers[key]
                if buffer is not None and buffer.is_meta:
                    raise CheckpointError(f"{name}.{key}: is on the meta device, and no checkpoint has this buffer")

    def _slots_after(self, name: str, module: nn.Module) -> Iterator[Slot]:
        return slots(name, self.new.get(id(module), module))

    def _check_names(self) -> None:
        stored, aliases = self.index.tensors, self.index.aliases
        missing = [name for name in self.expected if name not in stored and name not in aliases]
        extra = [name for name in (*stored, *aliases) if name not in self.expected]
        if missing or extra:
            raise CheckpointError(f"the checkpoint lacks {listed(missing)}; the model lacks {listed(extra)}")
        for name, target in aliases.items():
            if name in stored or target not in stored:
                raise CheckpointError(f"aliases[{name!r}]: {target!r} is not a stored tensor, or {name!r} is one")
            if self.expected[name] != self.expected[target]:
                raise CheckpointError(f"aliases[{name!r}]: {target!r} has another shape or dtype")

    def _check_ties(self) -> None:
        for entry in self.index.layers:
            for name in codes_of(entry):
                wanted = None if entry.tied_to is None else entry.tied_to + name.removeprefix(entry.name)
                if self.index.aliases.get(name) != wanted:
                    raise CheckpointError(f"{name}: must be {'stored' if wanted is None else f'an alias of {wanted}'}")
        targets: dict[int, str] = {}
        for slot in self.slots:
            target = self._target(slot.name)
            other = targets.setdefault(id(slot.tensor), target)
            if other != target:
                raise CheckpointError(f"{slot.name}: is one tensor with {other} in the model, two in the checkpoint")

    def _target(self, name: str) -> str:
        return self.index.aliases.get(name, name)

    def stored_specs(self) -> dict[str, Spec]:
        """Shape and dtype of each tensor that the weights file must hold."""
        return {name: self.expected[name] for name in self.index.tensors}

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Read all tensors, and fill and pack the new layers. Raises CheckpointError for codes that are no weight."""
        for entry in self.index.layers:
            old = self.modules[entry.name]
            new = self.new[id(old)]
            if self.first[id(old)] is not entry:
                continue
            if entry.tied_to is not None:
                new.tie_to(self.new[id(self.modules[entry.tied_to])])
                continue
            scheme = new.scheme
            codes = {name.removeprefix(f"{entry.name}."): read(name) for name in codes_of(entry)}
            try:
                from_portable(codes, scheme, entry.out_features, entry.in_features)
            except ValueError as error:
                raise CheckpointError(f"{entry.name}.{error}") from error
            device = _device(old)
            new.load_state_dict({key: code.to(device) for key, code in codes.items()}, strict=False, assign=True)
            new.pack()
        for target in {self._target(slot.name) for slot in self.slots}:
            self.values[target] = read(target)

    def apply(self) -> None:
        """Put the tensors and layers into the model, or, after any exception, nothing."""
        undo: list[Callable[[], None]] = []
        chosen: dict[str, Tensor] = {}
        try:
            for slot in self.slots:
                target = self._target(slot.name)
                old, tied, value = slot.tensor, chosen.get(target), self.values[target]
                if tied is old:
                    continue
                one = tied is not None and _can_be_one(tied, old)
                if one or old.is_meta:
                    undo.append(partial(setitem, slot.held_in, slot.key, old))
                    slot.held_in[slot.key] = tied if one else _like(old, value)
                else:
                    undo.append(partial(setattr, old, "data", old.data))
                    old.data = value.to(old.device)
                chosen.setdefault(target, slot.tensor)
            swap((self.sites[key], new) for key, new in self.new.items())
        except BaseException:
            for step in reversed(undo):
                step()
            raise


def _can_be_one(tied: Tensor, old: Tensor) -> bool:
    """Whether the tensor that stands under another name may take this one's place."""
    same = isinstance(tied, nn.Parameter) == isinstance(old, nn.Parameter) and tied.requires_grad == old.requires_grad
    return same and (old.is_meta or old.device == tied.device)


def _like(old: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _dtype(module: nn.Module) -> torch.dtype:
    return module.dtype if isinstance(module, Linear) else cast(Tensor, module.weight).dtype


def _device(module: nn.Module) -> torch.device:
    device = cast(Tensor, module.weight).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_fits(entry: LayerEntry, old: nn.Module) -> None:
    """Raise CheckpointError unless the quantized layer can stand where ``old`` does."""
    if not is_linear_like(old):
        raise CheckpointError(f"{entry.name}: a quantized layer in the checkpoint, a {type(old).__name__} in the model")
    reason = why_bound(old) if isinstance(old, Linear) else why_structure(old)
    if reason is not None:
        raise CheckpointError(f"{entry.name}: the model's layer cannot be replaced: {reason}")
    n, k = (old.out_features, old.in_features) if isinstance(old, Linear) else dense_weight(old).shape
    model = (n, k, old.bias is not None, name_of(_dtype(old)))
    saved = (entry.out_features, entry.in_features, entry.bias, entry.dtype)
    if model != saved:
        raise CheckpointError(f"{entry.name}: (N, K, bias, dtype) is {saved} in the checkpoint, {model} in the model")
