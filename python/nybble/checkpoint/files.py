"""The files of a checkpoint directory, read with size limits, and written so that a kill never damages a checkpoint.

A checkpoint is the index ``nybble.json`` and the weights file that the index names. The name of a weights file contains
the hash of its content, so a new file never overwrites the old one. The new index then replaces the old one in one
rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

INDEX = "nybble.json"
WEIGHTS_NAME = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.nybble-.*\.tmp")
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format, or does not fit the model."""


class Digest(NamedTuple):
    """Size and sha256 of a weights file, and the crc32 of each byte range."""

    nbytes: int
    sha256: str
    crc32: dict[str, int]

    @property
    def file_name(self) -> str:
        """The name of the weights file with this content."""
        return f"model-{self.sha256[:16]}.safetensors"


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (descriptor, size) of a regular file. Raises CheckpointError, also for a symbolic link."""
    try:
        # O_NONBLOCK: opening a named pipe must not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened as a regular file: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_index(directory: Path, limit: int) -> bytes:
    """The bytes of the index. Raises CheckpointError if there is none, or if it is larger than ``limit``."""
    path = directory / INDEX
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    with open_file(path) as (descriptor, size):
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, at most {limit} are possible for this model")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)


def digest(path: Path, ranges: Mapping[str, tuple[int, int]]) -> Digest:
    """Read a file once, for its hash and the checksums of ranges: (begin, end), ascending, without overlaps."""
    crc32 = {}
    with open_file(path) as (descriptor, size), os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        sha256 = hashlib.sha256()
        position = 0
        buffer = memoryview(bytearray(_CHUNK))  # one for all: new memory takes longer than the hash

        def chunks(end: int) -> Iterator[memoryview]:
            nonlocal position
            while position < end and (count := file.readinto(buffer[: end - position])):
                sha256.update(buffer[:count])
                position += count
                yield buffer[:count]

        for name, (begin, end) in ranges.items():
            deque(chunks(begin), maxlen=0)
            crc32[name] = reduce(lambda crc, chunk: zlib.crc32(chunk, crc), chunks(end), 0)
        deque(chunks(size), maxlen=0)
    return Digest(position, sha256.hexdigest(), crc32)


def replace_checkpoint(
    directory: Path, write_weights: Callable[[Path], Digest], make_index: Callable[[Digest], bytes]
) -> None:
    """Write a weights file and its index into ``directory``, then remove the files of the former checkpoint.

    ``write_weights`` writes the file at the path that it gets. After any exception the former checkpoint is unchanged
    and the new files are removed. Files that a kill leaves behind are removed by the next call. Only one process may
    write at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove(directory, lambda name: _TEMPORARY.fullmatch(name) is not None)
    before = set(os.listdir(directory))
    aside = Path(tempfile.mkdtemp(prefix=".nybble-", suffix=".tmp", dir=directory))
    try:
        weights, index = aside / "weights", aside / INDEX
        content = write_weights(weights)
        with open(index, "wb") as file:
            file.write(make_index(content))
            file.flush()
            os.fsync(file.fileno())
        _sync(weights)
        os.replace(weights, directory / content.file_name)
        _sync(directory)
        os.replace(index, directory / INDEX)
        _sync(directory)
    except BaseException:
        # If the index was renamed already, the new checkpoint is complete, and stays.
        if (aside / INDEX).exists():
            _remove(directory, lambda name: WEIGHTS_NAME.fullmatch(name) is not None and name not in before)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _remove(directory, lambda name: WEIGHTS_NAME.fullmatch(name) is not None and name != content.file_name)


@contextlib.contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """A temporary directory to write to; it becomes ``out`` in one step, or is removed after an exception.

    Raises FileExistsError if there is anything but an empty directory.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty directory")
    aside = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path, unwanted: Callable[[str], bool]) -> None:
    for name in os.listdir(directory):
        path = directory / name
        if not unwanted(name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
