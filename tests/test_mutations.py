"""The planted bugs of tests/mutations still fit the sources. Whether tests find them is for tests/mutations/run.py."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def load():
    spec = spec_from_file_location("mutations_run", HERE / "mutations" / "run.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load()
MUTATIONS = run.mutations()


def test_there_are_thirty() -> None:
    assert len(MUTATIONS) >= 30
    assert {mutation.is_compiled for mutation in MUTATIONS} == {True, False}


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / "csrc").is_dir(), reason="needs git and the sources")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_patch_fits_the_sources(mutation) -> None:
    done = subprocess.run(
        ["git", "apply", "--check", mutation.path],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"make the patch anew: {done.stderr}"
    assert mutation.what.endswith(".")
    assert mutation.hint
    assert all((ROOT / name).is_file() for name in (*mutation.files, *mutation.hint))
