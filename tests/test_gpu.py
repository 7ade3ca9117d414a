"""Every kernel of the registry that runs on a GPU against the float64 oracle, on one. Without one each test is skipped,
and what they check is checked of a CPU's kernels (test_kernels.py) and, at the end of this file, of Triton's interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble import ops
from nybble.dispatch.registry import all_specs, specs
from nybble.dispatch.spec import KernelSpec, Problem
from nybble.testing import checks, suite
from nybble.testing.checks import GPU_SHAPES, LARGE_SHAPES, Subject, activations, seed_of
from nybble.testing.oracle import SHAPES, pack_for, random_weight, run, schemes_of, served_by

KERNELS = [spec for spec in specs() if spec.device == "cuda"]
# Kernels of other ops have test files of their own.
ELSEWHERE = {"quantize_triton": "test_triton_quantize.py", "dequantize_triton": "test_triton_float.py"}
SCALAR = {spec.scheme: spec for spec in specs() if spec.target == "scalar"}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Triton is not interpreted")


def each(found: list[KernelSpec]):
    return pytest.mark.parametrize("spec", found, ids=lambda spec: spec.name)


def problem(subject: Subject) -> Problem:
    spec = subject.spec
    least, _ = spec.m_range
    return Problem(subject.scheme, least, 64, 256, spec.act_dtypes[0], subject.device, spec.layout)


def subjects(spec: KernelSpec) -> list[Subject]:
    """Of each scheme of its family that a kernel accepts."""
    asked = {Subject(spec, scheme, "cuda"): None for scheme in served_by(spec)}
    reasons = {subject: spec.why_not(problem(subject)) for subject in asked}
    found = [subject for subject, reason in reasons.items() if reason is None]
    if not found:
        pytest.skip(f"{spec.name}: {', '.join(sorted({str(reason) for reason in reasons.values()}))}")
    return found


def applying(name: str) -> list[KernelSpec]:
    """The kernels that a check applies to, for one of their schemes or more."""
    applies = suite.CHECKS[name].applies
    return [spec for spec in KERNELS if any(applies(Subject(spec, scheme)) for scheme in served_by(spec))]


def few(spec: KernelSpec) -> list[Subject]:
    """The first and the last, which is asymmetric where there are such: what differs between them is packed."""
    found = subjects(spec)
    return found if len(found) < 3 else [found[0], found[-1]]


def test_every_kernel_for_a_gpu_is_tested() -> None:
    on_gpu = {spec.name for spec in all_specs() if spec.device == "cuda"}
    assert on_gpu == {*(spec.name for spec in KERNELS), *ELSEWHERE}


@needs_gpu
def test_a_gpu_has_its_kernels() -> None:
    """Nothing is left out for a reason that a working installation does not have."""
    reasons = {spec.name: spec.why_not(problem(Subject(spec, served_by(spec)[-1], "cuda"))) for spec in KERNELS}
    built = {spec.name for spec in KERNELS if spec.built}
    assert {name: reason for name, reason in reasons.items() if reason is not None and name in built} == {}


@needs_gpu
@each(KERNELS)
def test_agrees_with_the_oracle(spec: KernelSpec) -> None:
    # What Triton compiles for each shape takes seconds: there a shape has one scheme, dtype and bias of all in turn.
    found = subjects(spec)
    for case in checks.cases(found, SHAPES | GPU_SHAPES, every=spec.target != "triton"):
        case.check()
    for case in checks.cases(found, LARGE_SHAPES, every=False):
        case.check()


@needs_gpu
@each(KERNELS)
def test_integer_data_gives_exact_results(spec: KernelSpec) -> None:
    for subject in few(spec):
        checks.integer_data_gives_exact_results(subject)


@needs_gpu
@each([spec for spec in KERNELS if spec.target != "triton"])
def test_small_shapes(spec: KernelSpec) -> None:
    """M and N over the block sizes, K over two groups, at random."""
    draw = torch.Generator().manual_seed(0)
    for subject in subjects(spec):
        for seed in range(60):
            m, n, k = (
                int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 140), (1, 300), (2, 270))
            )
            checks.small_integers_are_exact(subject, m, n, k, seed)


@needs_gpu
@each(applying("accumulators_are_exact"))
def test_accumulators_are_exact(spec: KernelSpec) -> None:
    for subject in subjects(spec):
        checks.accumulators_are_exact(subject)
        if suite.CHECKS["largest_k_does_not_overflow"].applies(subject):
            checks.largest_k_does_not_overflow(subject)


@needs_gpu
@each([spec for spec in KERNELS if spec.exact])
def test_the_bits_of_the_cpu(spec: KernelSpec) -> None:
    for case in checks.cases(subjects(spec), SHAPES, every=False):
        scheme = case.subject.scheme
        quantized, x = (
            random_weight(scheme, case.n, case.k),
            activations(case.m, case.k, case.dtype, seed_of(case.shape)),
        )
        bias = torch.randn(case.n)
        assert torch.equal(
            case.subject.run(quantized, x, bias), run(SCALAR[spec.scheme], quantized, scheme, x, bias)
        ), case


@needs_gpu
@each(KERNELS)
def test_bad_and_extreme_rows(spec: KernelSpec) -> None:
    for subject in few(spec):
        for bad in (torch.nan, torch.inf, -torch.inf):
            checks.non_finite_rows_do_not_mix(subject, bad)
        checks.extreme_rows(subject)
        checks.zero_and_constant_groups(subject)


@needs_gpu
@each(KERNELS)
def test_strides_are_followed(spec: KernelSpec) -> None:
    checks.strides_are_followed(few(spec)[-1])


@needs_gpu
@each(KERNELS)
def test_repeats_give_the_same_bits(spec: KernelSpec) -> None:
    """More often, and on shapes whose K is split: where a race would show."""
    checks.repeats_give_the_same_bits(few(spec)[-1], ((1, 64, 8192), (8, 257, 2100), (64, 1030, 1100)), times=8)


@needs_gpu
@each(applying("batches_give_the_same_bits"))
def test_batches_give_the_same_bits(spec: KernelSpec) -> None:
    for subject in few(spec):
        checks.batches_give_the_same_bits(subject)


@needs_gpu
@each(KERNELS)
def test_packing_on_the_gpu_gives_the_bytes_of_the_cpu(spec: KernelSpec) -> None:
    for subject in subjects(spec):
        for n, k in ((1, 1), (70, 200), (64, 128), (257, 333)):
            packs_alike(subject, n, k)


def packs_alike(subject: Subject, n: int, k: int) -> None:
    """On a device as on the CPU, and unpacking is the inverse there too."""
    spec, scheme = subject.spec, subject.scheme
    quantized = random_weight(scheme, n, k)
    there = type(quantized)(**{name: tensor.to(subject.device) for name, tensor in quantized.tensors().items()})
    packed = ops.pack_as(there, spec.layout, scheme, k)
    assert packed.device.type == subject.device
    assert torch.equal(packed.cpu(), pack_for(spec, quantized, scheme, k)), (str(scheme), n, k)
    restored = ops.unpack(packed, spec.layout, scheme, n, k)
    for name, tensor in quantized.tensors().items():
        held = getattr(restored, name)
        assert held.device.type == subject.device
        assert torch.equal(held.cpu(), tensor), (name, str(scheme), n, k)


# --- the same, as far as a machine without a GPU can tell


def interpreted(spec: KernelSpec) -> list[Subject]:
    pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")
    return [Subject(spec, scheme) for scheme in served_by(spec)]


@no_gpu
@each([spec for spec in KERNELS if spec.target == "triton"])
def test_triton_interpreted_agrees_with_the_oracle(spec: KernelSpec, threads) -> None:
    """Without bfloat16, whose stores the interpreter cuts off."""
    threads(1)
    small = {name: shape for name, shape in (SHAPES | GPU_SHAPES).items() if shape[0] * shape[1] * shape[2] < 70_000}
    assert len(small) >= 10
    for case in checks.cases(interpreted(spec), small, every=False):
        if case.dtype != torch.bfloat16:
            case.check()


@no_gpu
@each([spec for spec in KERNELS if spec.layout != "plain"])
def test_packing_is_undone(spec: KernelSpec) -> None:
    for scheme in served_by(spec):
        packs_alike(Subject(spec, scheme), 70, 200)


@no_gpu
@pytest.mark.parametrize("family", ["w8a8", "w4a8"])
def test_the_checks_of_bits_hold_for_a_cpu_kernel(family: str) -> None:
    subject = Subject(SCALAR[family], served_by(SCALAR[family])[-1])
    checks.repeats_give_the_same_bits(subject, ((1, 64, 512), (8, 257, 210)))
    checks.batches_give_the_same_bits(subject)


@no_gpu
def test_a_kernel_that_is_wrong_is_found() -> None:
    """One that leaves a row out, or writes beside its output, or that sees the other rows."""
    right = SCALAR["w4a16"]
    assert right.make is not None

    def wrong(spoil):
        def make(*shape):
            plan = right.make(*shape)

            def call(x, packed, bias, out):
                plan(x, packed, bias, out)
                spoil(x, out)

            return call

        return Subject(replace(right, make=make), schemes_of("w4a16")[0])

    def beside(x, out):
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    with pytest.raises(AssertionError, match="outputs are wrong"):
        list(map(checks.Case.check, checks.cases([wrong(lambda x, out: out[-1:].zero_())])))
    with pytest.raises(AssertionError, match="writes outside its output"):
        list(map(checks.Case.check, checks.cases([wrong(beside)])))
    with pytest.raises(AssertionError):
        checks.batches_give_the_same_bits(wrong(lambda x, out: out.mul_(1 + len(x) * 2**-20)))
