"""Verify a kernel against the oracle, then time it next to torch's dense layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.nn.functional import linear

from .. import layouts, native, reference
from ..passes.measure import interleaved
from ..registry import KernelSpec, Problem, specs
from ..scheme import Scheme
from ..testing import error_bound, random_weight, run_into, schemes_of

BUDGET_S = 0.3
# Rows that the float64 oracle checks; a wrong kernel shows in few.
CHECKED_ROWS = 16


class WrongKernelError(RuntimeError):
    """A kernel's output is outside its error bound: it is not timed."""


@dataclass(frozen=True)
class Result:
    """One kernel on one shape.

    us: median microseconds a call; gops: 2 M N K operations a second, in 10^9; pack_ms: packing the weight, once.
    """

    kernel: str
    scheme: str
    m: int
    n: int
    k: int
    threads: int
    us: float
    gops: float
    pack_ms: float
    torch_fp32_us: float
    torch_bf16_us: float


def usable_cases(pattern: str) -> list[tuple[KernelSpec, Scheme]]:
    """Compiled kernels that run here and whose name-scheme matches the glob, with each of their schemes."""
    cases = [(spec, scheme) for spec in specs() if spec.target != "torch" for scheme in schemes_of(spec.scheme)]
    return [
        (spec, scheme)
        for spec, scheme in cases
        if fnmatchcase(f"{spec.name}-{scheme}", pattern) and spec.why_not(Problem(scheme, m=1, n=1, k=1)) is None
    ]


def bench(pattern: str, shapes: Sequence[tuple[int, int]], ms: Sequence[int]) -> Iterator[Result]:
    """Results for every matching kernel, (N, K) shape and M, as they come.

    Raises:
        WrongKernelError: a kernel disagrees with the oracle.
    """
    for spec, scheme in usable_cases(pattern):
        for n, k in shapes:
            for m in ms:
                yield _measure(spec, scheme, m, n, k)


def _measure(spec: KernelSpec, scheme: Scheme, m: int, n: int, k: int) -> Result:
    quantized, x = random_weight(scheme, n, k), torch.randn(m, k)
    checked, out = x[:CHECKED_ROWS], torch.empty(m, n)
    run_into(spec, quantized, scheme, checked, None, out[:CHECKED_ROWS])
    expected = reference.linear(checked, quantized, None, scheme, torch.float64)
    error = (out[:CHECKED_ROWS].double() - expected).abs()
    if not (error <= error_bound(checked, quantized, scheme, expected, torch.float32)).all():
        raise WrongKernelError(f"{spec.name} {scheme} m={m} n={n} k={k}: off by {error.max():.3g}; not timed")
    assert spec.make is not None  # noqa: S101
    plan, packed = spec.make(scheme, n, k), layouts.pack(quantized, spec.layout, scheme, k)
    weight, weight16, x16 = torch.randn(n, k), torch.randn(n, k).bfloat16(), x.bfloat16()
    pack_s = interleaved({"pack": lambda: native.pack(quantized, scheme, k)}, BUDGET_S / 10)["pack"]
    contestants: dict[str, Callable[[], object]] = {
        "nybble": lambda: plan(x, packed, None, out),
        "fp32": lambda: linear(x, weight),
        "bf16": lambda: linear(x16, weight16),
    }
    with torch.inference_mode():
        seconds = interleaved(contestants, BUDGET_S)
    us = {name: value * 1e6 for name, value in seconds.items()}
    gops = 2 * m * n * k / seconds["nybble"] / 1e9
    return Result(
        kernel=spec.name,
        scheme=str(scheme),
        m=m,
        n=n,
        k=k,
        threads=torch.get_num_threads(),
        us=us["nybble"],
        gops=gops,
        pack_ms=pack_s * 1e3,
        torch_fp32_us=us["fp32"],
        torch_bf16_us=us["bf16"],
    )
