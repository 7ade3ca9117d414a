"""`nybble import`: make nybble's checkpoint of another library's, to load with `nybble.load`."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..checkpoint.io import save
from ..foreign.load import Loaded, load_pretrained
from . import CommandFailed
from .model_dir import CONFIG
from .output import check_out, written_at_once

EXAMPLE = "example: nybble import DIR --out OUT"
# Files beside the weights that a user of the model needs.
_KEPT = ("tokenizer", "special_tokens_map", "generation_config", "vocab", "merges", "chat_template")


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
        _write(args, loaded)
    except (ValueError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(loaded.report.to_json() if args.json else loaded.report)


def _write(args: Namespace, loaded: Loaded) -> None:
    with written_at_once(args.out) as aside:
        save(loaded.model, aside)
        config = json.loads((args.path / CONFIG).read_text(encoding="utf-8"))
        plain = {
            key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")
        }
        (aside / CONFIG).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        (aside / "report.json").write_text(loaded.report.to_json(), encoding="utf-8")
        for path in args.path.iterdir():
            if path.is_file() and path.name.startswith(_KEPT):
                shutil.copyfile(path, aside / path.name)
