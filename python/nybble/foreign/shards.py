"""Writes safetensors files tensor by tensor, so that one tensor at a time is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.tensors import DTYPES
from .tensors import ONE_FILE, SHARDS

if TYPE_CHECKING:
    from typing_extensions import Self

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = (8, 4, 2, 1)  # bytes of an element: tensors lie in this order, so that each begins at a multiple of it
_CHUNK = 1 << 22


class _Written(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Shards:
    """The safetensors files of a checkpoint: ``model.safetensors``, or several and their index. A context.

    The data of the file that is being written lies in one temporary file for each size of elements; they are joined
    when it is complete. What an exception leaves behind is for the caller to remove, with the directory.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._most = directory, shard_bytes
        self._open: dict[int, BinaryIO] = {}
        self._now: list[_Written] = []
        self._files: list[tuple[Path, list[_Written]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._finish()
            self._name_files()
        for file in self._open.values():
            file.close()

    def add(self, name: str, tensor: Tensor) -> int:
        """Write a tensor, and return its bytes."""
        tensor = tensor.detach().cpu().contiguous()
        if self._now and sum(entry.nbytes for entry in self._now) + tensor.nbytes > self._most:
            self._finish()
        size = tensor.dtype.itemsize
        if size not in self._open:
            self._open[size] = open(self._directory / f".data{size}", "w+b")  # noqa: SIM115
        self._open[size].write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._now.append(_Written(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes))
        return tensor.nbytes

    def _finish(self) -> None:
        """Complete the file that is being written."""
        self._now.sort(key=lambda entry: _SIZES.index(entry.dtype.itemsize))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in self._now:
            begin, end = end, end + entry.nbytes
            told = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
            header[entry.name] = told
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self._directory / f".shard{len(self._files)}"
        with open(path, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for size in _SIZES:
                if (file := self._open.pop(size, None)) is not None:
                    with file:
                        file.seek(0)
                        shutil.copyfileobj(file, out, _CHUNK)
                    (self._directory / f".data{size}").unlink()
        self._files.append((path, self._now))
        self._now = []

    def _name_files(self) -> None:
        """Give the files their names, which tell how many there are; write the index if there are several."""
        count = len(self._files)
        if count == 1:
            self._files[0][0].rename(self._directory / ONE_FILE)
            return
        places: dict[str, str] = {}
        for i, (path, entries) in enumerate(self._files):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            path.rename(self._directory / name)
            places |= dict.fromkeys((entry.name for entry in entries), name)
        total = sum(entry.nbytes for _, entries in self._files for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (self._directory / SHARDS).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
