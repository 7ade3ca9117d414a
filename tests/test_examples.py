"""Every script of examples/ runs. A line "needs: a b" in its first lines names the packages without which it is skipped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py")) if FOLDER.is_dir() else []


def _case(path: Path) -> object:
    """Those that start processes of their own take longest."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.full] if path.stem.endswith("ranks") else [])


@pytest.mark.parametrize("path", map(_case, SCRIPTS))
def test_example_runs(path, tmp_path):
    needs = re.search(r"^(?:# )?needs: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    for module in needs[1].split() if needs else ():
        pytest.importorskip(module)
    found = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.strip(), "an example says what it did"
