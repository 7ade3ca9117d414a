"""A foreign checkpoint as a model: dense tensors as they are, quantized layers as nybble's modules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..model.allocator import return_freed
from ..model.bar import bar
from ..model.options import check_progress
from ..model.walk import Edits
from . import inputs
from .choose import choose
from .empty import dtype_of, empty_model
from .experts import for_model
from .formats import open_foreign
from .opened import Opened, renamed
from .place import Place, place_of, put, shaped
from .report import ImportedLayer, ImportReport

_AT_ONCE = 1 << 24  # bytes of a dense tensor that are copied at a time


class Loaded(NamedTuple):
    """A model, and what became of each of its quantized layers."""

    model: nn.Module
    report: ImportReport


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    act_bits: int = 16,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    model: nn.Module | None = None,
    names: Mapping[str, str] | None = None,
) -> Loaded:
    """A model from another library's quantized checkpoint, whose quantized layers are nybble's modules: the transformers model
    that its configuration tells, or a given one.

    A layer that a scheme of nybble holds exactly is kept bit for bit. Any other is rounded again, to the nearest scheme: its
    codes are kept where only scales do not fit; else it is rounded to 4 bits in groups of 32, or to 8 bits if it has
    more than 4. The report says which, why, and what it cost. There is never a dense copy of a layer as a whole, and
    what was read of the files is given back.

    Args:
        path: a directory with config.json and safetensors files, a GGUF file, or an ONNX file with ``model``, see
            docs/foreign.md.
        act_bits: 16: float activations; 8: quantized ones, for each token, or static ones where the checkpoint has them.
        dtype: of the activations and of what is not quantized; None: what the configuration says, or the given model has.
        progress: whether to show a bar of the layers on stderr; None: on a terminal, for work that takes long.
        model: is changed in place, and keeps what is replaced until all is read; it needs no configuration, nor transformers.
            Parameters that the checkpoint does not have stay as they are, unless they have no values.
        names: the names of layers in the checkpoint -> those of the model's modules, where they differ.

    Returns:
        The model, in eval mode, and the report.

    Raises:
        CheckpointError: (a ValueError) the checkpoint is damaged, of no known format, or does not fit the model. A given model
            is as it was.
        ImportError: transformers is not installed, and no model is given.
    """
    check_progress(progress)
    row, opened = open_foreign(path)
    opened = renamed(opened, names or {})
    loading = _given(model, opened, act_bits, dtype) if model is not None else _told(opened, act_bits, dtype)
    layers = []
    try:
        with bar(len(loading.opened.layers), progress) as advance:
            for name in loading.opened.layers:
                layers.append(loading.replace(name))
                advance(name)
        loading.fill()
    except BaseException:
        loading.edits.undo()
        raise
    return Loaded(loading.model.eval(), ImportReport(row.name, tuple(layers), loading.opened.notes))


def _told(opened: Opened, act_bits: int, dtype: torch.dtype | None) -> Loading:
    """Loads into the model that the configuration tells."""
    config = opened.config()
    model = empty_model(config)
    return Loading(model, for_model(opened, model), act_bits, dtype or dtype_of(config))


def _given(model: nn.Module, opened: Opened, act_bits: int, dtype: torch.dtype | None) -> Loading:
    """Loads into a model that has values, after checking that it has all layers."""
    told = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    loading = Loading(model, for_model(opened, model), act_bits, dtype or told, keeps=True)
    for name in loading.opened.layers:
        loading.place(name)
    return loading


def _ties(model: nn.Module) -> dict[str, str]:
    """Each further name of a parameter -> its first."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: one for name, value in named if (one := first.setdefault(id(value), name)) != name}


