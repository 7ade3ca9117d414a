"""`nybble report`: what the command that made a directory said of its model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..checkpoint.files import INDEX
from . import CommandFailed, inspect
from .output import REPORT_JSON, REPORT_TEXT
from .saved import is_saved

EXAMPLE = "example: nybble report DIR --json"


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "path", type=Path, metavar="DIR", help="a directory that `nybble quantize` or `nybble import` wrote"
    )
    parser.epilog = EXAMPLE


def run(args: Namespace) -> None:
    """Print the report beside the checkpoint, or, where there is none, what the checkpoint holds."""
    if is_saved(args.path):
        inspect.run(args)
        return
    if not (args.path / INDEX).is_file():
        raise CommandFailed(f"{args.path}: has no {INDEX}: not a directory that nybble wrote; see `nybble inspect`")
    report = args.path / (REPORT_JSON if args.json else REPORT_TEXT)
    if not report.is_file():
        inspect.run(args)
        return
    try:
        print(report.read_text(encoding="utf-8").rstrip("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"{report}: {error}") from error
