"""`python -m nybble.stress`: runs figures of reliability, and says of each what ran, how many, and how many failed.

Exit codes: 0 nothing failed, 1 something did, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .figure import Figure, Misuse, Trial, line, outcome
from .table import FIGURES, find


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(prog="python -m nybble.stress", description="Figures of reliability.")
    options.add_argument("figures", nargs="*", metavar="FIGURE", help="those to run; none: all that need no --data")
    options.add_argument("--list", action="store_true", help="what there is")
    many = options.add_mutually_exclusive_group()
    many.add_argument("--share", type=float, default=1.0, metavar="S", help="of the whole count of each, such as 0.01")
    many.add_argument("--count", type=int, metavar="N", help="in place of the whole count of each")
    options.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one tries others, or the next ones (0)"
    )
    options.add_argument("--data", type=Path, metavar="DIR", help="for figures that take one")
    options.add_argument("--json", action="store_true", help="print a JSON object a line")
    return options


def _why_not(figure: Figure, trial: Trial) -> str | None:
    lacking = [package for package in figure.needs if find_spec(package) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    if figure.takes and trial.data is None:
        return f"needs --data: {figure.takes}"
    if figure.finite and trial.seed * trial.count >= figure.count:
        return f"--seed {trial.seed}: there are {figure.count:,} {figure.unit}, which {trial.seed} runs of {trial.count:,} have tried"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code."""
    options = parser()
    args = options.parse_args(argv)
    if args.list:
        for figure in FIGURES:
            print(f"{figure.name}: {figure.count:,} {figure.unit}: {figure.what}")
        return 0
    if not 0 < args.share <= 1:
        options.error(f"--share {args.share:g}: must be above 0 and at most 1")
    if args.count is not None and args.count < 1:
        options.error(f"--count {args.count}: must be at least 1")
    if args.seed < 0:
        options.error(f"--seed {args.seed}: must be at least 0")
    try:
        asked = [find(name) for name in args.figures] or list(FIGURES)
    except ValueError as error:
        options.error(str(error))
    failed = 0
    for figure in asked:
        trial = Trial(args.count or max(round(figure.count * args.share), 1), args.seed, args.data)
        reason = _why_not(figure, trial)
        if reason is not None and args.figures:
            options.error(f"{figure.name}: {reason}")
        if reason is not None:
            print(f"{figure.name}: left out: {reason}", file=sys.stderr)
            continue
        try:
            found = outcome(figure, trial)
        except Misuse as error:
            options.error(f"{figure.name}: {error}")
        failed += found["failed"]
        for message in found["failures"]:
            print(f"FAILED {figure.name}: {message}", file=sys.stderr)
        print(json.dumps(found) if args.json else line(found), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
