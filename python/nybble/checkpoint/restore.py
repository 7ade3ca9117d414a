"""Put the tensors and quantized layers of a checkpoint into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import setitem

import torch
from torch import Tensor, nn

from ..layouts.portable import from_portable
from ..model.eligible import bias_of, dense_weight, is_linear_like, name_of, why_bound, why_structure
from ..model.walk import named_modules, sites, swap
from ..nn.kinds import kind_of, module_kinds, quantized_classes
from ..nn.module import QuantizedModule
from ..weights.activations import ActScale
from ..weights.rounding import QuantizedWeight
from .files import CheckpointError
from .index import Index, LayerEntry
from .model import Slot, portable_specs, slots
from .tensors import Spec, listed


class Restore:
    """A checkpoint on its way into a model.

    The constructor checks that it fits, ``read_values`` reads it into new tensors, ``fill`` into new layers, and ``apply``
    puts these into the model. Until ``apply`` the model does not change.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """

    def __init__(self, model: nn.Module, index: Index) -> None:
        self.index = index
        self.modules = dict(named_modules(model))
        self.sites = {id(site.module): site for site in sites(model)}
        self.new: dict[int, QuantizedModule] = {}
        self.first: dict[int, LayerEntry] = {}
        for entry in index.layers:
            self._plan_layer(entry)
        self._check_layers()
        self.slots = [slot for name, module in self.modules.items() for slot in self._slots_after(name, module)]
        self.expected: dict[str, Spec] = {
            slot.name: (tuple(slot.tensor.shape), slot.tensor.dtype) for slot in self.slots
        }
        for entry in index.layers:
            self.expected.update(portable_specs(entry))
        self._check_names()
        self._check_ties()
        self.values: dict[str, Tensor] = {}

    def _plan_layer(self, entry: LayerEntry) -> None:
        old = self.modules.get(entry.name)
        if old is None:
            raise CheckpointError(f"{entry.name}: a quantized layer in the checkpoint, the model has no such module")
        check_fits(entry, old)
        first = self.first.setdefault(id(old), entry)
        if first is entry:
            kind = quantized_classes()[entry.kind]
            new = kind.on_meta(entry.out_features, entry.in_features, entry.scheme, dense_weight(old).dtype)
            new.adopt(old).bias = bias_of(old)
            self.new[id(old)] = new.train(old.training)
        elif entry.tied_to is None or entry.tied_to not in (first.name, first.tied_to):
            raise CheckpointError(
                f"{entry.name}: is the same module as {first.name} in the model, but not in the checkpoint"
            )

    def _check_layers(self) -> None:
        names = {entry.name for entry in self.index.layers}
        for name, module in self.modules.items():
            if name in names:
                continue
            if isinstance(module, QuantizedModule):
                raise CheckpointError(f"{name}: is quantized in the model and dense in the checkpoint")
            if id(module) in self.new:
                first = self.first[id(module)].name
                raise CheckpointError(f"{name}: is the same module as {first} in the model, but not in the checkpoint")
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers[key]
                if buffer is not None and buffer.is_meta:
                    raise CheckpointError(
                        f"{name}.{key}: is on the meta device; checkpoints do not store this buffer, create it first"
                    )

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
                raise CheckpointError(f"aliases[{name!r}]: {target!r} must be a stored tensor, and {name!r} must not")
            if self.expected[name] != self.expected[target]:
                raise CheckpointError(f"aliases[{name!r}]: {target!r} must have the same shape and dtype")

    def _check_ties(self) -> None:
        for entry in self.index.layers:
            for name in portable_specs(entry):
                wanted = None if entry.tied_to is None else entry.tied_to + name.removeprefix(entry.name)
                if self.index.aliases.get(name) != wanted:
                    raise CheckpointError(f"{name}: must be {'stored' if wanted is None else f'an alias of {wanted}'}")
        targets: dict[int, str] = {}
        for slot in self.slots:
            target = self._target(slot.name)
            other = targets.setdefault(id(slot.tensor), target)
            if other != target:
                raise CheckpointError(
                    f"{slot.name}: is the same tensor as {other} in the model, but not in the checkpoint"
                )

    def _target(self, name: str) -> str:
        return self.index.aliases.get(name, name)

    def stored_specs(self) -> dict[str, Spec]:
        """Shape and dtype of each tensor in the weights file, by name."""
        return {name: self.expected[name] for name in self.index.tensors}

    def read_values(self, read: Callable[[str], Tensor]) -> None:
        """Read the tensors that stay dense."""
        self.values = {target: read(target) for target in {self._target(slot.name) for slot in self.slots}}

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Read and pack the new layers. Raises CheckpointError if a layer's tensors are not valid."""
        for entry, old, new in self._layers():
            if entry.tied_to is not None:
                new.tie_to(self.new[id(self.modules[entry.tied_to])])
                continue
            scheme = new.scheme
            codes = {name.removeprefix(f"{entry.name}."): read(name) for name in portable_specs(entry)}
            try:
                quantized = from_portable(codes, scheme, entry.out_features, entry.in_features)
                act = ActScale.of_tensors(codes, scheme.act_type) if scheme.static else None
            except ValueError as error:
                raise CheckpointError(f"{entry.name}.{error}") from error
            device = _device(old)
            parts = {key: part.to(device) for key, part in quantized.tensors().items()}
            new.hold(QuantizedWeight(**parts), act, settle=False)

    def map(self, read: Callable[[str], Tensor]) -> None:
        """In place of ``fill``: the new layers hold the tensors themselves, neither packed nor checked."""
        for entry, _, new in self._layers():
            parts = {name.removeprefix(f"{entry.name}."): self._target(name) for name in portable_specs(entry)}
            new.hold_unpacked({part: read(name) for part, name in parts.items()})

    def _layers(self) -> Iterator[tuple[LayerEntry, nn.Module, QuantizedModule]]:
        """Each layer of the checkpoint once, with the module that it replaces and the new one."""
        # Those that share the weight of another come last.
        for entry in sorted(self.index.layers, key=lambda entry: entry.tied_to is not None):
            old = self.modules[entry.name]
            if self.first[id(old)] is entry:
                yield entry, old, self.new[id(old)]

    def apply(self) -> None:
        """Put the tensors and layers into the model. After any exception the model is as it was."""
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
    """Whether a tensor of the model that shares its value in the checkpoint can replace this one."""
    same = isinstance(tied, nn.Parameter) == isinstance(old, nn.Parameter) and tied.requires_grad == old.requires_grad
    return same and (old.is_meta or old.device == tied.device)


