"""Processes that may be killed, interrupted, or have little memory: each is a fork of a server that has imported nybble."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .figure import Tally

_SPARE = 384 << 20  # bytes of memory beyond those that importing took
# torch imports it when an optimizer is first made, for seconds, and cannot be used after an interrupt meanwhile.
_PRELOAD = ("torch._dynamo",)
_LONGEST = 86400.0  # seconds that a child may take


class ChildFailed(RuntimeError):
    """A child raised; the message is the last line of the traceback that it prints."""


class Child:
    """A process that runs ``function(*arguments, say)``; ``say(value)`` sends a value to this process."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "nybble", *_PRELOAD])
        self._here, there = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_run, args=(there, function, arguments), daemon=True)
        self.process.start()
        there.close()

    def heard(self, within: float = 600.0) -> Any:
        """The next value; None: the child has ended. Raises TimeoutError, or ChildFailed if the child raised."""
        if not self._here.poll(within):
            self.end()
            raise TimeoutError(f"a child said nothing for {within} s")
        try:
            kind, value = self._here.recv()
        except (EOFError, ConnectionResetError):
            return None
        if kind == "raised":
            raise ChildFailed(value.strip().splitlines()[-1])
        return value

    def signal(self, number: int) -> None:
        """Send a signal, if the child still runs."""
        pid = self.process.pid
        if self.process.is_alive() and pid is not None:
            os.kill(pid, number)

    def end(self) -> int:
        """Wait until the child has ended, or end it. Its exit code."""
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._here.close()
        return self.process.exitcode or 0


def _run(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*arguments, lambda value: there.send(("said", value)))
    except BaseException:
        there.send(("raised", traceback.format_exc()))
        raise
    finally:
        there.close()


def _end_with_parent() -> None:
    """Wait for the end of the process that asked for this one, which may be killed, and end too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def limited_memory(spare: int = _SPARE) -> None:
    """From here on this process gets ``spare`` more bytes of memory at most."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def in_children(function: Callable[..., None], parts: Iterable[tuple[Any, ...]]) -> Tally:
    """What children find, each of which runs ``function(*part, say)`` and says one Tally; as many at once as there are cores.

    A child that ends without a word is a failure.
    """
    whole, waiting, at_once = Tally(), list(parts), os.cpu_count() or 1
    running: list[tuple[Child, tuple[Any, ...]]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            part = waiting.pop(0)
            running.append((Child(function, *part), part))
        child, part = running.pop(0)
        where = f"{function.__name__}{part}"
        try:
            found = child.heard(_LONGEST)
        except ChildFailed as error:
            whole.add(f"{where}: {error}")
            found = Tally()
        code = child.end()
        if isinstance(found, Tally):
            whole.merge(found)
        else:
            whole.add(f"{where}: a child ended with {code}, and said nothing")
    return whole


def slices(count: int, at_once: int | None = None) -> list[tuple[int, int]]:
    """[0, count) in as many ranges as there are cores."""
    parts = max(min(at_once or os.cpu_count() or 1, count), 1)
    bounds = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def in_memory() -> str | None:
    """A place for many small files: in memory, if the system has one; None: where temporary files usually are."""
    place = "/dev/shm"  # noqa: S108 only directories that tempfile makes are put there
    return place if os.access(place, os.W_OK) else None
