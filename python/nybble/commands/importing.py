"""`nybble import`: make nybble's checkpoint of another library's, to load with `nybble.load`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..foreign.load import load_pretrained
from . import CommandFailed
from .model_dir import QUANTIZATION, read_config
from .output import check_out, written_model

EXAMPLE = "example: nybble import DIR --out OUT"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, metavar="DIR", help="another library's checkpoint, see `nybble inspect`")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="output directory, new or empty")
    parser.add_argument("--act-bits", type=int, default=16, metavar="N", help="16: float activations (default); 8")
    parser.epilog = EXAMPLE


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    check_out(args.out)
    try:
        loaded = load_pretrained(args.path, act_bits=args.act_bits)
        config = {key: value for key, value in read_config(args.path).items() if key not in QUANTIZATION}
        with written_model(args.out, loaded.model, config, args.path, loaded.report):
            pass
    except (ValueError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(loaded.report.to_json() if args.json else loaded.report)
