"""One writer at a time in a directory, and what writers left there that were killed.

Both rest on locks of the system (flock), which end with the process that holds them, however it ends: a child that was forked
meanwhile lets go of them. Some network file systems have none: there only one process may write at a time, and what is
left is removed when it is a day old.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_OLD = 24 * 3600.0  # seconds
_CLAIM = ".claim"
_PATIENCE = 5.0  # seconds after which a wait is told

_Holder = tuple[int, int, int]  # thread, device, inode
_held: dict[_Holder, int] = {}  # the descriptors of locks that this process holds, or waits for


@contextlib.contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file or directory; waits for another process, or thread, that has it, and warns after 5 seconds.

    A shared lock is held by readers, each of which waits for a writer, and a writer for all of them.

    Raises:
        OSError: it cannot be opened.
        RuntimeError: this thread has it already, and would wait for itself, as in the handler of a signal.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    holder = threading.get_ident(), status.st_dev, status.st_ino
    if holder in _held:
        os.close(descriptor)
        raise RuntimeError(
            f"{path}: this thread is writing there already; what interrupts a save, such as the handler of a signal, "
            "must save elsewhere, or later"
        )
    _held[holder] = descriptor
    locks = False
    try:
        locks = _wait(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path)
        if not locks:
            _held.pop(holder)
        yield
    finally:
        if _held.pop(holder, None) is not None or not locks:  # else this is a child, which has let go
            # Said, and not left to closing: a child that is forked just now may have it for a moment.
            _lock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _wait(descriptor: int, how: int, path: Path) -> bool:
    """Take a lock, however long that takes. Whether the file system has locks."""
    begin = time.monotonic()
    while time.monotonic() < begin + _PATIENCE:
        try:
            return _lock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
    warnings.warn(
        f"{path}: another process or thread that saves there has held its lock for {_PATIENCE:.0f} s; waiting",
        RuntimeWarning,
        stacklevel=2,
    )
    return _lock(descriptor, how)


def _let_go() -> None:
    """In a child: what its parent holds is not for it to keep, should the parent die."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


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
