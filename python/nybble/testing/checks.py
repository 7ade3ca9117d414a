"""Checks of linear kernels, on any device, against the float64 oracle. suite.CHECKS says which kernels each applies to.

Each check takes a Subject, makes its own data and raises AssertionError. If a kernel does not support a check's number of
rows, the check uses the nearest that it supports.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .. import _moved
from ..dispatch import reference
from ..dispatch.spec import KernelSpec
from ..weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight
from ..weights.scheme import Scheme
from .oracle import SHAPES, expected_output, random_weight, run_into

Shape = tuple[int, int, int]
# More shapes for GPU kernels, around the sizes of their tiles, groups and splits of K.
GPU_SHAPES: dict[str, Shape] = {
    "eight": (8, 65, 129),
    "nine": (9, 64, 128),
    "sixteen": (16, 127, 63),
    "seventeen": (17, 129, 65),
    "one-k": (33, 40, 1),
    "sixty-four": (64, 257, 320),
    "sixty-five": (65, 63, 127),
    "many": (300, 130, 515),
    "split": (1, 64, 8192),
    "split-tail": (5, 70, 5000),
    "wide": (2, 2050, 96),
}
# Shapes of models; compare each in a few ways only, since they are slow.
LARGE_SHAPES: dict[str, Shape] = {
    "token-of-a-model": (1, 4096, 4096),
    "tokens-of-a-model": (48, 2752, 2048),
    "large": (512, 1024, 2048),
    "large-odd": (257, 1001, 3001),
}
# Values before and after an output, in whole cache lines, that a kernel must not change.
_GUARD = 64
_POISON = 0x55555555


@dataclass(frozen=True)
class Subject:
    """The kernel under test: its spec, a scheme that it supports, and the device to run it on."""

    spec: KernelSpec
    scheme: Scheme
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The first of the kernel's activation dtypes."""
        return self.spec.act_dtypes[0]

    def tokens(self, m: int) -> int:
        """m, or the nearest number of rows of activations that the kernel supports."""
        least, most = self.spec.m_range
        return m if self.spec.takes(m) else max(least, min(m, most or m))

    def run(
        self, quantized: QuantizedWeight, x: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output (M, N), on the CPU. Fails if the kernel writes outside it. out_dtype=int32: the accumulators."""
        shape = (x.shape[0], quantized.qweight.shape[0])
        kind = out_dtype or x.dtype
        poison = _POISON if kind == torch.int32 else torch.nan
        held = torch.full((math.prod(shape) + 2 * _GUARD,), poison, dtype=kind, device=self.device)
        inner = held[_GUARD : len(held) - _GUARD]
        run_into(self.spec, quantized, self.scheme, x.to(self.device), bias, inner.view(shape))
        around = torch.cat((held[:_GUARD], held[len(held) - _GUARD :]))
        untouched = around == _POISON if kind == torch.int32 else around.isnan()
        assert untouched.all(), f"{self.spec.name} writes outside its output of shape {shape}"
        return inner.view(shape).cpu()

    def expected(self, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The float64 result and the error bound of each output."""
        return expected_output(self.spec, self.scheme, x.cpu(), quantized, bias)

    def compare(self, case: object, quantized: QuantizedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output. Fails unless every value is within its error bound."""
        got, (right, bound) = self.run(quantized, x, bias), self.expected(x, quantized, bias)
        assert got.shape == right.shape
        wrong = ~((got.double() - right).abs() <= bound)
        assert not wrong.any(), f"{case}: {_worst(got, right, bound, wrong)}"
        if len(x) and right.shape[1] > 1 and right.any():  # with few blocks, all may be zero
            assert bound.max() < 0.1 * right.abs().max(), f"{case}: the error bound is too loose to test anything"
        return got


def _worst(got: Tensor, right: Tensor, bound: Tensor, wrong: Tensor) -> str:
    """A message with the number of wrong outputs and the one with the largest error."""
    over = torch.where(wrong, (got.double() - right).abs().nan_to_num(nan=torch.inf), -1.0)
    row, column = divmod(int(over.argmax()), got.shape[1])
    share = f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong"
    at = (row, column)
    return f"{share}; y[{row}, {column}] = {float(got[at]):g}, not {float(right[at]):g} +- {float(bound[at]):.2g}"


def seed_of(*parts: object) -> int:
    """A seed from ``parts``, the same in every process."""
    return zlib.crc32(repr(parts).encode())


def activations(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows (m, k) of noise with magnitudes over twelve octaves, fewer for large k, where float16 would overflow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    most = 6 if k <= 1024 else 3
    return (x * torch.exp2(torch.randint(-6, most + 1, (m, 1), generator=generator))).to(dtype)


@dataclass(frozen=True)
class Case:
    """One comparison of a kernel with the oracle: shape, activation dtype, and whether there is a bias."""

    subject: Subject
    shape: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        sizes = f"m={self.m} n={self.n} k={self.k}"
        return f"{self.subject.spec.name} {self.subject.scheme} {self.shape} {sizes} {self.dtype} bias={self.bias}"

    def check(self) -> None:
        """Raise AssertionError if the kernel's output is wrong."""
        seed = seed_of(self.subject.scheme, self.shape)
        bias = torch.randn(self.n, generator=torch.Generator().manual_seed(seed)).to(self.dtype) if self.bias else None
        quantized = random_weight(self.subject.scheme, self.n, self.k, seed)
        self.subject.compare(self, quantized, activations(self.m, self.k, self.dtype, seed), bias)


def cases(subjects: Iterable[Subject], shapes: Mapping[str, Shape] = SHAPES, every: bool = True) -> Iterator[Case]:
    """Every combination of shape, subject, dtype and bias; with every=False, one combination per shape, in rotation."""
    choices = [(s, dtype, bias) for s in subjects for dtype in s.spec.act_dtypes for bias in (False, True)]
    for i, (name, (m, n, k)) in enumerate(shapes.items()):
        # The step 7 does not divide the number of choices, so that the rotation reaches all of them.
        for subject, dtype, bias in choices if every else (choices[7 * i % len(choices)],):
            yield Case(subject, name, subject.tokens(m), n, k, dtype, bias)


def integer_data_gives_exact_results(subject: Subject, shapes: Mapping[str, Shape] = SHAPES) -> None:
    """On small integers the output is exact: every partial sum fits 24 bits, in any order of summation."""
    act = subject.scheme.act_type
    for name, (m, n, k) in shapes.items():
        if act.quantized and k == 1:
            continue  # a single value cannot have a chosen range
        quantized = random_weight(subject.scheme, n, k, seed_of(name), unit_scale=True)
        x = torch.randint(-7, 8, (subject.tokens(m), k)).to(subject.dtype)
        if act.quantized and len(x):
            x[:, :1], x[:, -1:] = (
                act.lowest,
                act.highest,
            )  # gives scale 1 and zero point 0, so that the codes are the integers
        bias = torch.randint(-9, 10, (n,)).float()
        expected = reference.linear(x, quantized, bias, subject.scheme, torch.float64)
        assert torch.equal(subject.run(quantized, x, bias), expected.to(x.dtype)), name


def small_integers_are_exact(subject: Subject, m: int, n: int, k: int, seed: int) -> None:
    """As ``integer_data_gives_exact_results``, on one shape and with activations over all codes; k: 2 to 270."""
    quantized = random_weight(subject.scheme, n, k, seed, unit_scale=True)
    act = subject.scheme.act_type
    lowest, highest = (act.lowest, act.highest) if act.quantized else (-128, 127)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(lowest + 1, highest + 1, (subject.tokens(m), k), generator=generator).float()
    x[:, seed % k], x[:, seed % k - 1] = lowest, highest
    expected = reference.linear(x, quantized, None, subject.scheme, torch.float64)
    assert torch.equal(subject.run(quantized, x).double(), expected), (m, n, k, seed)


def corner_codes(n: int, k: int) -> Tensor:
    """int8 codes (n, k) at the extremes, where multiplications may saturate."""
    corners = torch.tensor([127, -128, 0, 1, -1, 126, -127, 64], dtype=torch.int8)
    return corners[torch.randint(0, len(corners), (n, k))]


def typical_codes(n: int, k: int) -> Tensor:
    """int8 codes (n, k) as of trained weights: mostly small, so that few pairs overflow 16 bits."""
    return (torch.randn(n, k) * 33).round().clamp(-127, 127).to(torch.int8)


def middle_codes(n: int, k: int) -> Tensor:
    """Codes of 64 or 65, with one sign for 8 inputs: four of one sign, times 7 bits, just fit in 16 bits, or just not."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (n, -(-k // 8)), generator=generator).repeat_interleave(8, dim=1)[:, :k] * 2 - 1
    return ((64 + torch.randint(0, 2, (n, k), generator=generator)) * signs).to(torch.int8)


def accumulators_are_exact(subject: Subject) -> None:
    """The int32 accumulators of 8-bit weights and quantized activations are exact, for extreme and for other codes."""
    lowest, highest = subject.scheme.act_type.lowest, subject.scheme.act_type.highest
    for draw in (corner_codes, typical_codes, middle_codes):
        for m, n, k in [*SHAPES.values(), (3, 17, 5000), (40, 70, 5000)]:
            if k == 1:
                continue  # a single value cannot have a chosen range
            quantized = random_weight(subject.scheme, n, k)
            quantized.qweight.copy_(draw(n, k) * (quantized.qweight != 0))
            x = corner_codes(subject.tokens(m), k).float().clamp(lowest, highest)
            x[:, k // 2], x[:, k // 2 - 1] = highest, lowest
            got = subject.run(quantized, x, out_dtype=torch.int32)
            assert torch.equal(got.double(), x.double() @ quantized.qweight.double().t()), (m, n, k)


def largest_k_does_not_overflow(subject: Subject) -> None:
    """The largest sums fit int32 at the largest K, and a larger K is refused."""
    k, act = subject.scheme.max_in_features, subject.scheme.act_type
    for code in (127, -128):
        quantized = random_weight(subject.scheme, 2, k)
        quantized.qweight.fill_(code)
        x = torch.full((subject.tokens(1), k), float(act.lowest))
        x[:, 7] = act.highest
        got = subject.run(quantized, x, out_dtype=torch.int32)
        assert (got == code * (act.lowest * (k - 1) + act.highest)).all()
        x = torch.full((subject.tokens(1), k), 3.0)
        right, bound = subject.expected(x, quantized)
        assert ((subject.run(quantized, x).double() - right).abs() <= bound).all()
    longer = random_weight(subject.scheme, 2, k + 1)
    try:
        subject.run(longer, torch.zeros(subject.tokens(1), k + 1), out_dtype=torch.int32)
    except ValueError as error:
        assert f"in_features={k + 1}" in str(error), error
        assert "overflow" in str(error), error
    else:
        raise AssertionError(f"{subject.spec.name}: {k + 1} input features are not refused")


def non_finite_rows_do_not_mix(subject: Subject, bad: float) -> None:
    """A NaN or infinity (``bad``) in one row of the activations changes only that row of the output."""
    m, n, k = subject.tokens(13), 19, 70
    quantized = random_weight(subject.scheme, n, k)
    weight = dequantize_weight(quantized, subject.scheme, k)
    clean = activations(m, k, subject.dtype, 7)
    good = subject.run(quantized, clean)
    for row, column in itertools.chain(((r, 3) for r in range(m)), ((5, c) for c in range(k))):
        x = clean.clone()
        x[row, column] = bad
        got = subject.run(quantized, x)
        others = torch.arange(m) != row
        assert torch.equal(got[others], good[others]), (row, column)
        if subject.scheme.act_type.quantized:
            assert got[row].isnan().all(), (row, column)
            continue
        # A kernel may skip the zeros of a sparse weight, so only outputs with a weight that is not zero are checked.
        used = torch.ones(n, dtype=torch.bool) if subject.scheme.sparsity is None else weight[:, column] != 0
        wrong = got[row].isnan() if math.isnan(bad) else ~got[row].isfinite()
        assert wrong[used].all(), (row, column)


def extreme_rows(subject: Subject) -> None:
    """Rows of zeros, and of magnitudes from 1e30 down to subnormal, are within the error bounds."""
    n, k = 21, 70
    quantized, bias = random_weight(subject.scheme, n, k), torch.randn(n).to(subject.dtype)
    ones = torch.randn(k)
    x = torch.stack([torch.zeros(k), -torch.zeros(k), ones * 1e30, ones * 1e-30, ones * 1e-38, ones * 1e-41, ones])
    x = torch.cat([x, x[-1:].expand(subject.tokens(len(x)) - len(x), k)]).to(subject.dtype)
    got, (right, bound) = subject.run(quantized, x), subject.expected(x, quantized)
    assert (got[:2] == 0).all(), "a row of zeros"
    of_zeros = subject.run(quantized, x, bias)[:2]
    assert torch.equal(of_zeros, bias.expand(2, n)), "a row of zeros gives the bias"
    flushed = 2.0**-126 * 16 * k if subject.spec.flushes_subnormals else 0.0  # each product may be flushed to 0
    assert ((got.double() - right).abs() <= bound + flushed).all()
    if not flushed:
        tiny = (got[4].double() - right[4]).abs().max()
        assert tiny <= 0.01 * right[4].abs().max(), "rows of 1e-38 must not be flushed to 0"


def zero_and_constant_groups(subject: Subject) -> None:
    """Weights with groups that are all zero, or all one value, give correct outputs."""
    weight = torch.zeros(18, 130)
    weight[1] = 0.5
    weight[2] = -0.5
    weight[3, :32] = 1e-5
    quantized = quantize_weight(weight, subject.scheme)
    x = activations(subject.tokens(4), 130, subject.dtype, 9)
    got, (right, bound) = subject.run(quantized, x), subject.expected(x, quantized)
    assert (got[:, 0] == 0).all()
    assert (got[:, 4:] == 0).all()
    assert ((got.double() - right).abs() <= bound).all()
    close = 0.05 * float(x.abs().max())
    assert torch.allclose(got[:, 1].double(), x.double().sum(1) * 0.5, rtol=0.05, atol=close)


def strides_are_followed(subject: Subject) -> None:
    """Activations that are slices of rows and columns, or start at odd addresses, give correct outputs."""
    n, k = 33, 70
    quantized = random_weight(subject.scheme, n, k)
    for dtype in subject.spec.act_dtypes:
        wide = activations(2 * subject.tokens(8) + 2, k + 9, dtype, 11).to(subject.device)
        rows = subject.tokens(8)
        odd = wide.flatten()[1 : 1 + rows * k].view(rows, k)
        for x in (wide[: 2 * rows : 2, 3 : k + 3], wide[:rows, :k], wide[:rows, 8 : k + 8], odd):
            subject.compare((dtype, x.stride(), x.storage_offset()), quantized, x)


def repeats_give_the_same_bits(subject: Subject, shapes: Iterable[Shape], times: int = 3) -> None:
    """Repeated calls give bitwise the same output."""
    for (m, n, k), dtype in product(shapes, subject.spec.act_dtypes):
        quantized = random_weight(subject.scheme, n, k)
        x = activations(subject.tokens(m), k, dtype, 13)
        first, *others = [subject.run(quantized, x) for _ in range(times)]
        assert not first.isnan().any(), "an output was not written"
        assert all(torch.equal(first, other) for other in others), (m, n, k, dtype)


def batches_give_the_same_bits(subject: Subject, most: int = 8) -> None:
    """A row's output is bitwise the same alone and in a batch of up to ``most`` rows."""
    for (n, k), dtype in product(((70, 200), (33, 2100), (257, 96)), subject.spec.act_dtypes):
        quantized, bias = random_weight(subject.scheme, n, k), torch.randn(n).to(dtype)
        x = activations(most, k, dtype, 17)
        together = subject.run(quantized, x, bias)
        for first, last in ((0, 1), (most - 1, most), (0, 2), (1, 4), (2, most)):
            alone = subject.run(quantized, x[first:last], bias)
            assert torch.equal(alone, together[first:last]), (n, k, dtype, first, last)


__getattr__ = _moved.old_names(__name__)
