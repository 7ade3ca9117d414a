"""The memory that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def return_freed() -> None:
    """Give memory that was freed back to the system: glibc keeps what is below blocks in use, such as packed weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
