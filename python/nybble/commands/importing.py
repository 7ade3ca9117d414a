"""`nybble import`: make nybble's checkpoint of another library's, to load with `nybble.load`."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from torch import nn

from ..foreign.load import Loaded, load_pretrained
from ..foreign.report import ImportedLayer, ImportReport
from . import CommandFailed
from .inspect import saved_rows
from .model_dir import CONFIG
from .output import check_out, written_model
from .saved import is_saved, load_saved, plain_config

_FLOAT_BITS = 16

EXAMPLES = """\
examples:
  nybble import DIR --out OUT
  nybble import model.gguf --out OUT --act-bits 8"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a directory or a GGUF file, see `nybble inspect`")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="output directory, new or empty")
    parser.add_argument(
        "--act-bits", type=int, default=_FLOAT_BITS, metavar="N", help="16: float activations (default); 8"
    )
    parser.epilog, parser.formatter_class = EXAMPLES, RawDescriptionHelpFormatter


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    check_out(args.out)
    try:
        loaded = _saved(args) if is_saved(args.path) else load_pretrained(args.path, act_bits=args.act_bits)
        with written_model(args.out, loaded.model, _config(args.path, loaded.model), args.path, loaded.report):
            pass
    except (ValueError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(loaded.report.to_json() if args.json else loaded.report)


def _saved(args: Namespace) -> Loaded:
    """The model of a directory that transformers wrote, whose layers are nybble's already."""
    if args.act_bits != _FLOAT_BITS:
        raise CommandFailed(
            f"--act-bits {args.act_bits}: the layers of {args.path} are nybble's and keep their schemes"
        )
    rows, _ = saved_rows(args.path)
    layers = (ImportedLayer(row.name, row.shape, row.kind, row.kind, row.nbytes, row.nbytes, math.inf) for row in rows)
    return Loaded(load_saved(args.path), ImportReport("nybble", tuple(layers)))


def _config(path: Path, model: nn.Module) -> dict[str, Any]:
    """config.json without what it says of quantization; where there is none, the configuration of the model."""
    told: Any = model.config
    return plain_config(path) if (path / CONFIG).is_file() else told.to_dict()
