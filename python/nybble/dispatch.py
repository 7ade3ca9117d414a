"""From a problem to a kernel. The layout is chosen when a weight is packed; per call only M may choose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .registry import KernelSpec, Plan, Problem, specs
from .scheme import Scheme


class NoKernelError(RuntimeError):
    """No kernel solves the problem; the message has every reason."""


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs, and why each other does not."""

    problem: Problem
    kernel: str | None
    rejected: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        lines = [f"{p.scheme} m={p.m} n={p.n} k={p.k} {str(p.dtype).removeprefix('torch.')} on {p.device}"]
        lines.append(f"  runs  {self.kernel or 'nothing: no kernel accepts this'}")
        lines.extend(f"  not   {name}: {reason}" for name, reason in self.rejected.items())
        return "\n".join(lines)


def explain(problem: Problem) -> Explanation:
    """The choice for a problem, with the reason against each other kernel."""
    chosen, rejected = None, {}
    for spec in reversed(specs()):
        reason = spec.why_not(problem)
        if reason is None and chosen is None:
            chosen = spec.name
        else:
            rejected[spec.name] = reason or f"{chosen} is faster"
    return Explanation(problem, chosen, rejected)


def select(problem: Problem) -> KernelSpec:
    """The preferred kernel that accepts the problem.

    Raises:
        NoKernelError: none does; the message says why for each.
    """
    for spec in reversed(specs()):
        if spec.why_not(problem) is None:
            return spec
    raise NoKernelError(str(explain(problem)))


def layout_for(scheme: Scheme, n: int, k: int, device: str) -> str:
    """The layout to pack a weight in."""
    return select(Problem(scheme, m=1, n=n, k=k, device=device)).layout


@lru_cache(maxsize=4096)
def plan_for(scheme: str, layout: str, n: int, k: int, dtype: torch.dtype, device: str) -> Plan:
    """The callable for a packed weight and activations of a dtype, whatever their number."""
    problem = Problem(Scheme.parse(scheme), m=1, n=n, k=k, dtype=dtype, device=device, layout=layout)
    make = select(problem).make
    assert make is not None, "select returns kernels that can run"  # noqa: S101
    return make(problem.scheme, n, k)
