"""From a problem to a kernel. The layout is chosen when a weight is packed; per call only M may choose."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import selfcheck
from .registry import KernelSpec, Plan, Problem, specs
from .scheme import Scheme

# Of Triton's kernels: what whoever waits for it should know.
FIRST_CALL = "compiled when it is first called, which takes about a second; Triton keeps the code for later processes"


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
        lines.append(f"  runs  {self.kernel or 'nothing: no kernel accepts this'}{self._note()}")
        lines.extend(f"  not   {name}: {reason}" for name, reason in self.rejected.items())
        return "\n".join(lines)

    def _note(self) -> str:
        """What the kernel does to the activations that their dtype does not say, or to its first caller."""
        spec = next((spec for spec in specs() if spec.name == self.kernel), None)
        if spec is None:
            return ""
        if spec.target == "triton":
            return f", {FIRST_CALL}"
        if spec.rounds is None or self.problem.dtype is not torch.float32:
            return ""
        return f", which rounds float32 activations to {str(spec.rounds).removeprefix('torch.')}"


def explain(problem: Problem) -> Explanation:
    """The choice for a problem, with the reason against each other kernel."""
    _check_device(problem)
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
    _check_device(problem)
    for spec in reversed(specs()):
        if spec.why_not(problem) is None:
            return spec
    raise NoKernelError(str(explain(problem)))


def _check_device(problem: Problem) -> None:
    if problem.device == "cuda" and torch.cuda.is_available():
        selfcheck.check_once()


def layout_for(scheme: Scheme, n: int, k: int, device: str) -> str:
    """The layout to pack a weight in."""
    return select(Problem(scheme, m=1, n=n, k=k, device=device)).layout


@lru_cache(maxsize=4096)
def plan_for(scheme: str, layout: str, n: int, k: int, dtype: torch.dtype, device: str) -> Plan:
    """The callable for a packed weight and activations of a dtype, whatever their number."""
    problem = Problem(Scheme.parse(scheme), m=1, n=n, k=k, dtype=dtype, device=device, layout=layout)
    starts = [1, *_boundaries(problem)]
    chosen = [select(replace(problem, m=m)) for m in starts]
    made = {spec.name: _make(spec, problem) for spec in chosen}
    return made[chosen[0].name] if len(made) == 1 else ByRows(k, starts, [made[spec.name] for spec in chosen])


class ByRows:
    """Plans for one packed weight, of which the number of rows chooses: plans[i] from starts[i] rows on."""

    def __init__(self, k: int, starts: list[int], plans: list[Plan]) -> None:
        self._k, self._starts, self._plans = k, starts, plans

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self._plans[bisect_right(self._starts, max(x.numel() // self._k, 1)) - 1](x, packed, bias, out)


def _boundaries(problem: Problem) -> list[int]:
    """Numbers of rows at which another kernel may begin to serve a problem, in order."""
    ranges = [spec.m_range for spec in specs() if spec.scheme == problem.scheme.family]
    starts = {least for least, _ in ranges} | {most + 1 for _, most in ranges if most}
    return sorted(starts - {1})


def _make(spec: KernelSpec, problem: Problem) -> Plan:
    assert spec.make is not None, "select returns kernels that can run"  # noqa: S101
    return spec.make(problem.scheme, problem.n, problem.k)
