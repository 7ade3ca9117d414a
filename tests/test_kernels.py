"""Every linear kernel of the registry that runs on a CPU against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.dispatch import targets
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS, KernelSpec, Problem
from nybble.native.weights import GROUPED
from nybble.testing import checks, suite
from nybble.testing.checks import Subject, activations, seed_of
from nybble.testing.oracle import SHAPES, random_weight, run, schemes_of, served_by
from nybble.weights.scheme import Scheme

CASES = [
    pytest.param(spec, scheme, id=f"{spec.name}-{scheme}")
    for spec in specs()
    if spec.device != "cuda"  # see test_gpu.py
    for scheme in served_by(spec)
    # Of 8 bits by group, whose loop is that of 4 bits: the smallest and the largest groups, and rows with zero points.
    if spec.layout not in GROUPED or scheme.group_size in (16, 128) or not (scheme.group_size or scheme.symmetric)
]
EXACT = [case for case in CASES if case.values[0].exact]
COMPILED = [case for case in CASES if case.values[0].target != "torch"]
# Sparse weights differ by what packing leaves out: one scheme a kernel, where a test is about the activations.
FEW = [case for case in CASES if (s := case.values[1]).sparsity is None or s == schemes_of(s.family)[0]]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in FLOATS]


def applying(name: str) -> list[Any]:
    """The cases that a check applies to."""
    return [case for case in COMPILED if suite.CHECKS[name].applies(Subject(*case.values))]


def usable(spec: KernelSpec, scheme: Scheme) -> Subject:
    reason = spec.why_not(Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")
    return Subject(spec, scheme)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(
    ("spec", "scheme", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in case.values[0].act_dtypes
    ],
)
def test_agrees_with_the_oracle(spec: KernelSpec, scheme: Scheme, dtype: torch.dtype) -> None:
    for case in checks.cases([usable(spec, scheme)]):
        if case.dtype == dtype:
            case.check()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_integer_data_gives_exact_results(spec: KernelSpec, scheme: Scheme) -> None:
    checks.integer_data_gives_exact_results(usable(spec, scheme))


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("spec", "scheme"), applying("accumulators_are_exact"))
def test_accumulators_are_exact(spec: KernelSpec, scheme: Scheme) -> None:
    checks.accumulators_are_exact(usable(spec, scheme))


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("spec", "scheme"), applying("largest_k_does_not_overflow"))
def test_longest_k_at_the_extremes(spec: KernelSpec, scheme: Scheme) -> None:
    checks.largest_k_does_not_overflow(usable(spec, scheme))


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize(("spec", "scheme"), applying("batches_give_the_same_bits"))
def test_batches_give_the_same_bits(spec: KernelSpec, scheme: Scheme) -> None:
    checks.batches_give_the_same_bits(usable(spec, scheme))


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(
    "scheme", [pytest.param(s, id=str(s)) for f in ("w8a8", "w8a7", "w4a8") for s in schemes_of(f)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_kernels_agree_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    """On every target that runs here; `scalar` always does. Kernels of groups that are given weights of n16k4, which
    dispatch never does, multiply the scales in another order."""
    can = [s for s in specs() if s.exact and s.why_not(Problem(scheme, m=s.m_range[0], n=1, k=1)) is None]
    here = [s for s in can if s.layout not in GROUPED] or can
    assert here, "no integer kernel is usable"
    if len(here) == 1:
        pytest.skip(f"only {here[0].name} runs under {targets.CAP_VARIABLE}={targets.detect().cap} on this CPU")
    for name, (m, n, k) in SHAPES.items():
        quantized, x = random_weight(scheme, n, k), activations(m, k, dtype, seed_of(name))
        first, *others = [
            run(spec, quantized, scheme, x, torch.randn(n, generator=torch.manual_seed(1))) for spec in here
        ]
        for spec, other in zip(here[1:], others, strict=True):
            assert torch.equal(first, other), f"{spec.name} and {here[0].name} differ on {name}"


@pytest.mark.sampled(every=6, full=2)
@pytest.mark.parametrize(("spec", "scheme"), COMPILED)
def test_thread_count_changes_no_bit(spec: KernelSpec, scheme: Scheme, threads) -> None:
    """In float32 outputs, since rounding to bfloat16 would hide another order of sums. Of 49 columns, the last tile has
    one, alone or beside another in a piece."""
    subject = usable(spec, scheme)
    for m, n, k in ((1, 700, 300), (61, 260, 136), (200, 33, 70), (64, 49, 4096)):
        quantized, x = random_weight(scheme, n, k), activations(m, k, subject.dtype, 3)
        results = []
        for count in (1, 2, 3, 5, 7):
            threads(count)
            results.append(subject.run(quantized, x, out_dtype=torch.float32))
        assert not torch.isnan(results[0]).any(), "an output was not written"
        assert all(torch.equal(results[0], other) for other in results[1:]), (m, n, k)


@pytest.mark.sampled(every=12, full=2)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("spec", "scheme"), FEW)
def test_a_bad_row_spoils_itself_alone(spec: KernelSpec, scheme: Scheme, bad: float) -> None:
    checks.non_finite_rows_do_not_mix(usable(spec, scheme), bad)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_extreme_rows(spec: KernelSpec, scheme: Scheme) -> None:
    checks.extreme_rows(usable(spec, scheme))


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_zero_and_constant_groups(spec: KernelSpec, scheme: Scheme) -> None:
    checks.zero_and_constant_groups(usable(spec, scheme))


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(("spec", "scheme"), FEW)
def test_strides_are_followed(spec: KernelSpec, scheme: Scheme) -> None:
    checks.strides_are_followed(usable(spec, scheme))


@pytest.mark.sampled(every=6, full=2)
@pytest.mark.parametrize(("spec", "scheme"), EXACT)
def test_every_small_shape(spec: KernelSpec, scheme: Scheme) -> None:
    """M and N over the block sizes, K over two groups, at random: integer data, so the result is exact."""
    subject = usable(spec, scheme)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(1, 40), st.integers(1, 70), st.integers(2, 270), st.integers(0, 2**31))
    def check(m: int, n: int, k: int, seed: int) -> None:
        checks.small_integers_are_exact(subject, m, n, k, seed)

    check()
