"""Which kernels serve a packed weight, as text, for processes without Python: see csrc/plan.h."""

from __future__ import annotations

from pathlib import Path

from ..native import DTYPES, LinearPlan, extension
from ..weights.scheme import Scheme
from . import targets
from .explanation import NoKernelError
from .registry import specs
from .selection import explain
from .spec import FLOATS, Problem


def libraries() -> tuple[Path, Path]:
    """The library with the op of packages, which may be missing, and the one with the kernels, of this installation.

    Raises:
        FileNotFoundError: nybble was built without the first.
    """
    kernels = extension()
    op = kernels.with_name("libnybble_aot.so")
    if not op.is_file():
        raise FileNotFoundError(f"{op}: is missing; this nybble was built without the library of AOTInductor packages")
    return op, kernels


def plan_text(scheme: str, layout: str, n: int, k: int) -> str:
    """Every compiled kernel that this machine may run for a packed weight (n, k), the preferred first, for each dtype.

    A CPU that lacks instructions of the first takes the first that it can run.

    Raises:
        NoKernelError: no compiled kernel reads the layout.
    """
    parsed, lines = Scheme.parse(scheme), ["nybble-plan 1"]
    for dtype in FLOATS:
        for spec in reversed(specs()):
            least, most = spec.m_range
            problem = Problem(parsed, m=least, n=n, k=k, dtype=dtype, layout=layout)
            plan = spec.plan(parsed, n, k, problem.form) if spec.why_not(problem) is None else None
            if isinstance(plan, LinearPlan):
                needs = ",".join(targets.find(spec.target).needs) or "-"
                lines.append(f"{DTYPES[dtype]} {least} {most or 0} {needs} {plan.words()}")
    if len(lines) == 1:
        problem = Problem(parsed, m=1, n=n, k=k, layout=layout)
        raise NoKernelError.of(explain(problem))
    return "\n".join(lines) + "\n"
