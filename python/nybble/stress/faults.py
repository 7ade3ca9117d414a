"""What can go wrong around a long run: signals, a full disk, no memory. A fault is set off in a child."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .children import limited_memory

_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
_PRIVATE, _REMOUNT, _READ_ONLY = 0x40000 | 0x4000, 32, 1  # MS_PRIVATE | MS_REC, MS_REMOUNT, MS_RDONLY
_LARGEST_DISK = 96 << 10  # bytes, about what the runs keep
_LARGEST_FILE = 16 << 10
_MOST_MEMORY = 3 << 20  # bytes, about what the runs take
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Limits:
    """Limits that were set; ``lift`` takes them off."""

    lift: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: unique in the table.
        raises: what a run under it may raise.
        is_meant: whether an exception of that kind is due to the fault.
        limits: sets limits in this process, given the directory to resume from, and a number in [0, 1).
        warm: whether what is tried runs once before.
        signal: what another process sends; None: nothing.
    """

    name: str
    raises: tuple[type[BaseException], ...] = ()
    is_meant: Callable[[BaseException], bool] = lambda error: True
    limits: Callable[[Path, float], Limits] = lambda resume, share: Limits()
    warm: bool = False
    signal: int | None = None


def _mount(target: Path, nbytes: int, flags: int = 0) -> bool:
    """Mount a file system of some bytes in memory. Whether the system allows that."""
    c = ctypes.CDLL(None, use_errno=True)
    return bool(c.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, f"size={nbytes}".encode()) == 0)


def _own_mounts() -> bool:
    """Give this process mounts of its own. Whether the system allows that."""
    c = ctypes.CDLL(None, use_errno=True)
    return bool(c.unshare(_NEW_MOUNTS) == 0 and c.mount(None, b"/", None, _PRIVATE, None) == 0)


def small_disk(directory: Path, nbytes: int, largest: int, mounts: bool = True) -> Limits:
    """Give a directory a disk of its own of some bytes; without ``mounts``, or where the system does not allow them, limit the size of
    each file (``largest``)."""
    page = resource.getpagesize()
    if mounts and _own_mounts() and _mount(directory, max(nbytes // page, 1) * page):
        return Limits(lambda: None if _mount(directory, 1 << 30, _REMOUNT) else _cannot_grow(directory))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, old[1]))
    return Limits(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old))


def read_only(directory: Path) -> bool:
    """Give a directory a disk of its own, which nobody can write to, for this process. Whether the system allows that."""
    return _own_mounts() and _mount(directory, 1 << 20) and _mount(directory, 1 << 20, _REMOUNT | _READ_ONLY)


def _cannot_grow(directory: Path) -> None:
    raise RuntimeError(f"{directory}: its disk cannot be made larger")


def _disk(resume: Path, share: float) -> Limits:
    (resume / "kept").mkdir()
    return small_disk(resume / "kept", int(share * _LARGEST_DISK), int(share * _LARGEST_FILE))


def _memory(resume: Path, share: float) -> Limits:
    old = resource.getrlimit(resource.RLIMIT_AS)
    limited_memory(int(share * _MOST_MEMORY))
    return Limits(lambda: resource.setrlimit(resource.RLIMIT_AS, old))


def is_full(error: BaseException) -> bool:
    """Whether an exception tells of a full disk."""
    return isinstance(error, OSError) and error.errno in _FULL


def _of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error) or getattr(error, "errno", 0) == errno.ENOMEM


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none"),
        Fault("SIGKILL", signal=signal.SIGKILL),
        Fault("SIGINT", (KeyboardInterrupt,), signal=signal.SIGINT),
        Fault("full disk", (OSError,), is_full, _disk),
        Fault("no memory", (MemoryError, RuntimeError, OSError), _of_memory, _memory, warm=True),
    )
}
