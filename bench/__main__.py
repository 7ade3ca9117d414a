"""``python -m nybble.bench``: checks kernels, then times them against torch and other libraries.

Exit codes: 0 success; 1 failure (a kernel with wrong output, an unreadable file, a slowdown above `compare --fail-over`);
2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..demo import DemoUnavailable
from ..demo.table import markdown_table, text_table
from ..plugins import PluginError
from . import compare, crossover, goal_tables, peers, presets
from .arguments import amount, argument, counts
from .contestants import Maker, WrongKernelError, kernel_makers, peer_makers
from .figures import Figure, model
from .goals import show
from .machine import run_line
from .output import load, sink
from .progress import steps
from .quiet import quiet
from .results import DTYPES, Row
from .run import Grid, race
from .setup import THREADS, Put, Setup
from .shapes import SETS, parse_shapes
from .whole import lines
from .whole import show as whole
from .whole.suites import SUITES

BUDGET_S = 10.0  # of timing per cell, outside presets


def dtypes(text: str) -> list[torch.dtype]:
    """Comma-separated names of dtypes."""
    unknown = [name for name in text.split(",") if name not in DTYPES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not one of {', '.join(DTYPES)}")
    return [DTYPES[name] for name in text.split(",")]


def _seconds(text: str) -> float:
    if amount(text) >= 3600:
        raise ValueError(f"{text}: must be below 3600 seconds")
    return amount(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m nybble.bench", description="Check, time and compare nybble's kernels."
    )
    add = main.add_argument
    add("--kernel", help="glob on <kernel>-<scheme>: 'w4a8*-*g128', '*-sp80w8a8'; default: all of the best target")
    add("--shapes", type=argument(parse_shapes), default="4096x4096", help=f"NxK or {', '.join(SETS)}; comma-separated")
    add("--m", type=argument(counts), default="1,4,16,64,256", help="rows of activations; comma-separated")
    add("--dtype", type=argument(dtypes), default="bf16", help="dtype of activations; comma-separated")
    add("--threads", type=argument(counts), default=str(torch.get_num_threads()), help="thread counts, such as 1,2")
    add("--cold", action="store_true", help="weights from memory: copies of over 4 times the cache size (the default)")
    add("--hot", action="store_true", help="weights from the cache, if they fit; with --cold: both")
    add("--peers", default="*", help="glob on the names of other libraries, or none")
    add(
        "--budget", type=argument(_seconds), help=f"seconds of timing per cell (default: the preset's, or {BUDGET_S:g})"
    )
    add("--preset", choices=presets.PRESETS, help="a fixed run that reports whether performance targets are met")
    add("--resume", type=Path, metavar="FILE", help="with --preset: reuse the results in this file")
    add("--only", action="append", default=[], metavar="GLOB", help="with --preset: cells '2048x2048 m=1 *', '50%%*'")
    add("--model", nargs="?", const="*", metavar="GLOB", help="time a whole model instead: decode, prefill and memory")
    add("--json", action="store_true", help="print JSON lines")
    add("--out", type=Path, help="also write the JSON lines to this file, as they come")
    main.set_defaults(run=_measure)
    forms = main.add_subparsers(metavar="report | compare | against | ceilings | load | docs")
    report = forms.add_parser("report", help="show a result file")
    report.add_argument("file", type=Path)
    report.add_argument("--html", type=Path, help="write an HTML page")
    report.add_argument("--png", type=Path, help="write a plot: the roofline, or the maps of sparse-crossover")
    report.add_argument("--markdown", action="store_true", help="print only the preset's final table, as markdown")
    report.set_defaults(run=_report)
    diff = forms.add_parser("compare", help="compare two result files")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.add_argument(
        "--fail-over", type=argument(amount), metavar="PERCENT", help="exit with 1 if nybble is slower by more"
    )
    diff.set_defaults(run=_compare)
    other = forms.add_parser("against", help="time calls of small layers, over the nybble in another directory")
    other.add_argument("directory", type=Path, metavar="DIRECTORY", help="from pip install --target DIRECTORY")
    other.add_argument("--rounds", type=argument(counts), default="4", help="processes of each, in turn; medians count")
    other.set_defaults(run=_against)
    limits = forms.add_parser("ceilings", help="the machine's peak memory bandwidth and multiply rates")
    limits.add_argument("--threads", type=argument(counts), default="1,2")
    limits.add_argument("--remeasure", action="store_true", help="measure again instead of using cached values")
    limits.set_defaults(run=_show_ceilings)
    loading = forms.add_parser("load", help="time loading a quantized checkpoint, and its memory, by several libraries")
    loading.add_argument(
        "path", metavar="PATH", help="a directory, a GGUF file, or gptq or gguf-q4-k-m: one that is made"
    )
    loading.add_argument("--by", default="*", metavar="GLOB", help="names of libraries")
    loading.add_argument("--rounds", type=argument(counts), default="3", help="loads by each library; medians count")
    loading.add_argument("--json", action="store_true", help="print JSON lines")
    loading.set_defaults(run=_load)
    pages = forms.add_parser("docs", help="write the generated tables of README.md and docs/")
    pages.add_argument("--root", type=Path, default=Path(), help="nybble's repository (default: this folder)")
    pages.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is out of date")
    pages.set_defaults(run=_docs)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(words)
    quiet()
    try:
        if args.preset:
            presets.PRESETS[args.preset].begin(words)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe; keep the interpreter from flushing to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WrongKernelError, DemoUnavailable, PluginError, ValueError, ImportError, OSError) as error:
        print(f"nybble.bench: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace) -> int:
    matching = peers.matching(args.peers)
    threads = [THREADS] if args.preset else args.threads
    for name in ("resume", "only"):
        if getattr(args, name) and not args.preset:
            raise ValueError(f"--{name} {getattr(args, name)}: requires --preset")
    done = load(args.resume) if args.resume else []  # read before --out, which may be the same file, is opened
    limits = _ceilings(threads)
    mark = presets.PRESETS[args.preset].mark() if args.preset else {}
    with sink(args.out, args.json) as put:
        put([run_line(threads, limits, args.preset, mark)])
        for text in _texts(args, matching, limits, put, done):
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
    return 0


def _texts(
    args: argparse.Namespace,
    matching: Sequence[peers.Peer],
    limits: dict[str, Any],
    put: Put,
    done: Sequence[Row],
) -> Iterator[str]:
    """Runs the requested benchmark; yields the texts to print besides the result lines."""
    if args.model:
        yield from _model(args, put)
    elif args.preset:
        preset = presets.PRESETS[args.preset]
        budget, admitted = args.budget or preset.budget_s, preset.peers(matching)
        with steps(preset.steps(args.shapes, args.only)) as advance:
            setup = Setup(admitted, args.shapes, budget, limits, put, advance, done, args.only, preset.mark())
            yield from preset.run(setup)
    else:
        caches = [name for name in ("cold", "hot") if getattr(args, name)] or ["cold"]
        kernels = kernel_makers(args.kernel)
        makers: list[Maker] = [*kernels, *peer_makers(matching, [kernel.kind for kernel in kernels])]
        grid = Grid(args.shapes, args.m, args.dtype, args.threads, caches, args.budget or BUDGET_S)
        with steps(grid.cells) as advance:
            for rows in race(makers, grid, limits, advance):
                put(rows)


def _against(args: argparse.Namespace) -> int:
    from . import against

    print(against.table(list(against.measure(args.directory, args.rounds[0]))))
    return 0


def _ceilings(threads: Sequence[int]) -> dict[str, Any]:
    from .ceilings import ceilings

    return ceilings(threads)


def _show_ceilings(args: argparse.Namespace) -> int:
    from .ceilings import show

    show(args.threads, args.remeasure)
    return 0


def _load(args: argparse.Namespace) -> int:
    from . import loading

    names = [name for name in loading.READERS if fnmatchcase(name, args.by)]
    if not names:
        raise ValueError(f"--by {args.by}: must match one of {', '.join(loading.READERS)}")
    threads = torch.get_num_threads()
    with loading.checkpoint(args.path) as path:
        found = list(loading.measure(path, names, args.rounds[0], threads))
    if args.json:
        print("\n".join(json.dumps(row) for row in loading.rows_of(found, args.path, threads)))
    else:
        print(loading.table(found))
    return 0


def _docs(args: argparse.Namespace) -> int:
    from . import docs

    changed = docs.update(args.root, args.check)
    for page in changed:
        print(f"{page}: {'out of date' if args.check else 'written'}")
    return 1 if args.check and changed else 0


def _model(args: argparse.Namespace, put: Put) -> Iterator[str]:
    from .model import run
    from .report_rows import model_table

    for threads in args.threads:
        rows = []
        for result in run(args.model, threads):
            rows.append(asdict(result))
            put(rows[-1:])
        headers, lines = model_table(rows) or ((), [])
        yield text_table(headers, lines, right=range(1, len(headers)))
        for figure in model(rows):
            put([figure.line()])
            yield str(figure)


def _report(args: argparse.Namespace) -> int:
    rows = load(args.file)
    conclusion = _conclusion(rows, args.markdown)
    if args.markdown:
        if not conclusion:
            raise ValueError(
                f"{args.file}: must be from --preset {', '.join((*goal_tables.TABLES, 'sparse-crossover', *SUITES))}"
            )
        print(conclusion)
        return 0
    from .report import report

    print(report(rows, html=args.html, png=args.png))
    if conclusion:
        print(f"\n{conclusion}")
    for row in rows:
        if row["kind"] == "figure":
            print(Figure.of(row))
    return 0


def _conclusion(rows: Sequence[Row], markdown: bool) -> str:
    """The final table of the preset that wrote a file; "" if it is from none."""
    if maps := crossover.maps(rows):
        return crossover.table(maps)
    if lines.models(rows):
        return whole.goals(rows, markdown_table if markdown else whole.plain)
    found = goal_tables.of_rows(rows)
    return show(found, rows, markdown) if found else ""


def _compare(args: argparse.Namespace) -> int:
    found = compare.changes(load(args.before), load(args.after))
    if not found:
        raise ValueError(f"{args.before}, {args.after}: no results in common")
    print(compare.text(found))
    slow = compare.too_slow(found, args.fail_over) if args.fail_over is not None else []
    if slow:
        print(f"nybble.bench: {len(slow)} results slower by more than {args.fail_over:g} %", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
