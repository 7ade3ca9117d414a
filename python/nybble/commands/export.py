"""`nybble export`: write nybble's checkpoint in another library's format."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.files import INDEX, read_index, written_at_once
from ..checkpoint.index import parse_index
from ..checkpoint.model import slots
from ..foreign.empty import empty_model
from ..foreign.export_report import ExportReport
from ..foreign.map_model import map_model
from ..foreign.save import Options, write_pretrained
from ..foreign.tensors import Tensors
from ..model.allocator import return_freed
from ..model.walk import named_modules
from . import CommandFailed
from .model_dir import CONFIG, read_config
from .output import add_beside, check_out
from .saved import is_saved, load_saved, plain_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_INDEX = 1 << 26
_OPTIONS = {"dense": "--dense", "round_scales": "--round-scales"}  # what messages call arguments -> what users type
EXAMPLE = "example: nybble export DIR --format compressed-tensors --out OUT"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="DIR",
        help="nybble's checkpoint with config.json, as import or save_pretrained writes it",
    )
    parser.add_argument(
        "--format", required=True, metavar="NAME", help="compressed-tensors, gptq, or another: no such name lists all"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="output directory, new or empty")
    parser.add_argument("--dense", action="store_true", help="write layers that the format cannot hold as floats")
    parser.add_argument("--round-scales", action="store_true", help="round scales that the format cannot hold")
    parser.epilog = EXAMPLE


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    check_out(args.out)
    try:
        report = _write(args)
    except (ValueError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        for argument, option in _OPTIONS.items():
            text = text.replace(f"{argument}=True", option)
        raise CommandFailed(text) from error
    print(report.to_json() if args.json else report)


def _write(args: Namespace) -> ExportReport:
    if is_saved(args.path):
        model, release = load_saved(args.path), return_freed
    else:
        model, release = _mapped(args.path)
    config = plain_config(args.path)
    with written_at_once(args.out) as aside:
        options = Options(args.format, args.dense, args.round_scales, config, release=release)
        report = write_pretrained(model.eval(), aside, options)
        add_beside(aside, args.path, report)
    return report


def _mapped(directory: Path) -> tuple[nn.Module, Callable[[], None]]:
    """The model of nybble's own checkpoint, in mapped memory, and what gives that back."""
    for name in (INDEX, CONFIG):
        if not (directory / name).is_file():
            rule = "must be a directory that nybble import or quantize, or save_pretrained of transformers wrote"
            raise CommandFailed(f"{directory}: has no {name}: {rule}")
    model = _model(directory, read_config(directory))
    return model, map_model(model, directory)


def _model(directory: Path, config: dict[str, Any]) -> nn.Module:
    """The model of config.json without values, in the dtypes of the checkpoint."""
    index = parse_index(read_index(directory, _LARGEST_INDEX))
    stored, layers = Tensors(directory).entries, {layer.name: _DTYPES[layer.dtype] for layer in index.layers}
    model = empty_model(config)
    if layers:
        model.to(next(iter(layers.values())))
    for name, module in named_modules(model):
        for slot in slots(name, module):
            place = stored.get(index.aliases.get(slot.name, slot.name))
            dtype = layers.get(name) if place is None else place.dtype
            slot.tensor.data = slot.tensor.data.to(dtype or slot.tensor.dtype)
    return model
