"""The Triton kernels. The package itself is callable: `nybble.kernels()` returns the table of all kernels."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Kernels(ModuleType):
    def __call__(self) -> list[dict[str, Any]]:
        """The table of kernels: name, op, scheme, target, layout, built, usable here, and why not."""
        from ..dispatch.registry import kernels

        return kernels()


sys.modules[__name__].__class__ = _Kernels
