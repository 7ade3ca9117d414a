"""Coverage-guided fuzzing of what reads files: `python fuzz/run.py READER SECONDS [--corpus DIRECTORY] [--seed N]`.

READER is a row of nybble.stress.readers. Needs atheris (pip install atheris), which is no dependency of nybble. It begins with
the sample of the reader, the files of nybble.stress.hostile_files and those that fuzz/keep.py kept. Every second file is changed by
the damages of the row, which know its format, the others by libFuzzer. It stops at anything but a refusal in words, at 5
seconds for a file, and at 2 GB of memory. What it finds is kept in the corpus, a temporary directory if none is named.
Never commit a file that stops other software than nybble.

The line of JSON that it prints at last is one for bench/results/<machine>-reliability.jsonl. Exit code: 1 if it found anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from kept import kept

_TRIED = re.compile(r"stat::number_of_executed_units: +(\d+)")


def options() -> argparse.ArgumentParser:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description="Fuzzing of a reader of nybble.stress.readers.")
    parser.add_argument("reader", metavar="READER")
    parser.add_argument("seconds", type=int, metavar="SECONDS")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIRECTORY", help="of files to begin with, and for those that it finds"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another one tries others (1)")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # the process that is watched, and where it writes
    return parser


def fuzz(name: str, seconds: int, corpus: Path, seed: int, scratch: Path) -> None:
    """Run libFuzzer, which ends the process. scratch: a directory in memory."""
    import atheris

    with atheris.instrument_imports(include=["nybble.checkpoint", "nybble.foreign", "nybble.recipe", "yaml", "json"]):
        from nybble.stress import headers, hostile_files, readers
        from nybble.stress.figure import Tally
    row = next(row for row in readers.READERS if row.name == name)
    path = scratch / row.file
    (corpus / "sample").write_bytes(row.sample())
    for number, case in enumerate(hostile_files.CASES):
        if case.reader is row:
            path.unlink(missing_ok=True)
            case.write(path)
            if not path.is_symlink() and path.stat().st_size < 1 << 16:
                (corpus / f"hostile-{number}").write_bytes(path.read_bytes())
    path.unlink(missing_ok=True)
    for number, data in enumerate(kept(name)):
        (corpus / f"kept-{number}").write_bytes(data)
    told = Tally()

    def once(data: bytes) -> None:
        path.write_bytes(data)
        headers.read_once(row, path, told)

    def change(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            changed: bytes = atheris.Mutate(data, most)
            return changed
        return headers.damaged(data, row.damages, random.Random(seed))[:most]  # noqa: S311

    limits = ["-timeout=5", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1"]
    limits += [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={corpus}/found-"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], once, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    """Fuzz in a process of its own, and tell what came of it. The exit code."""
    args = options().parse_args()
    if args.here:
        fuzz(args.reader, args.seconds, args.corpus, args.seed, args.here)
        return 0
    from nybble.stress.children import in_memory  # not by the watched process, before it is instrumented
    from nybble.stress.figure import FUZZ, circumstances
    from nybble.stress.readers import READERS

    if args.reader not in (names := [row.name for row in READERS]):
        options().error(f"READER={args.reader!r}: must be one of {', '.join(names)}")
    if args.seconds < 1:
        options().error(f"SECONDS={args.seconds}: must be at least 1")
    if not 0 < args.seed < 1 << 32:
        options().error(f"--seed {args.seed}: must be in [1, 2^32): of 0 libFuzzer makes one of its own")
    if find_spec("atheris") is None:
        options().error("needs atheris: pip install atheris")
    with contextlib.ExitStack() as context:
        corpus = args.corpus or Path(context.enter_context(tempfile.TemporaryDirectory()))
        corpus.mkdir(parents=True, exist_ok=True)
        scratch = context.enter_context(tempfile.TemporaryDirectory(dir=in_memory()))
        before = set(corpus.glob("found-*"))
        command = [sys.executable, __file__, args.reader, str(args.seconds), "--seed", str(args.seed)]
        done = subprocess.run(  # noqa: S603
            [*command, "--corpus", str(corpus), "--here", scratch], stderr=subprocess.PIPE, text=True, check=False
        )
        used, tried = resource.getrusage(resource.RUSAGE_CHILDREN), _TRIED.search(done.stderr)
        found = sorted(path.name for path in set(corpus.glob("found-*")) - before)
        if done.returncode or tried is None:
            sys.stderr.write(done.stderr[-8000:])
    row = {
        "figure": FUZZ,
        "reader": args.reader,
        "seed": args.seed,
        "tried": int(tried[1]) if tried else 0,
        "failed": max(len(found), int(done.returncode != 0)),
        "failures": found,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        **circumstances(),
    }
    print(json.dumps(row))
    return int(row["failed"] != 0)


if __name__ == "__main__":
    sys.exit(main())