@dataclass
class Loading:
    """A model on its way from parameters on the meta device to those of a checkpoint."""

    model: nn.Module
    opened: Opened
    act_bits: int
    dtype: torch.dtype
    keeps: bool = False  # the values of parameters that the checkpoint does not have

    def __post_init__(self) -> None:
        self.ties = _ties(self.model)
        self.old = dict(self.model.named_parameters())
        self.placed: set[str] = set()  # modules that are nybble's now
        self.edits = Edits(undoable=self.keeps)

    def replace(self, name: str) -> ImportedLayer:
        """Put nybble's module in the place of a layer, and of those that are tied to it."""
        if name in self.placed:
            raise CheckpointError(f"{name}: is tied to another layer in the model, which the checkpoint has too")
        place = self.place(name)
        read = self.opened.layers[name]
        weight = shaped(read.read(), place.shape, name)
        chosen = choose(weight, self.act_bits if place.multiplies else 16)
        scheme, act, note = inputs.of(weight, chosen.scheme)
        chosen = chosen._replace(scheme=scheme)
        bias = self._bias(f"{place.names[0]}.bias", place.modules[0], place.shape[0])
        sizes = read.nbytes, chosen.quantized.nbytes
        row = (name, place.shape, weight.describe(), str(scheme), *sizes, chosen.sqnr_db, chosen.why, note)
        del weight  # before the packed one is made
        put(self.model, place, chosen, bias, self.dtype, act, self.edits)
        self.placed.update(place.names)
        del chosen
        self._release()
        return ImportedLayer(*row)

    def place(self, name: str) -> Place:
        """Where a layer belongs."""
        return place_of(self.model, name, list(self._tied_to(name)))

    def _tied_to(self, name: str) -> Iterator[str]:
        """Other modules with the weight of a module."""
        key = f"{name}.weight"
        first = self.ties.get(key, key)
        for other in (first, *(alias for alias, one in self.ties.items() if one == first)):
            if other != key:
                yield other.removesuffix(".weight")

    def _bias(self, name: str, old: Any, rows: int) -> Tensor | None:
        bias: Tensor | None = getattr(old, "bias", None)
        if bias is not None:
            return bias.detach() if self._stays(name, bias) else self.part(name, (rows,), self.dtype)
        if name in self.opened.parts and self.opened.parts[name].read().any():  # some writers add biases of zeros
            raise CheckpointError(f"{name}: is not 0, and the model has no such parameter")
        return None

    def part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of a tensor that is not quantized."""
        if name not in self.opened.parts:
            raise CheckpointError(f"{name}: is missing in the checkpoint")
        found = self.opened.parts[name].read()
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise CheckpointError(f"{name}: is {tuple(found.shape)} {found.dtype}, must be {shape} and a float")
        copy = torch.empty(shape, dtype=dtype)
        source, target, step = found.reshape(-1), copy.reshape(-1), _AT_ONCE // found.itemsize
        for at in range(0, found.numel(), step):
            target[at : at + step] = source[at : at + step]
            self.opened.release()
        return copy

    def _stays(self, name: str, value: Tensor) -> bool:
        """Whether a parameter is as the given model has it."""
        return self.keeps and name not in self.opened.parts and not value.is_meta

    def _release(self) -> None:
        """Give back the memory of what was read, and of what was needed to make a layer."""
        self.opened.release()
        return_freed()

    def fill(self) -> None:
        """Give every parameter and saved buffer that is not a quantized layer's its value; tie those that are tied."""
        theirs = {f"{name}.{part}" for name in self.placed for part in ("weight", "bias")}
        parts, old = self.opened.parts, {name: value for name, value in self.old.items() if name not in theirs}
        self._check_ties(theirs)
        saved = {name: value for name, value in self.model.named_buffers() if name in parts}
        if extra := sorted(parts.keys() - theirs - old.keys() - saved.keys() - self.ties.keys()):
            raise CheckpointError(f"{extra[0]}: the model has no such parameter")
        for name, value in old.items():
            aliases = [alias for alias, first in self.ties.items() if first == name]
            source = next((one for one in (name, *aliases) if one in parts), name)
            if self._stays(source, value):
                continue
            new = nn.Parameter(self.part(source, tuple(value.shape), self.dtype), requires_grad=False)
            for one in (name, *aliases):
                module, _, last = one.rpartition(".")
                self.edits.put(self.model.get_submodule(module)._parameters, last, new)
        buffers = {name: self.part(name, tuple(buffer.shape), buffer.dtype) for name, buffer in saved.items()}
        for name, buffer in saved.items():
            buffer.copy_(buffers[name])
        self._release()

    def _check_ties(self, theirs: set[str]) -> None:
        """Raises CheckpointError for a tensor that differs from one that is the same parameter in the model."""
        parts = self.opened.parts
        for alias, first in self.ties.items():
            if alias not in parts:
                continue
            if alias in theirs or first in theirs:
                raise CheckpointError(
                    f"{alias}: is tied to a quantized layer in the model, which the checkpoint has too"
                )
            if first in parts and not torch.equal(parts[alias].read(), parts[first].read()):
                raise CheckpointError(f"{alias}: differs from {first}, which is the same parameter in the model")
