"""A file of tensors, mapped into memory, whose header is not trusted."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"  # of a repository in Hugging Face's cache


class MappedFile:
    """A regular file, mapped. Raises CheckpointError if it cannot be read, is empty, or is a link out of its directory.

    Links within the directory are followed, and those of Hugging Face's cache: from a snapshot of a repository to its blobs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not _is_within(path, status):
                rule = "a link out of its directory is not followed; name the directory of the file itself"
                raise CheckpointError(f"{path}: {rule}")
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise CheckpointError(f"{path}: must be a regular file that is not empty")
            # Private: torch wants memory that it could write to.
            self._map = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        self.size = status.st_size

    def read(self, begin: int, end: int) -> bytes:
        """A copy of some bytes."""
        return self._map[begin:end]

    def unpack(self, form: struct.Struct, begin: int) -> Any:
        """The number of some format that begins at a byte."""
        return form.unpack_from(self._map, begin)[0]

    def tensor(self, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the mapped memory, copied only where its dtype does not allow its place."""
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        raw = np.frombuffer(self._map, np.uint8, end - begin, begin)
        if begin % dtype.itemsize:
            raw = raw.copy()
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def release(self) -> None:
        """Give the memory of what was read back; what is read again comes from the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _is_within(path: Path, status: os.stat_result) -> bool:
    """Whether an open file is that in the directory of its path, or a blob of the cache that the directory belongs to."""
    if not path.is_symlink():
        return True
    directory, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    snapshots = (one.parent for one in (directory, *directory.parents) if one.parent.name == _SNAPSHOTS)
    places = [directory, *(one.parent / _BLOBS for one in snapshots)]
    if not any(place in real.parents for place in places):
        return False
    try:
        return os.path.samestat(status, real.stat())  # the link may have changed since the file was opened
    except OSError:
        return False


class Entry(NamedTuple):
    """A tensor of a file."""

    file: MappedFile
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Span(NamedTuple):
    """Where a tensor lies in its file."""

    begin: int
    end: int
    name: str


def check_spans(spans: Iterable[Span], path: Path, begin: int, end: int) -> None:
    """Raises CheckpointError, naming the tensor, where one lies outside [begin, end), or two overlap."""
    last = Span(begin, begin, "the header")
    for span in sorted(spans):
        if span.begin < begin or span.end > end or span.begin > span.end:
            place = f"bytes [{span.begin}, {span.end}) of [{begin}, {end})"
            raise CheckpointError(f"{path}: {span.name}: offsets: {place}: outside the file's data")
        if span.begin < last.end and span.end > span.begin:
            raise CheckpointError(f"{path}: {span.name}: offsets: overlaps with {last.name}")
        if span.end > last.end:
            last = span
