"""Which kernel runs a layer here: targets, the kernel registry, the choice and its explanation."""

from __future__ import annotations

from .. import _moved
from .explanation import Explanation, NoKernelError
from .selection import explain, select
from .spec import KernelSpec, Problem
from .targets import Target, detect

__all__ = ["Explanation", "KernelSpec", "NoKernelError", "Problem", "Target", "detect", "explain", "select"]

__getattr__ = _moved.old_names(__name__)
