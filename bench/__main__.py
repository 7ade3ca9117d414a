"""``python -m nybble.bench``: checks kernels, then times them against torch and other libraries.

Exit codes: 0 done, 1 a stated failure (a wrong kernel, a slowdown that `compare --fail-over` forbids), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import peers
from .entrants import Maker, PeerMaker, WrongKernelError, kernel_makers
from .machine import run_line
from .output import sink
from .progress import progress
from .results import DTYPES
from .run import Grid, race
from .shapes import SETS, parse_shapes


def numbers(text: str) -> list[int]:
    """Comma-separated integers above 0."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(f"{text!r}: must be above 0")
    return found


def dtypes(text: str) -> list[torch.dtype]:
    """Comma-separated names of dtypes."""
    return [DTYPES[name] for name in text.split(",")]


def _argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser whose errors argparse shows with their message."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m nybble.bench", description=__doc__.splitlines()[0])
    add = main.add_argument
    add("--kernel", help="glob on <kernel>-<scheme>, such as 'w4a8*-*g128'; default: those of the best target")
    add("--shapes", type=_argument(parse_shapes), default="4096x4096", help=f"NxK or {', '.join(SETS)}; commas between")
    add("--m", type=_argument(numbers), default="1,4,16,64,256", help="rows of activations")
    add("--dtype", type=_argument(dtypes), default="bf16", help="of the activations: bf16, fp32, fp16")
    add("--threads", type=_argument(numbers), default=str(torch.get_num_threads()))
    add("--cold", action="store_true", help="weights from memory: copies of more than 4 times the cache (the default)")
    add("--hot", action="store_true", help="weights from the cache where they fit; with --cold, both")
    add("--peers", default="*", help="glob on their names, or none")
    add("--budget", type=float, default=6.0, help="seconds a cell may time")
    add("--json", action="store_true", help="one JSON object a line")
    add("--out", type=Path, help="write the JSON lines to this file as they come")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return _race(args)
    except (WrongKernelError, ValueError) as error:
        print(f"nybble.bench: {error}", file=sys.stderr)
        return 1


def _race(args: argparse.Namespace) -> int:
    from .ceilings import ceilings

    caches = [name for name in ("cold", "hot") if getattr(args, name)] or ["cold"]
    makers: list[Maker] = kernel_makers(args.kernel)
    makers += [PeerMaker(peer) for peer in peers.matching(args.peers)]
    grid = Grid(args.shapes, args.m, args.dtype, args.threads, caches, args.budget)
    limits = ceilings(args.threads)
    with sink(args.out, args.json) as put, progress(grid.cells) as advance:
        put([run_line(args.threads, limits)])
        for rows in race(makers, grid, limits, advance):
            put(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
