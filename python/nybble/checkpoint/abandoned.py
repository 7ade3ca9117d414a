"""One writer at a time in a directory, and what writers left there that were killed.

Both rest on locks of the system (flock), which end with the process that holds them, however it ends. Some network file
systems have none: there only one process may write at a time, and what is left is removed when it is a day old.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_OLD = 24 * 3600.0  # seconds
_CLAIM = ".claim"


@contextlib.contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file or directory; waits for another process, or thread, that has it. Raises OSError.

    A shared lock is held by readers, each of which waits for a writer, and a writer for all of them.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        # Said, and not left to closing: a child that was forked meanwhile has the descriptor too.
        _lock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Whether the file system has locks. Raises BlockingIOError if another has this one, and ``how`` has LOCK_NB."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Say that a temporary directory is in use, by a locked file in it. The directory's own lock stays free: in it, too,
    something may be written."""
    claim = directory / _CLAIM
    claim.touch()
    with held(claim):
        yield


def remove_abandoned(directory: Path, pattern: re.Pattern[str]) -> None:
    """Remove the temporary directories whose names match and that no process has claimed.

    The caller holds the lock of ``directory``: what has no claim there is not about to get one.
    """
    for name in os.listdir(directory):
        path = directory / name
        if pattern.fullmatch(name) and _is_abandoned(path):
            remove(path)


def _is_abandoned(path: Path) -> bool:
    told = path / _CLAIM if (path / _CLAIM).exists() and not path.is_symlink() else path
    try:
        descriptor = os.open(told, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.ELOOP  # a symbolic link; else it is gone, or another user's
    try:
        locks = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return locks or os.fstat(descriptor).st_mtime < time.time() - _OLD
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
