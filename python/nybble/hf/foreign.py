"""Loads another library's quantized checkpoint in ``from_pretrained``: transformers reads what is dense, nybble the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.files import CheckpointError
from ..foreign.experts import for_model
from ..foreign.formats import ForeignFormat, foreign_formats, open_foreign
from ..foreign.load import Loading
from ..foreign.opened import Opened
from ..foreign.report import ImportReport
from ..foreign.source import Source
from .work import Work, forget_ties, mark_around, names_in


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
        in_file = list(opened.layers)
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
        for module, key, _ in self.held:
            module._parameters[key] = None
        forget_ties(model, names)
        mark_around(model, names)
        ignored = {*in_file, *names_in(model, in_file).values(), *opened.layers}
        patterns = {rf"^(\w+\.)?{re.escape(name)}\." for name in ignored}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}

    def finish(self, model: Any) -> None:
        """As Work.finish: a layer at a time."""
        for module, key, parameter in self.held:
            module._parameters[key] = parameter
        rows = [self.loading.replace(name) for name in self.loading.opened.layers]
        self.report = ImportReport(self.format, tuple(rows))


def _fitted(opened: Opened, model: Any) -> Opened:
    """The checkpoint with the names of a model that may be the inner part of the one that was saved, or have a head on it."""
    modules = {name.rpartition(".")[0] for name in opened.parts} | {*opened.layers}
    names = names_in(model, modules)
    if not any(name in names for name in opened.layers):
        raise CheckpointError(f"{next(iter(opened.layers), 'the checkpoint')}: the model has no such module")
    layers = {names[name]: one for name, one in opened.layers.items() if name in names}
    parts = {}
    for name, part in opened.parts.items():
        above, _, last = name.rpartition(".")
        parts[f"{names.get(above, above)}.{last}"] = part
    return replace(opened, layers=layers, parts=parts)
