"""The memory that the C library keeps."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def return_freed() -> None:
    """Give memory that was freed back to the system: glibc keeps what is below blocks in use, such as packed weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def returning_freed(run: Callable[P, T]) -> Callable[P, T]:
    """The same function; what it held until its end, such as replaced layers, goes back to the system after it."""

    @wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        finally:
            return_freed()

    return wrapped
