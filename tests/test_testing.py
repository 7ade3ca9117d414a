"""nybble.testing, the tool for testing a kernel: its public names, the usage in its docstring, and its old names."""

from __future__ import annotations

import pytest

import nybble.testing
from nybble.dispatch.registry import all_specs
from nybble.testing import Subject, guard, models, oracle, served_by
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
