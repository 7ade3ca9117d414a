"""The table of all that reads files from outside: a sample, what reads it, and what it may raise.

The figures of headers, the fuzzers in fuzz/ and the tests go over these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import CheckpointError
from ..checkpoint.index import parse_index
from ..foreign import gguf, onnx_nodes, tensors, torch_file
from ..foreign.opened import Opened
from ..foreign.source import Source
from ..recipe import Recipe
from . import samples
from .damage import BINARY, SAFETENSORS, TEXT, Damage, told_json


@dataclass(frozen=True)
class Reader:
    """A row.

    Attributes:
        name: unique in the table.
        file: the name that its files have.
        sample: makes a file that it reads.
        read: reads a file, as far as that is done without a model to put it into.
        refuses: what it raises for files that it does not read.
        damages: what is done to files.
        needs: a package that it needs; "": none.
    """

    name: str
    file: str
    sample: Callable[[], bytes]
    read: Callable[[Path], object]
    refuses: type[Exception]
    damages: tuple[Damage, ...]
    needs: str = ""


def _all_of(opened: Opened) -> None:
    for layer in opened.layers.values():
        layer.read().dequantize()
    for part in opened.parts.values():
        part.read()


def _safetensors(path: Path) -> None:
    for name, entry in tensors.read_header(path)[0].items():
        found = entry.file.tensor(*entry[1:])
        if tuple(found.shape) != entry.shape or found.numel() * found.itemsize != entry.end - entry.begin:
            raise RuntimeError(f"{name}: another tensor than the header tells")


def _torch_file(path: Path) -> None:
    for entry in torch_file.read_saved(path).values():
        entry.file.tensor(*entry[1:])


READERS = (
    Reader(
        "index",
        "nybble.json",
        samples.index,
        lambda path: parse_index(path.read_bytes()),
        CheckpointError,
        (*TEXT, told_json, told_json),
    ),
    Reader(
        "safetensors",
        "model.safetensors",
        samples.safetensors,
        _safetensors,
        CheckpointError,
        (*SAFETENSORS, *BINARY),
    ),
    Reader(
        "gguf",
        "model.gguf",
        samples.gguf,
        lambda path: _all_of(gguf.read_file(Source(path))),
        CheckpointError,
        BINARY,
    ),
    Reader(
        "onnx",
        "model.onnx",
        samples.onnx,
        lambda path: _all_of(onnx_nodes.read_file(Source(path))),
        CheckpointError,
        BINARY,
        "onnx",
    ),
    Reader("torch", "pytorch_model.bin", samples.torch_file, _torch_file, CheckpointError, BINARY),
    Reader(
        "config", "config.json", samples.config_json, tensors.read_json, CheckpointError, (*TEXT, told_json, told_json)
    ),
    Reader("recipe-yaml", "recipe.yaml", samples.recipe_yaml, Recipe.load, ValueError, TEXT, "yaml"),
    Reader("recipe-json", "recipe.json", samples.recipe_json, Recipe.load, ValueError, (*TEXT, told_json, told_json)),
)
