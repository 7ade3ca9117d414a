"""Tools for testing a kernel: random weights, a float64 oracle with error bounds, guarded memory, and standard checks.

    nybble.testing.check_kernel(spec)  # every check that applies, for each scheme
    subject = nybble.testing.Subject(spec, nybble.Scheme.parse("w8a8"))
    nybble.testing.checks.strides_are_followed(subject)

Inside: `checks` (of linear kernels), `suite` (which checks apply to a kernel, and all of them in one call), `oracle` (weights, expected outputs, error bounds), `guard` (memory
next to a page that faults), `models` (small models for tests of the passes).
"""

from __future__ import annotations

from .. import _moved
from . import checks
from .checks import Case, Subject, cases
from .guard import Guarded, guarded
from .oracle import error_bound, expected_output, random_weight, run, schemes_of, served_by
from .suite import CHECKS, Check, check_kernel, run_all

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "Guarded",
    "Subject",
    "cases",
    "check_kernel",
    "checks",
    "error_bound",
    "expected_output",
    "guarded",
    "random_weight",
    "run",
    "run_all",
    "schemes_of",
    "served_by",
]

__getattr__ = _moved.old_names(__name__)