def _like(old: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _device(module: nn.Module) -> torch.device:
    device = dense_weight(module).device
    return torch.device("cpu") if device.type == "meta" else device


def check_fits(entry: LayerEntry, old: nn.Module) -> None:
    """Raise CheckpointError unless the quantized layer can replace ``old``."""
    known = is_linear_like(old)
    reason = (why_bound(old) if isinstance(old, QuantizedModule) else why_structure(old)) if known else None
    if reason is not None:
        raise CheckpointError(f"{entry.name}: the model's layer cannot be replaced: {reason}")
    if not known or entry.kind not in _replaced_by(old):
        raise CheckpointError(f"{entry.name}: a {entry.kind} in the checkpoint cannot replace a {type(old).__name__}")
    shape = dense_weight(old).shape if isinstance(old, QuantizedModule) else kind_of(old).shape_of(old)
    model = (*shape, bias_of(old) is not None, name_of(dense_weight(old).dtype))
    saved = (entry.out_features, entry.in_features, entry.bias, entry.dtype)
    if model != saved:
        raise CheckpointError(f"{entry.name}: (N, K, bias, dtype) is {saved} in the checkpoint, {model} in the model")


def _replaced_by(old: nn.Module) -> set[str]:
    """The class names of the quantized layers that can replace a layer of the model, quantized or dense."""
    is_quantized = isinstance(old, QuantizedModule)
    known = [kind for kind in module_kinds() if type(old) in kind.modules] if is_quantized else [kind_of(old)]
    return {cls.__name__ for kind in known for cls in kind.modules}
