"""`nybble inspect`: what a checkpoint holds, nybble's own or another library's, and whether nybble holds it exactly."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import INDEX, CheckpointError, read_index
from ..checkpoint.index import LayerEntry, parse_index
from ..demo.table import show_table
from ..foreign import Opened, open_foreign
from ..foreign.fit import fit
from ..foreign.tensors import Tensors
from ..text import wrap
from . import CommandFailed
from .saved import is_saved, saved_layers

SCHEMA = "nybble.inspect/1"
EXAMPLE = "example: nybble inspect DIR --json"
_LARGEST_INDEX = 1 << 26


@dataclass(frozen=True)
class Row:
    """A quantized layer. ``scheme``: that holds it exactly, or None, and ``why`` none does."""

    name: str
    shape: tuple[int, int]
    kind: str
    nbytes: int
    scheme: str | None
    why: str | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint: a directory or a file")
    parser.epilog = EXAMPLE


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed for a path that holds no checkpoint that is known, or a damaged one."""
    try:
        found = _found(args.path)
    except (CheckpointError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _found(path: Path) -> dict[str, Any]:
    if (path / INDEX).is_file():
        return _own(path)
    if is_saved(path):
        rows, sizes = saved_rows(path)
        return _result("nybble", rows, sizes)
    return _foreign(path)


def _own(directory: Path) -> dict[str, Any]:
    """nybble's own checkpoint, by its index."""
    index = parse_index(read_index(directory, _LARGEST_INDEX))
    sizes = {name: entry.end - entry.begin for name, entry in index.tensors.items()}
    return _result("nybble", _take(index.layers, sizes), sizes)


def saved_rows(directory: Path) -> tuple[list[Row], dict[str, int]]:
    """The layers of a directory that transformers wrote, and the bytes of each other tensor."""
    entries = Tensors(directory).entries
    sizes = {name: entry.end - entry.begin for name, entry in entries.items()}
    return _take(saved_layers(directory), sizes), sizes


def _take(layers: tuple[LayerEntry, ...], sizes: dict[str, int]) -> list[Row]:
    """nybble's own layers, whose tensors are taken out of ``sizes``."""
    rows = []
    for layer in layers:
        mine = [name for name in sizes if name.startswith(f"{layer.name}.")]
        nbytes = sum(sizes.pop(name) for name in mine)
        rows.append(Row(layer.name, (layer.out_features, layer.in_features), layer.scheme, nbytes, layer.scheme))
    return rows


def _foreign(path: Path) -> dict[str, Any]:
    row, opened = open_foreign(path)
    rows = list(_rows(opened))
    return _result(row.name, rows, {name: part.nbytes for name, part in opened.parts.items()})


def _rows(opened: Opened) -> Iterator[Row]:
    for name, layer in opened.layers.items():
        weight = layer.read()
        found = fit(weight)
        scheme = None if found.scheme is None else str(found.scheme)
        yield Row(name, weight.shape, weight.describe(), layer.nbytes, scheme, found.why)


def _result(format: str, rows: list[Row], parts: dict[str, int]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "format": format,
        "nbytes": sum(row.nbytes for row in rows) + sum(parts.values()),
        "exact": sum(row.scheme is not None for row in rows),
        "layers": [asdict(row) for row in rows],
        "other": {"tensors": len(parts), "nbytes": sum(parts.values())},
    }


def _show(found: dict[str, Any]) -> None:
    """Layers of one kind are one row."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        held = layer["scheme"] or "no"
        groups.setdefault((layer["kind"], held), []).append(layer)
    print(f"format {found['format']}, {_size(found['nbytes'])}")
    rows = [
        (kind, str(len(layers)), _size(sum(layer["nbytes"] for layer in layers)), held)
        for (kind, held), layers in groups.items()
    ]
    rows.append(("not quantized", str(found["other"]["tensors"]), _size(found["other"]["nbytes"]), ""))
    show_table(("weights", "count", "size", "exactly in"), rows, right=(1, 2))
    print(f"{found['exact']} of {len(found['layers'])} quantized layers are held exactly by a scheme of nybble")
    whys: dict[str, list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        if layer["why"]:  # reasons that differ only in numbers are one
            whys.setdefault(re.sub(r"\d+", "#", layer["why"]), []).append(layer)
    for layers in whys.values():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        print("\n".join(wrap(f"{layers[0]['name']}{more}: {layers[0]['why']}", "  ")))


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MB" if nbytes >= 1 << 20 else f"{nbytes / 1024:,.1f} KB"
