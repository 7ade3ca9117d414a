"""nybble.testing, the tool for testing a kernel: its public names, the usage in its docstring, and its old names."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import nybble.testing
from nybble.dispatch import targets
from nybble.dispatch.registry import all_specs
from nybble.dispatch.spec import KernelSpec
from nybble.testing import Subject, check_kernel, checks, guard, models, oracle, run_all, served_by
from nybble.weights.scheme import Scheme


def test_the_public_names_exist_and_come_from_its_modules() -> None:
    for name in nybble.testing.__all__:
        assert getattr(nybble.testing, name) is not None
    assert nybble.testing.random_weight is oracle.random_weight
    assert nybble.testing.guarded is guard.guarded


def test_a_check_runs_on_a_kernel_as_its_docstring_says() -> None:
    spec = next(spec for spec in all_specs() if spec.name == "w8a8_scalar")
    assert Scheme.parse("w8a8") in served_by(spec)
    subject = Subject(spec, Scheme.parse("w8a8"))
    nybble.testing.checks.strides_are_followed(subject)


def spec_named(name: str) -> KernelSpec:
    return next(spec for spec in all_specs() if spec.name == name)


@pytest.mark.parametrize(
    ("name", "scheme", "left_out"),
    [
        ("w8a8_scalar", "w8a8", set()),
        ("spw8a8_scalar", "sp50w8a8", {"largest_k_does_not_overflow"}),
        ("w4a8_scalar", "w4a8g32", {"accumulators_are_exact", "largest_k_does_not_overflow"}),
        (
            "w8a16_reference",
            "w8a16",
            {"accumulators_are_exact", "largest_k_does_not_overflow", "batches_give_the_same_bits"},
        ),
    ],
)
def test_all_checks_that_apply_run_in_one_call(name: str, scheme: str, left_out: set[str]) -> None:
    assert set(nybble.testing.CHECKS) - set(run_all(Subject(spec_named(name), Scheme.parse(scheme)))) == left_out


def test_each_check_of_a_kernel_is_in_the_table() -> None:
    helpers = {"activations", "cases", "corner_codes", "middle_codes", "seed_of", "typical_codes"}
    defined = {name for name, value in vars(checks).items() if inspect.isfunction(value) and not name.startswith("_")}
    own = {name for name in defined if getattr(checks, name).__module__ == checks.__name__}
    assert own - helpers == set(nybble.testing.CHECKS) - {"agrees_with_the_oracle"}


def test_a_wrong_kernel_is_named_with_scheme_and_check() -> None:
    right = spec_named("w4a16_reference")
    assert right.make is not None

    def make(*shape: Any) -> Any:
        return lambda x, packed, bias, out: out.zero_()

    wrong = dataclasses.replace(right, name="toy", make=make, group_sizes=(32,))
    with pytest.raises(AssertionError, match=r"toy w4a16g32: agrees_with_the_oracle: .*outputs are wrong"):
        check_kernel(wrong)


def test_a_kernel_whose_target_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_named("w8a8_scalar")
    monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), (), {"scalar": "no such CPU"}, None))
    with pytest.raises(ValueError, match="spec=w8a8_scalar: cannot run here: no such CPU"):
        check_kernel(spec)


def test_a_kernel_that_takes_no_scheme_is_refused() -> None:
    spec = dataclasses.replace(spec_named("w8a16_reference"), group_sizes=(48,))
    with pytest.raises(ValueError, match="spec=w8a16_reference: takes no scheme of w8a16 with its group_sizes"):
        check_kernel(spec)


@pytest.mark.parametrize(("family", "names"), [("spw2a16", ("sp24{}",)), ("bsw2a8", ("bs16x4{}",))])
def test_a_sparse_weight_type_of_a_plugin_has_a_scheme(family: str, names: tuple[str, ...]) -> None:
    assert oracle._sparse_schemes(family) == names


@pytest.mark.parametrize(("name", "new"), [("SHAPES", oracle), ("Stack", models), ("CANARY", guard)])
def test_old_names_work_with_a_warning(name: str, new: object) -> None:
    with pytest.warns(DeprecationWarning, match=rf"nybble\.testing\.{name} has moved to {new.__name__}\.{name}"):  # type: ignore[attr-defined]
        found = getattr(nybble.testing, name)
    assert found is getattr(new, name)


def test_the_old_name_of_a_check_works_with_a_warning() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"a_bad_row_spoils_itself_alone has moved to .*non_finite_rows_do_not_mix"
    ):
        found = nybble.testing.checks.a_bad_row_spoils_itself_alone
    assert found is nybble.testing.checks.non_finite_rows_do_not_mix


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'nybble\.testing\.checks' has no attribute 'nothing'"):
        _ = nybble.testing.checks.nothing
    with pytest.raises(AttributeError, match=r"module 'nybble\.testing' has no attribute 'nothing'"):
        _ = nybble.testing.nothing  # type: ignore[attr-defined]
