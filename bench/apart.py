"""Runs a function in a new process, so that its memory and what it caches are its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from .quiet import quiet

T = TypeVar("T")


def apart(function: Callable[[str, int], T], name: str, threads: int) -> T:
    """``function(name, threads)``.

    Raises:
        ChildProcessError: the process died.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(function, name, threads).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(f"{name}: its process died, possibly out of memory") from error
