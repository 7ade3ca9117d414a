"""What HQQ saves of a layer, from a file of torch.save or from safetensors, where its settings are tensors too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .plain_values import Name, Stored
from .tensors import Tensors
from .torch_file import TorchFile

_LETTERS, _SIZES = 64, 8  # of a setting, at most


class Fields(Protocol):
    """The settings and tensors of a layer, by HQQ's names for them."""

    def plain(self, key: str) -> Any:
        """A setting: a number, a word, a tuple of sizes; None if there is none."""

    def tensor(self, key: str) -> Tensor:
        """A tensor. Raises CheckpointError, naming it, if there is none."""

    def inner(self, key: str) -> Fields:
        """The settings of scales, or of zero points, that are quantized themselves."""


class SavedFields:
    """Those of a file of torch.save."""

    def __init__(self, name: str, file: TorchFile, told: Mapping[str, Any]) -> None:
        self._name, self._file, self._told = name, file, told

    def plain(self, key: str) -> Any:
        found = self._told.get(key)
        if isinstance(found, Name):
            return found.name
        sizes = isinstance(found, tuple) and len(found) <= _SIZES and all(type(size) is int for size in found)
        short = isinstance(found, str) and len(found) <= _LETTERS
        if found is not None and not sizes and not short and not isinstance(found, (int, float)):
            raise CheckpointError(f"{self._file.file.path}: {self._name}.{key}: must be a setting")
        return found

    def tensor(self, key: str) -> Tensor:
        where, found = f"{self._name}.{key}", self._told.get(key)
        if not isinstance(found, Stored):
            raise CheckpointError(f"{self._file.file.path}: {where}: must be a tensor")
        return self._file.tensor(found, where)

    def inner(self, key: str) -> SavedFields:
        where, found = f"{self._name}.{key}", self._told.get(key)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._file.file.path}: {where}: must be a dict of settings")
        return SavedFields(where, self._file, found)


class TensorFields:
    """Those of safetensors: words are the codes of their letters, and sizes are numbers of 64 bits."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self._name, self._tensors = name, tensors

    def plain(self, key: str) -> Any:
        name = f"{self._name}.{key}"
        if name not in self._tensors.entries:
            return None
        found = self._tensors.read(name)
        if found.dim() == 0:
            return found.item()
        if found.dim() != 1 or found.numel() > _LETTERS or found.dtype not in (torch.uint8, torch.int64):
            raise CheckpointError(f"{name}: is {tuple(found.shape)} {found.dtype}: must be a setting")
        values = found.tolist()
        return "".join(map(chr, values)).removeprefix("torch.") if found.dtype == torch.uint8 else tuple(values)

    def tensor(self, key: str) -> Tensor:
        return self._tensors.read(f"{self._name}.{key}")

    def inner(self, key: str) -> TensorFields:
        raise CheckpointError(f"{self._name}: scales or zero points that are quantized are not saved as safetensors")
