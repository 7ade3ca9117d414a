"""nybble's own checkpoint in a model, without reading it: every tensor lies in the mapped file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.own import restoring, while_replaced
from ..checkpoint.tensors import open_tensors, while_checking
from ..model.allocator import return_freed
from .mapped import MappedFile
from .tensors import read_header


def map_model(model: nn.Module, directory: Path) -> Callable[[], None]:
    """Fill a model from a directory that ``nybble.save`` wrote, with tensors in mapped memory.

    Quantized layers are not packed: they are for code that reads each weight once. The file must not change.

    Returns:
        A function that gives the memory of what was read back to the system.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the model.
    """
    files = while_replaced(directory, lambda: _map(model, directory))

    def release() -> None:
        for file in files:
            file.release()
        return_freed()

    return release


def _map(model: nn.Module, directory: Path) -> set[MappedFile]:
    with restoring(model, directory) as (restore, path):
        with while_checking(path, restore.index), open_tensors(path, restore.stored_specs()):
            entries, _ = read_header(path)
        files: set[MappedFile] = {entry.file for entry in entries.values()}

        def read(name: str) -> torch.Tensor:
            file, begin, end, dtype, shape = entries[name]
            return file.tensor(begin, end, dtype, shape)

        restore.read_values(read)
        restore.map(read)
        restore.apply()
    return files
