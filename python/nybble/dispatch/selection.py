"""From a problem to a kernel. The layout is chosen when a weight is packed; per call only M may choose."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..layouts.tiles import TILE_N
from ..native import TILED, LinearPlan
from ..weights.form import USUAL, Form, split_layout
from ..weights.scheme import Scheme
from . import selfcheck, targets
from .explanation import Explanation, NoKernelError
from .registry import specs
from .spec import DISTRUSTED, KernelSpec, Plan, Problem

# A note on kernels that are compiled when they are first called.
FIRST_CALL = "compiled when it is first called, which takes about a second; Triton keeps the code for later processes"
# A note on kernels of GPUs and of plug-ins that no call has chosen yet.
UNCHECKED = "compared with the reference before it is first used here; one that disagrees is left out"

# Numbers of rows of which a plan remembers the kernel.
_MOST_COUNTS = 4096


def explain(problem: Problem) -> Explanation:
    """The choice for a problem, with the reason against each other kernel. Nothing runs."""
    chosen: KernelSpec | None = None
    rejected, others = {}, set()
    for spec in reversed(specs()):
        reason = spec.why_not(problem)
        if reason is None and chosen is None:
            chosen = spec
            continue
        rejected[spec.name] = reason or f"slower than {chosen and chosen.name}"
        if spec.scheme != problem.scheme.family:
            others.add(spec.name)
    if chosen is None:
        return Explanation(problem, None, rejected, frozenset(others))
    return Explanation(problem, chosen.name, rejected, frozenset(others), tuple(_notes(chosen, problem)))


def _notes(spec: KernelSpec, problem: Problem) -> Iterator[str]:
    """What the kernel does to the activations; when it is compiled, and checked."""
    act = problem.scheme.act_type
    if act.quantized:
        scale = "the static scale of the layer" if problem.scheme.static else "a scale per token"
        yield f"which rounds activations to int{act.bits} with {scale}"
    elif spec.rounds is not None and problem.dtype is torch.float32:
        yield f"which rounds float32 activations to {str(spec.rounds).removeprefix('torch.')}"
    else:
        yield f"which takes activations as they are, in {str(problem.dtype).removeprefix('torch.')}"
    if spec.rounds_book and problem.scheme.book:
        yield "which rounds the values of its codes to bfloat16"
    if targets.find(spec.target).compiles_on_first_call:
        yield FIRST_CALL
    if selfcheck.pending(spec):
        yield UNCHECKED


def select(problem: Problem) -> KernelSpec:
    """The preferred kernel that accepts the problem. One for a GPU, or of a plug-in, agrees with the reference (selfcheck).

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
    raise NoKernelError.of(explain(problem))


def layout_for(scheme: Scheme, n: int, k: int, device: str, form: Form = USUAL) -> str:
    """The layout to pack a weight in."""
    return form.of_layout(select(Problem(scheme, m=1, n=n, k=k, device=device, form=form)).layout)


@lru_cache(maxsize=4096)
def plan_for(scheme: str, layout: str, n: int, k: int, dtype: torch.dtype, device: str) -> Plan:
    """The callable for a packed weight and activations of a dtype, whatever their number.

    Raises:
        NoKernelError: no kernel accepts the problem; on a GPU the callable raises it.
    """
    problem = Problem(Scheme.parse(scheme), m=1, n=n, k=k, dtype=dtype, device=device, layout=layout)
    starts = [0, *_boundaries(problem)]
    if device == "cuda" or len(starts) > 1:
        return ByRows(problem, starts)
    spec, settled = _select(problem)
    return _make(spec, problem) if settled else ByRows(problem, starts)


@lru_cache(maxsize=4096)
def compiled_plan(scheme: str, layout: str, size: tuple[int, int], dtype: torch.dtype, m: int) -> LinearPlan | None:
    """The compiled CPU kernels that plan_for's plan runs for m rows; None if it runs others. size: (N, K)."""
    n, k = size
    problem = Problem(Scheme.parse(scheme), m=m, n=n, k=k, dtype=dtype, device="cpu", layout=layout)
    spec, _ = _select(problem)
    plan = _make(spec, problem)
    return plan if isinstance(plan, LinearPlan) else None


@lru_cache(maxsize=4096)
def part_plan(
    scheme: str, layout: str, size: tuple[int, int], dtype: torch.dtype, m: int, part: tuple[int, int]
) -> LinearPlan | None:
    """As compiled_plan, for the outputs [begin, end) alone; None also where the layout cannot be cut there."""
    cut = split_layout(layout)[0] in TILED and part[0] % TILE_N == 0
    plan = compiled_plan(scheme, layout, size, dtype, m) if cut else None
    return None if plan is None else plan.of_rows(*part)


def row_starts(scheme: Scheme, dtype: torch.dtype) -> list[int]:
    """Numbers of rows of activations on the CPU at which another kernel may begin to serve weights of a scheme, from 2."""
    return _boundaries(Problem(scheme, m=1, n=1, k=1, dtype=dtype, device="cpu"))


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
    devices, here = (None, problem.device), targets.detect().targets
    able = [spec for spec in specs() if spec.scheme == problem.scheme.family and spec.device in devices]
    ranges = [spec.m_range for spec in able if spec.target in here]
    starts = {least for least, _ in ranges} | {most + 1 for _, most in ranges if most}
    return sorted(starts - {1})


def _make(spec: KernelSpec, problem: Problem) -> Plan:
    return spec.plan(problem.scheme, problem.n, problem.k, problem.form)
