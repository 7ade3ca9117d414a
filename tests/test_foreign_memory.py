"""nybble.load_pretrained: memory, counted in bytes that are in use, at every operation of torch."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import nybble

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from .gptq_llama import write

if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    pytest.skip("needs glibc's count of the bytes in use", allow_module_level=True)

HIDDEN, INNER, BLOCKS, TOKENS = 256, 1024, 12, 4096


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")] + [
        (name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def in_use() -> int:
    """The bytes that C and C++ hold, torch and numpy among them."""
    told = ctypes.CDLL(None).mallinfo2
    told.restype = _Info
    info = told()
    return int(info.uordblks + info.hblkhd)


def mapped(path: Path) -> int:
    """The bytes of a file that this process has in memory through mappings."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    sizes = [
        re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE) for part in parts if str(path) in part.partition("\n")[0]
    ]
    return sum(int(size[1]) << 10 for size in sizes if size)


class Watch(TorchDispatchMode):
    """The most bytes in use, and of a file mapped, after any operation."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.before, self.most, self.most_mapped, self._count = path, in_use(), 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, in_use() - self.before)
        self._count += 1
        if self._count % 8 == 0:
            self.most_mapped = max(self.most_mapped, mapped(self.path))
        return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPTQ of 4 bits in groups of 128, with a dense embedding to which the head is tied."""
    return write(tmp_path_factory.mktemp("memory") / "gptq", HIDDEN, INNER, BLOCKS, TOKENS)


@pytest.mark.full
def test_the_peak_is_the_checkpoint_and_one_layer(checkpoint: Path) -> None:
    nybble.load_pretrained(checkpoint)  # what is made once, such as tables of kernels
    path = checkpoint / "model.safetensors"
    with Watch(path) as watch:
        model, report = nybble.load_pretrained(checkpoint)
    size, layer = path.stat().st_size, INNER * HIDDEN
    assert all(row.exact for row in report.layers)
    # Of one layer: codes, with 16 bits too, and the comparison in float32 of a million weights at most.
    assert watch.most < 1.15 * size + 16 * layer
    assert watch.most_mapped < size / 3, "what was read is given back"
    assert watch.most_mapped > 0, "the watch sees the file"
    held = in_use() - watch.before
    assert held < 1.15 * size
    assert len(report.layers) == 7 * BLOCKS
    assert model.lm_head.weight is model.model.embed_tokens.weight
