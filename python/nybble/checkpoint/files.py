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

from .abandoned import claimed, held, remove, remove_abandoned

INDEX = "nybble.json"
WEIGHTS_NAME = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.nybble-[a-z0-9_]{8}\.tmp")  # as tempfile names them
_CHUNK = 1 << 20
_LONGEST = 1600  # characters of a message


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format, or does not fit the model.

    A message that quotes very much of a file is cut in its middle, and characters that no terminal should get are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut(message))


def cut(message: str) -> str:
    """A message that quotes very much of a file, without its middle; what cannot be printed or encoded as ``repr`` has it."""
    half = _LONGEST // 2
    if not message.isprintable():
        message = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)
    return message if len(message) <= _LONGEST else f"{message[:half]} [...] {message[-half:]}"


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
    and the new files are removed. Files that a kill leaves behind are removed by the next call. A call waits for another
    process, or thread, that writes into the same directory, or reads it again, see ``abandoned``.

    Raises:
        OSError: the directory cannot be written, or is gone; the message names it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with held(directory):
            _replace(directory, write_weights, make_index)
    except (OSError, CheckpointError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # a file that is gone before it is hashed
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise OSError(cause.errno, f"no checkpoint could be written: {reason}", str(directory)) from error


def _replace(directory: Path, write_weights: Callable[[Path], Digest], make_index: Callable[[Digest], bytes]) -> None:
    remove_abandoned(directory, _TEMPORARY)
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
            _remove_weights(directory, but=before)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _remove_weights(directory, but={content.file_name})


def _remove_weights(directory: Path, but: set[str]) -> None:
    for name in os.listdir(directory):
        if WEIGHTS_NAME.fullmatch(name) and name not in but:
            with contextlib.suppress(OSError):  # nor a directory of such a name, which is another's
                os.unlink(directory / name)


@contextlib.contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """A temporary directory to write to; it becomes ``out`` in one step, or is removed after an exception.

    One that a kill left behind is removed by the next call. Raises FileExistsError if there is anything but an empty
    directory.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_at_once(out) as aside:
        aside.mkdir()
        yield aside


@contextlib.contextmanager
def file_at_once(path: Path) -> Iterator[Path]:
    """The path of a temporary file to write; it takes the place of ``path`` in one step, or is removed after an exception.

    Those that a kill left behind are removed by the next call. Raises OSError.
    """
    path = path.absolute()
    with contextlib.ExitStack() as claim:
        with held(path.parent):  # until it is claimed, the next writer could take it for abandoned
            remove_abandoned(path.parent, re.compile(rf"\.{re.escape(path.name)}-[a-z0-9_]{{8}}\.tmp"))
            try:
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
            except OSError as error:
                raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
            claim.enter_context(claimed(aside))
        try:
            yield aside / path.name
            os.replace(aside / path.name, path)
        finally:
            remove(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
