"""`nybble import`: make nybble's checkpoint of another library's, to load with `nybble.load`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from torch import nn

from ..foreign.load import load_pretrained
from . import CommandFailed
from .model_dir import CONFIG, QUANTIZATION, read_config
from .output import check_out, written_model

EXAMPLES = """\
examples:
  nybble import DIR --out OUT
  nybble import model.gguf --out OUT --act-bits 8"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a directory or a GGUF file, see `nybble inspect`")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="output directory, new or empty")
    parser.add_argument("--act-bits", type=int, default=16, metavar="N", help="16: float activations (default); 8")
    parser.epilog, parser.formatter_class = EXAMPLES, RawDescriptionHelpFormatter


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    check_out(args.out)
    try:
        loaded = load_pretrained(args.path, act_bits=args.act_bits)
        with written_model(args.out, loaded.model, _config(args.path, loaded.model), args.path, loaded.report):
            pass
    except (ValueError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(loaded.report.to_json() if args.json else loaded.report)


def _config(path: Path, model: nn.Module) -> dict[str, Any]:
    """config.json without what it says of quantization; where there is none, the configuration of the model."""
    told: Any = model.config
    config = read_config(path) if (path / CONFIG).is_file() else told.to_dict()
    return {key: value for key, value in config.items() if key not in QUANTIZATION}
