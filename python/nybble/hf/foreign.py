"""Loads another library's quantized checkpoint in ``from_pretrained``: transformers reads what is dense, nybble the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..checkpoint.files import CheckpointError
from ..foreign.experts import for_model
from ..foreign.formats import ForeignFormat, foreign_formats, open_foreign
from ..foreign.load import Loading
from ..foreign.opened import Opened
from ..foreign.report import ImportReport
from ..foreign.source import Source
from ..foreign.tensors import Tensors
from .work import Work, forget_ties, holders_of, ignore_unexpected, mark_around, names_in

_One = TypeVar("_One")


def format_of(directory: Path) -> ForeignFormat | None:
    """The format of another library that a directory has, or None."""
    source = Source(directory)
    return next((row for row in foreign_formats() if row.detect(source)), None)


class Foreign(Work):
    """See Work. Until ``finish`` the dense modules of quantized layers have no weight, so that transformers makes none.

    Raises CheckpointError: the checkpoint is damaged, or does not fit the model.
    """

    def __init__(self, model: Any, directory: Path, act_bits: int, dtype: torch.dtype) -> None:
        row, opened = open_foreign(directory)
        used = names_in(model, opened.layers)
        opened = for_model(_fitted(opened, model), model)
        self.format = row.name
        self.loading = Loading(model, opened, act_bits, dtype)
        self.report: ImportReport | None = None
        self.held: list[tuple[nn.Module, str, nn.Parameter]] = []
        names: list[str] = []
        for name in opened.layers:
            place = self.loading.place(name)
            names += place.names
            self.held += [
                (module, key, one)
                for module in place.modules
                for key in ("weight", "bias")
                if (one := module._parameters.get(key)) is not None
            ]
        self.computed = self._computed(model, directory)
        for module, key, _ in self.held:
            module._parameters[key] = None
        self.names = names
        forget_ties(model, names)
        mark_around(model, names)
        ignored = {*used, *used.values(), *opened.layers, *self.computed}
        ignore_unexpected(model, {rf"^(\w+\.)?{re.escape(name)}\." for name in ignored})

    def _computed(self, model: Any, directory: Path) -> dict[str, nn.Parameter]:
        """Parameters that nybble computes of other tensors of the file, such as weights that were stored without zeros."""
        known, parameters = _renamed(Tensors(directory).entries, model), dict(model.named_parameters())
        found = {
            name: parameters[name] for name in self.loading.opened.parts if name in parameters and name not in known
        }
        for name in found:
            above, _, key = name.rpartition(".")
            self.held.append((model.get_submodule(above), key, parameters[name]))
        return found

    def modules(self, model: Any) -> Iterator[nn.Module]:
        """As Work.modules."""
        return holders_of(model, self.names)

    def finish(self, model: Any) -> None:
        """As Work.finish: a layer at a time."""
        for module, key, parameter in self.held:
            module._parameters[key] = parameter
        for name, parameter in self.computed.items():
            above, _, key = name.rpartition(".")
            value = self.loading.part(name, tuple(parameter.shape), parameter.dtype)
            model.get_submodule(above)._parameters[key] = nn.Parameter(value, requires_grad=False)
        rows = [self.loading.replace(name) for name in self.loading.opened.layers]
        self.report = ImportReport(self.format, tuple(rows), self.loading.opened.notes)


def _fitted(opened: Opened, model: Any) -> Opened:
    """The checkpoint with the names of a model that may be the inner part of the one that was saved, or have a head on it."""
    names = names_in(model, opened.layers)
    if opened.layers and not names:
        raise CheckpointError(f"{next(iter(opened.layers))}: the model has no such module")
    layers = {names[name]: one for name, one in opened.layers.items() if name in names}
    parts = _renamed(opened.parts, model)
    return replace(opened, layers=layers, parts=parts)


def _renamed(tensors: Mapping[str, _One], model: Any) -> dict[str, _One]:
    """Tensors by the names that they have in a model."""
    names = names_in(model, {name.rpartition(".")[0] for name in tensors})
    found = {}
    for name, one in tensors.items():
        above, _, last = name.rpartition(".")
        found[f"{names.get(above, above)}.{last}"] = one
    return found
