"""From a problem to a kernel. The layout is chosen when a weight is packed; per call only M may choose."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..weights.scheme import Scheme
from . import selfcheck
from .registry import DISTRUSTED, KernelSpec, Plan, Problem, specs

# Of Triton's kernels: what whoever waits for it should know.
FIRST_CALL = "compiled when it is first called, which takes about a second; Triton keeps the code for later processes"
# Of kernels that no call has chosen yet on this machine's GPU.
UNCHECKED = "compared with the reference before it is first used here; one that disagrees is left out"

# Numbers of rows of which a plan remembers the kernel.
_MOST_COUNTS = 4096


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
        notes = [FIRST_CALL] if spec.target == "triton" else []
        if spec.rounds is not None and self.problem.dtype is torch.float32:
            notes.append(f"which rounds float32 activations to {str(spec.rounds).removeprefix('torch.')}")
        if selfcheck.pending(spec):
            notes.append(UNCHECKED)
        return "".join(f", {note}" for note in notes)


def explain(problem: Problem) -> Explanation:
    """The choice for a problem, with the reason against each other kernel. Nothing runs."""
    chosen, rejected = None, {}
    for spec in reversed(specs()):
        reason = spec.why_not(problem)
        if reason is None and chosen is None:
            chosen = spec.name
        else:
            rejected[spec.name] = reason or f"{chosen} is faster"
    return Explanation(problem, chosen, rejected)


def select(problem: Problem) -> KernelSpec:
    """The preferred kernel that accepts the problem; of a GPU's, one that agrees with the reference there (selfcheck).

    Raises:
        NoKernelError: none does; the message says why for each.
    """
    return _select(problem)[0]


def _select(problem: Problem) -> tuple[KernelSpec, bool]:
    """As select, and whether the choice is settled: not while the kernel could not be compared yet."""
    for spec in reversed(specs()):
        if spec.why_not(problem) is None:
            settled = selfcheck.check(spec)
            if spec.name not in DISTRUSTED:
                return spec, settled
    raise NoKernelError(str(explain(problem)))


def layout_for(scheme: Scheme, n: int, k: int, device: str) -> str:
    """The layout to pack a weight in."""
    return select(Problem(scheme, m=1, n=n, k=k, device=device)).layout


@lru_cache(maxsize=4096)
def plan_for(scheme: str, layout: str, n: int, k: int, dtype: torch.dtype, device: str) -> Plan:
    """The callable for a packed weight and activations of a dtype, whatever their number.

    Raises:
        NoKernelError: no kernel accepts the problem; on a GPU the callable raises it.
    """
    problem = Problem(Scheme.parse(scheme), m=1, n=n, k=k, dtype=dtype, device=device, layout=layout)
    starts = [0, *_boundaries(problem)]
    return ByRows(problem, starts) if device == "cuda" or len(starts) > 1 else _make(select(problem), problem)


class ByRows:
    """Plans for one packed weight, of which the number of rows chooses. Each is chosen when it is first needed, so that no
    kernel is compared or compiled that nobody calls."""

    def __init__(self, problem: Problem, starts: list[int]) -> None:
        self._problem, self._starts = problem, starts
        self._made: dict[str, Plan] = {}
        self._chosen: list[Plan | None] = [None] * len(starts)
        self._plans: dict[int, Plan] = {}  # by the inputs of all rows, so that a call neither divides nor searches

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        count = x.numel()
        plan = self._plans.get(count) or self._of(count)
        plan(x, packed, bias, out)

    def _of(self, count: int) -> Plan:
        i = bisect_right(self._starts, count // self._problem.k) - 1
        plan = self._chosen[i]
        if plan is None:
            plan, settled = self._choose(replace(self._problem, m=max(self._starts[i], 1)))
            if not settled:
                return plan
            self._chosen[i] = plan
        if len(self._plans) >= _MOST_COUNTS:
            self._plans.clear()
        self._plans[count] = plan
        return plan

    def _choose(self, problem: Problem) -> tuple[Plan, bool]:
        spec, settled = _select(problem)
        return self._made.get(spec.name) or self._made.setdefault(spec.name, _make(spec, problem)), settled


def _boundaries(problem: Problem) -> list[int]:
    """Numbers of rows at which another kernel may begin to serve a problem, in order."""
    here = (None, problem.device)
    ranges = [spec.m_range for spec in specs() if spec.scheme == problem.scheme.family and spec.device in here]
    starts = {least for least, _ in ranges} | {most + 1 for _, most in ranges if most}
    return sorted(starts - {1})


def _make(spec: KernelSpec, problem: Problem) -> Plan:
    assert spec.make is not None, "select returns kernels that can run"  # noqa: S101
    return spec.make(problem.scheme, problem.n, problem.k)
