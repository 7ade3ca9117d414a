"""The table of foreign formats: how each is recognized and opened.

A package adds formats with an entry point of the group ``nybble.foreign``, see ``nybble.plugins``:

    [project.entry-points."nybble.foreign"]
    toy = "toy_package.reader:FORMAT"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import plugins
from ..checkpoint.files import CheckpointError
from . import awq, bitsandbytes, compressed, fp8, gguf, gptq, hqq, onnx_nodes, quanto, torchao
from .opened import Opened
from .source import Source


@dataclass(frozen=True)
class ForeignFormat:
    """A format of another library's checkpoints.

    ``what`` says for messages what is looked for. ``detect`` tells whether a file or a directory is of the format; it
    reads configuration files at most. ``open`` reads and checks headers, and no weights; it, and each read of a layer,
    raises CheckpointError, naming the tensor and the field, where the checkpoint is damaged or not one that is read.
    """

    name: str
    what: str
    detect: Callable[[Source], bool]
    open: Callable[[Source], Opened]


_BUILT_IN = (
    ForeignFormat("gptq", "quant_method gptq", gptq.detect, gptq.read_file),
    ForeignFormat("awq", "quant_method awq", awq.detect, awq.read_file),
    ForeignFormat("compressed-tensors", "quant_method compressed-tensors", compressed.detect, compressed.read_file),
    ForeignFormat("gguf", "a .gguf file", gguf.detect, gguf.read_file),
    ForeignFormat("bitsandbytes", "quant_method bitsandbytes", bitsandbytes.detect, bitsandbytes.read_file),
    ForeignFormat("torchao", "quant_method torchao, as safetensors", torchao.detect, torchao.read_file),
    ForeignFormat("fp8", "quant_method fp8", fp8.detect, fp8.read_file),
    ForeignFormat("quanto", "quanto_qmap.json", quanto.detect, quanto.read_file),
    ForeignFormat("onnx", "an .onnx file with MatMulNBits nodes", onnx_nodes.detect, onnx_nodes.read_file),
    ForeignFormat("hqq", "qmodel.pt, or tensors *.W_q", hqq.detect, hqq.read_file),
)


@lru_cache
def foreign_formats() -> tuple[ForeignFormat, ...]:
    """The table: nybble's own readers and those of plug-ins. Raises PluginError if a plug-in cannot be loaded."""
    return plugins.rows("nybble.foreign", ForeignFormat, _BUILT_IN)


def open_foreign(path: str | os.PathLike[str]) -> tuple[ForeignFormat, Opened]:
    """Open another library's checkpoint, a file or a directory; of a safetensors file, the directory that it is in.

    Raises:
        CheckpointError: it is damaged, or of no format, or of several formats, of the table.
    """
    given = Path(path)
    source = Source(given.parent if given.suffix == ".safetensors" and given.is_file() else given)
    if not source.path.exists():
        raise CheckpointError(f"{source.path}: no such file or directory")
    found = [row for row in foreign_formats() if row.detect(source)]
    known = "; ".join(f"{row.name}: {row.what}" for row in found or foreign_formats())
    if len(found) > 1:
        raise CheckpointError(f"{source.path}: holds checkpoints of {len(found)} formats, must be one ({known})")
    if not found and source.method == "nybble":
        raise CheckpointError(f"{source.path}: has layers of nybble: from_pretrained of transformers loads them")
    if not found:
        told = f"quant_method {source.method!r} is not known" if source.method else "no quantized checkpoint is found"
        raise CheckpointError(f"{source.path}: {told}{_inner(source.path)} ({known})")
    return found[0], found[0].open(source)


def _inner(path: Path) -> str:
    """Where in a directory a checkpoint may be meant, for a message."""
    if not path.is_dir():
        return ""
    found = sorted({one.parent.name for name in ("config.json", "*.gguf", "*.onnx") for one in path.glob(f"*/{name}")})
    return f"; is one of its directories meant, such as {found[0]}?" if found else ""
