"""Damaged and lying checkpoints of other libraries: refused by name, never read wrongly, never at the cost of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.stress.children import in_children
from nybble.stress.figure import Tally
from nybble.stress.foreign import damages

HERE = Path(__file__).parent
CHECKPOINTS = sorted(path for path in (HERE / "data" / "foreign").iterdir() if path.is_dir())
# Of each format one; the others are tried by the nightly tests too.
FEW = (
    "awq-gemm-w4-g32-edge", "bnb-int8", "bnb-nf4-double", "ct-old-marlin24-w4-g128", "ct-old-sparse24-w8a8", "ct-w4a16-asym-g32-edge", "gguf-q4-k-m",
    "gptq-w4-g128-desc-act", "hqq-w3-g32-tensors", "hqq-w4-g16-saved", "onnx-w4-g32-asym", "quanto-qint4", "torchao-intx-g32",
)  # fmt: skip


def damaged(name: str, first: int, last: int) -> Tally:
    if name.startswith("onnx"):
        pytest.importorskip("onnx")
    found = in_children(damages, [(HERE / "data" / "foreign" / name, first, last)])
    assert (found.tried, found.failures) == (last - first, [])
    return found


@pytest.mark.parametrize("name", FEW)
def test_damages_are_refused_or_harmless(name: str) -> None:
    counts = damaged(name, 0, 300).facts
    assert counts["refused"] > 60
    assert counts["read"] > 5, "not every damage matters, such as one of a code"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [path.name for path in CHECKPOINTS])
def test_many_damages_are_refused_or_harmless(name: str) -> None:
    damaged(name, 300, 10_300)
