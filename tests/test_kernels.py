"""Every linear kernel of the registry against the float64 oracle."""

from __future__ import annotations

import itertools
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import reference, targets
from nybble.registry import FLOATS, KernelSpec, Problem, specs
from nybble.rounding import quantize_weight
from nybble.scheme import Scheme
from nybble.testing import SHAPES, error_bound, random_weight, run, run_into, schemes_of

CASES = [
    pytest.param(spec, scheme, id=f"{spec.name}-{scheme}")
    for spec in specs()
    if spec.device != "cuda"  # Triton's have tests of their own
    for scheme in schemes_of(spec.scheme)
]
EXACT = [case for case in CASES if case.values[0].exact]
COMPILED = [case for case in CASES if case.values[0].target != "torch"]
# Sparse weights differ by what packing leaves out: one scheme a kernel, where a test is about the activations.
FEW = [case for case in CASES if (s := case.values[1]).sparsity is None or s == schemes_of(s.family)[0]]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in FLOATS]


def usable(spec: KernelSpec, scheme: Scheme, dtype: torch.dtype | None = None) -> None:
    reason = spec.why_not(Problem(scheme, m=1, n=1, k=1, dtype=dtype or spec.act_dtypes[0], layout=spec.layout))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")


def seed_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def activations(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    return (x * torch.exp2(torch.randint(-6, 7, (m, 1), generator=generator))).to(dtype)


@pytest.mark.parametrize(
    ("spec", "scheme", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in case.values[0].act_dtypes
    ],
)
def test_agrees_with_the_oracle(spec: KernelSpec, scheme: Scheme, dtype: torch.dtype) -> None:
    usable(spec, scheme, dtype)
    for name, (m, n, k) in SHAPES.items():
        for with_bias in (False, True):
            seed = seed_of(scheme, name)
            quantized = random_weight(scheme, n, k, seed)
            x = activations(m, k, dtype, seed)
            bias = torch.randn(n).to(dtype) if with_bias else None
            got = run(spec, quantized, scheme, x, bias)
            expected = reference.linear(x, quantized, bias, scheme, torch.float64)
            bound = error_bound(x, quantized, scheme, expected, dtype)
            assert got.shape == (m, n)
            assert ((got.double() - expected).abs() <= bound).all(), f"{name} {(m, n, k)} bias={with_bias}"
            if m and n > 1 and expected.any():  # few blocks may all be zero
                assert bound.max() < 0.1 * expected.abs().max(), "a vacuous bound"


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_integer_data_gives_exact_results(spec: KernelSpec, scheme: Scheme) -> None:
    """Every partial sum fits 24 bits, so any order of summation gives the same float."""
    usable(spec, scheme)
    for name, (m, n, k) in SHAPES.items():
        quantized = random_weight(scheme, n, k, seed_of(name), unit_scale=True)
        x = torch.randint(-7, 8, (m, k)).to(spec.act_dtypes[0])
        if scheme.act_bits == 8 and k == 1:
            continue  # one value has no range of its own
        if scheme.act_bits == 8 and m:
            x[:, :1], x[:, -1:] = -128, 127  # so that the scale is 1, the zero point 0: the codes are the integers
        bias = torch.randint(-9, 10, (n,)).float()
        got = run(spec, quantized, scheme, x, bias)
        assert torch.equal(got, reference.linear(x, quantized, bias, scheme, torch.float64).to(x.dtype)), name


def corner_codes(n: int, k: int) -> torch.Tensor:
    corners = torch.tensor([127, -127, 0, 1, -1, 126, -126, 64], dtype=torch.int8)
    return corners[torch.randint(0, len(corners), (n, k))]


def usual_codes(n: int, k: int) -> torch.Tensor:
    """As trained weights give them: most are small, few pairs could overflow 16 bits."""
    return (torch.randn(n, k) * 33).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("codes", [corner_codes, usual_codes])
@pytest.mark.parametrize(("spec", "scheme"), [case for case in COMPILED if case.values[0].scheme == "w8a8"])
def test_accumulators_are_exact(spec: KernelSpec, scheme: Scheme, codes) -> None:
    usable(spec, scheme)
    for m, n, k in [*SHAPES.values(), (3, 17, 5000), (40, 70, 5000)]:
        quantized = random_weight(scheme, n, k)
        quantized.qweight.copy_(codes(n, k))
        if k == 1:
            continue  # one value has no range of its own
        x = corner_codes(m, k).float()
        x[:, k // 2], x[:, k // 2 - 1] = 127, -128
        out = torch.full((m, n), 0x55555555, dtype=torch.int32)
        run_into(spec, quantized, scheme, x, None, out)
        assert torch.equal(out.double(), x.double() @ quantized.qweight.double().t()), (m, n, k)


@pytest.mark.parametrize(("spec", "scheme"), [case for case in COMPILED if case.values[0].scheme == "w8a8"])
@pytest.mark.parametrize("sign", [1, -1])
def test_longest_k_at_the_extremes(spec: KernelSpec, scheme: Scheme, sign: int) -> None:
    usable(spec, scheme)
    k = scheme.max_in_features
    quantized = random_weight(scheme, 2, k)
    quantized.qweight.fill_(127 * sign)
    x = torch.full((1, k), -128.0)
    x[0, 7] = 127
    out = torch.zeros((1, 2), dtype=torch.int32)
    run_into(spec, quantized, scheme, x, None, out)
    assert (out == sign * 127 * (-128 * (k - 1) + 127)).all()
    x = torch.full((1, k), 3.0)
    expected = reference.linear(x, quantized, None, scheme, torch.float64)
    got = run(spec, quantized, scheme, x)
    assert ((got.double() - expected).abs() <= error_bound(x, quantized, scheme, expected, torch.float32)).all()
    with pytest.raises(ValueError, match="in_features"):
        scheme.check_shape(2, k + 1)
    assert spec.make is not None
    longer = random_weight(scheme, 2, k + 1)
    with pytest.raises(ValueError, match=r"in_features=65794.*wrap"):
        run_into(spec, longer, scheme, torch.zeros(1, k + 1), None, out)


@pytest.mark.parametrize("scheme", [pytest.param(s, id=str(s)) for f in ("w8a8", "w4a8") for s in schemes_of(f)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_kernels_agree_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    """On every target that runs here; `scalar` always does."""
    here = [s for s in specs() if s.exact and s.why_not(Problem(scheme, m=1, n=1, k=1)) is None]
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


@pytest.mark.parametrize(("spec", "scheme"), COMPILED)
def test_thread_count_changes_no_bit(spec: KernelSpec, scheme: Scheme, threads) -> None:
    usable(spec, scheme)
    for m, n, k in ((1, 700, 300), (61, 260, 136), (200, 33, 70)):
        quantized, x = random_weight(scheme, n, k), activations(m, k, spec.act_dtypes[0], 3)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(run(spec, quantized, scheme, x))
        assert not torch.isnan(results[0]).any(), "an output was not written"
        assert all(torch.equal(results[0], other) for other in results[1:]), (m, n, k)


@pytest.mark.parametrize(("spec", "scheme"), [case for case in FEW if case in COMPILED])
def test_many_rows_are_chunked(spec: KernelSpec, scheme: Scheme) -> None:
    """More activations than one panel holds: 4 MiB, so 2,000 rows of 800 floats."""
    usable(spec, scheme)
    m, n, k = 2000 if spec.panel == 0 else 6000, 17, 800
    quantized, x = random_weight(scheme, n, k), activations(m, k, spec.act_dtypes[0], 5)
    got, expected = run(spec, quantized, scheme, x), reference.linear(x, quantized, None, scheme, torch.float64)
    assert ((got.double() - expected).abs() <= error_bound(x, quantized, scheme, expected, x.dtype)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("spec", "scheme"), FEW)
def test_a_bad_row_spoils_itself_alone(spec: KernelSpec, scheme: Scheme, bad: float) -> None:
    usable(spec, scheme)
    m, n, k = 13, 19, 70
    quantized = random_weight(scheme, n, k)
    clean = activations(m, k, spec.act_dtypes[0], 7)
    good = run(spec, quantized, scheme, clean)
    for row, column in itertools.chain(((r, 3) for r in range(m)), ((5, c) for c in range(k))):
        x = clean.clone()
        x[row, column] = bad
        got = run(spec, quantized, scheme, x)
        others = torch.arange(m) != row
        assert torch.equal(got[others], good[others]), (row, column)
        if scheme.act_bits == 8 or math.isnan(bad):
            assert torch.isnan(got[row]).all(), (row, column)
        else:
            assert not torch.isfinite(got[row]).any(), (row, column)


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_extreme_rows(spec: KernelSpec, scheme: Scheme) -> None:
    usable(spec, scheme)
    n, k = 21, 70
    dtype = spec.act_dtypes[0]
    quantized, bias = random_weight(scheme, n, k), torch.randn(n).to(dtype)
    ones = torch.randn(k)
    x = torch.stack([torch.zeros(k), -torch.zeros(k), ones * 1e30, ones * 1e-30, ones * 1e-38, ones * 1e-41, ones])
    x = x.to(dtype)
    got = run(spec, quantized, scheme, x)
    expected = reference.linear(x, quantized, None, scheme, torch.float64)
    assert (got[:2] == 0).all(), "a row of zeros"
    assert torch.equal(run(spec, quantized, scheme, x, bias)[:2], bias.expand(2, n)), "a row of zeros gives the bias"
    bound = error_bound(x, quantized, scheme, expected, dtype)
    if spec.flushes_subnormals:
        bound += 2.0**-126 * 16 * k  # each product of a code may be flushed to 0
    assert ((got.double() - expected).abs() <= bound).all()
    if not spec.flushes_subnormals:
        assert (got[4].double() - expected[4]).abs().max() <= 0.01 * expected[4].abs().max(), (
            "rows of 1e-38 keep their size"
        )


@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_zero_and_constant_groups(spec: KernelSpec, scheme: Scheme) -> None:
    usable(spec, scheme)
    weight = torch.zeros(18, 130)
    weight[1] = 0.5
    weight[2] = -0.5
    weight[3, :32] = 1e-5
    quantized = quantize_weight(weight, scheme)
    x = activations(4, 130, spec.act_dtypes[0], 9)
    got, expected = run(spec, quantized, scheme, x), reference.linear(x, quantized, None, scheme, torch.float64)
    assert (got[:, 0] == 0).all()
    assert (got[:, 4:] == 0).all()
    assert ((got.double() - expected).abs() <= error_bound(x, quantized, scheme, expected, x.dtype)).all()
    assert torch.allclose(got[:, 1].double(), x.double().sum(1) * 0.5, rtol=0.05, atol=0.05 * float(x.abs().max()))


@pytest.mark.parametrize(("spec", "scheme"), EXACT)
def test_every_small_shape(spec: KernelSpec, scheme: Scheme) -> None:
    """M and N over the block sizes, K over two groups, at random: integer data, so the result is exact."""
    usable(spec, scheme)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(1, 40), st.integers(1, 70), st.integers(2, 270), st.integers(0, 2**31))
    def check(m: int, n: int, k: int, seed: int) -> None:
        quantized = random_weight(scheme, n, k, seed, unit_scale=True)
        x = torch.randint(-127, 128, (m, k), generator=torch.manual_seed(seed)).float()
        x[:, seed % k], x[:, seed % k - 1] = -128, 127
        assert torch.equal(
            run(spec, quantized, scheme, x).double(), reference.linear(x, quantized, None, scheme, torch.float64)
        )

    check()
