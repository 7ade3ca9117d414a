"""Damaged and lying checkpoints of other libraries: refused by name, never read wrongly, never at the cost of memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKPOINTS = sorted(path for path in (HERE / "data" / "foreign").iterdir() if path.is_dir())
# Of each format one; the others are tried by the nightly tests too.
FEW = (
    "awq-gemm-w4-g32-edge", "bnb-int8", "bnb-nf4-double", "ct-old-marlin24-w4-g128", "ct-old-sparse24-w8a8", "ct-w4a16-asym-g32-edge", "gguf-q4-k-m",
    "gptq-w4-g128-desc-act", "hqq-w3-g32-tensors", "hqq-w4-g16-saved", "onnx-w4-g32-asym", "quanto-qint4", "torchao-intx-g32",
)  # fmt: skip


def damaged(name: str, first: int, last: int) -> dict[str, int]:
    if name.startswith("onnx") and importlib.util.find_spec("onnx") is None:
        pytest.skip("needs onnx")
    program = [sys.executable, str(HERE / "foreign_mutations.py"), str(HERE / "data" / "foreign" / name)]
    done = subprocess.run([*program, str(first), str(last)], capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize("name", FEW)
def test_damages_are_refused_or_harmless(name: str) -> None:
    counts = damaged(name, 0, 300)
    assert counts["refused"] > 60
    assert counts["read"] > 5, "not every damage matters, such as one of a code"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [path.name for path in CHECKPOINTS])
def test_many_damages_are_refused_or_harmless(name: str) -> None:
    damaged(name, 300, 10_300)
