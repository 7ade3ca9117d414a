"""Calibration on several ranks: what each check of tests/ranks_calibration.py gave, and the sums behind it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nybble.model.inputs import Inputs
from nybble.model.observe import OBSERVERS
from nybble.model.products import Products

from .ranks import FOLDER, OK, Group, checks

SCRIPT = "ranks_calibration.py"


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Two ranks that have run all checks."""
    return Group(FOLDER / SCRIPT, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.full
@pytest.mark.parametrize("check", checks(SCRIPT))
def test_calibration(group, check) -> None:
    assert group.outcome(check) == OK


@pytest.mark.full
@pytest.mark.parametrize("check", ["held_out_rows_are_those_of_one_process"])
def test_on_three_ranks(tmp_path, check) -> None:
    assert Group(FOLDER / SCRIPT, 3, tmp_path, [check]).outcome(check) == OK


def merged(parts: list[Inputs]) -> Inputs:
    """The last of several processes, merged with the others."""
    at = 0
    for one in parts:
        one.settle(at)
        at += one.added
    last = parts[-1]
    held = {name: [getattr(one, name) for one in parts] for name in ("_hessian", "_drift")}
    told = {id(held[name][-1]): [one.sum for one in held[name] if one is not None] for name in held}
    last.merge([one.tensors() for one in parts], lambda own: told[id(own)])
    return last


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("cuts", [(1,), (3,), (2, 4), (0, 5), (1, 2, 3, 4, 5)], ids=str)
def test_statistics_do_not_depend_on_who_has_which_batch(cuts, observer) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(rows, 16) * 2.0**i for i, rows in enumerate((5, 300, 1, 900, 2100, 40))]
    batches[2][0, 3] = torch.nan

    def gathered(own: list[Tensor], offset: int | None) -> Inputs:
        inputs = Inputs(16, hessian=True, observer=observer, offset=offset)
        for x in own:
            # Some batches have no rows of the original model.
            inputs.add(x, None if len(x) == 300 else x + 0.1)
        return inputs

    whole = gathered(batches, 0)
    edges = (0, *cuts, len(batches))
    found = merged([gathered(batches[a:b], None if a else 0) for a, b in pairwise(edges)])
    for name in ("norms", "mean_magnitudes", "largest", "sample", "held_out", "hessian", "drift"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-7, atol=0, msg=name)
    assert (found.rows, found.added, found.bad_batches) == (whole.rows, whole.added, 1)
    assert found.observer.range(255) == whole.observer.range(255)
    assert len(whole.held_out) == 256


def test_products() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 1000, 8)
    products = Products(8)
    assert not products.mean.any()
    for a, b in zip(left.split(300), right.split(300), strict=True):
        products.add(a, b)
    wanted = (2 / 1000) * left.double().T @ right.double()
    torch.testing.assert_close(products.mean.double(), wanted, rtol=1e-5, atol=1e-7)
    products.add(-left, right)  # after the mean has been read
    torch.testing.assert_close(products.mean, torch.zeros(8, 8), rtol=0, atol=1e-6)
    many = Products(2)
    many.add(torch.full((1000, 2), 1e18), torch.full((1000, 2), 1e18))
    torch.testing.assert_close(many.mean, torch.full((2, 2), 2e36), rtol=1e-5, atol=0)
