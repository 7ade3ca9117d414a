"""Calibration on several ranks: what each check of tests/ranks_calibration.py gave."""

from __future__ import annotations

import pytest

from .ranks import FOLDER, OK, Group, checks

SCRIPT = "ranks_calibration.py"


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Two ranks that have run all checks."""
    return Group(FOLDER / SCRIPT, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", checks(SCRIPT))
def test_calibration(group, check) -> None:
    assert group.outcome(check) == OK
