"""The checks of a linear kernel as a table: what each runs, and which kernels and schemes it applies to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..dispatch import targets
from ..dispatch.spec import KernelSpec
from ..weights.weight_type import FloatType
from . import checks
from .checks import Subject
from .oracle import served_by

# Shapes for repeated calls: one row, and several rows with a tail in each size.
_REPEATED = ((1, 64, 512), (8, 257, 210))


def _always(subject: Subject) -> bool:
    return True


def _has_integer_weights(subject: Subject) -> bool:
    return not isinstance(subject.scheme.weight_type, FloatType)


def _gives_accumulators(subject: Subject) -> bool:
    return torch.int32 in subject.spec.out_dtypes


def _gives_dense_accumulators(subject: Subject) -> bool:
    return _gives_accumulators(subject) and subject.scheme.sparsity is None


def _batches_change_no_bit(subject: Subject) -> bool:
    spec = subject.spec
    return (spec.exact or spec.fixed_order) and spec.takes(1) and spec.takes(8)


@dataclass(frozen=True)
class Check:
    """A check of the table.

    Args:
        run: raises AssertionError if the kernel is wrong.
        applies: whether the check has a meaning for the kernel and the scheme.
    """

    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool] = _always


def _agrees_with_the_oracle(subject: Subject) -> None:
    for case in checks.cases([subject], every=False):
        case.check()


def _small_integers_are_exact(subject: Subject) -> None:
    for seed, (m, n, k) in enumerate(((1, 1, 2), (5, 33, 70), (40, 70, 270))):
        checks.small_integers_are_exact(subject, m, n, k, seed)


def _non_finite_rows_do_not_mix(subject: Subject) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        checks.non_finite_rows_do_not_mix(subject, bad)


def _repeats_give_the_same_bits(subject: Subject) -> None:
    checks.repeats_give_the_same_bits(subject, _REPEATED)


CHECKS: dict[str, Check] = {
    "agrees_with_the_oracle": Check(_agrees_with_the_oracle),
    "integer_data_gives_exact_results": Check(checks.integer_data_gives_exact_results),
    "small_integers_are_exact": Check(_small_integers_are_exact, _has_integer_weights),
    "accumulators_are_exact": Check(checks.accumulators_are_exact, _gives_accumulators),
    "largest_k_does_not_overflow": Check(checks.largest_k_does_not_overflow, _gives_dense_accumulators),
    "non_finite_rows_do_not_mix": Check(_non_finite_rows_do_not_mix),
    "extreme_rows": Check(checks.extreme_rows),
    "zero_and_constant_groups": Check(checks.zero_and_constant_groups),
    "strides_are_followed": Check(checks.strides_are_followed),
    "repeats_give_the_same_bits": Check(_repeats_give_the_same_bits),
    "batches_give_the_same_bits": Check(checks.batches_give_the_same_bits, _batches_change_no_bit),
}


def run_all(subject: Subject) -> tuple[str, ...]:
    """Runs each check of CHECKS that applies, and returns their names.

    Raises:
        AssertionError: the kernel is wrong; the message names the kernel, the scheme and the check.
    """
    names = tuple(name for name, check in CHECKS.items() if check.applies(subject))
    for name in names:
        try:
            CHECKS[name].run(subject)
        except AssertionError as error:
            raise AssertionError(f"{subject.spec.name} {subject.scheme}: {name}: {error}") from error
    return names


def check_kernel(spec: KernelSpec, device: str = "cpu") -> None:
    """Runs the checks that apply to a linear kernel, for each scheme of its family; for sparse families, a selection.

    Raises:
        AssertionError: the kernel is wrong; the message names the kernel, the scheme and the check.
        ValueError: the kernel cannot run on this machine, or takes none of the schemes.
    """
    reason = targets.detect().missing.get(spec.target)
    if reason is not None:
        raise ValueError(f"spec={spec.name}: cannot run here: {reason}")
    schemes = served_by(spec)
    if not schemes:
        raise ValueError(f"spec={spec.name}: takes no scheme of {spec.scheme} with its group_sizes and sparsity")
    for scheme in schemes:
        run_all(Subject(spec, scheme, device))
