"""Quantized layers on several ranks of torch.distributed: what each check of the scripts beside this file gave."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .ranks import OK, Group

FOLDER = Path(__file__).parent


def checks(script: str) -> list[str]:
    """The names in CHECKS of a script, which is not imported: ranks run it."""
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    (found,) = (
        one.value for one in tree.body if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "CHECKS"
    )
    return [one.id for one in found.generators[0].iter.elts]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Runs the checks of a script on so many ranks, once."""
    known: dict[tuple[str, int], Group] = {}

    def run(script: str, ranks: int) -> Group:
        if (script, ranks) not in known:
            known[script, ranks] = Group(FOLDER / script, ranks, tmp_path_factory.mktemp("ranks"))
        return known[script, ranks]

    return run


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("check", checks("ranks_tensor_parallel.py"))
def test_tensor_parallel(groups, check, ranks) -> None:
    assert groups("ranks_tensor_parallel.py", ranks).outcome(check) == OK


@pytest.mark.parametrize("check", checks("ranks_transformers.py"))
def test_tp_plan(groups, check) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("safetensors")
    assert groups("ranks_transformers.py", 2).outcome(check) == OK
