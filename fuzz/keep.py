"""Keep a few of the files that fuzzing found: `python fuzz/keep.py READER CORPUS`, a directory of `fuzz/run.py --corpus`.

Of the files up to 4 KB, smallest first, each is kept that takes the reader over a step between two lines of nybble that no other
has taken. They are written into tests/data/fuzz/READER.zip, with those that were there; the tests read each. Look that no
other software stops at them before they are committed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from kept import KEPT, kept

import nybble
from nybble.stress import headers, readers
from nybble.stress.attempt import wrong_of
from nybble.stress.figure import Tally

_LARGEST = 4096  # bytes
_OURS = str(Path(nybble.__file__).parent)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that the same files make the same bytes

Step = tuple[str, int, int]  # file, line, line before it


def steps_of(call: Callable[[], object]) -> set[Step]:
    """The steps between lines of nybble that a call takes."""
    found: set[Step] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS):
            return None
        last = frame.f_lineno

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((file, frame.f_lineno, last))
                last = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return found


def choose(reader: readers.Reader, files: list[bytes]) -> list[bytes]:
    """Those that take new steps."""
    chosen, seen = [], set()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, reader.file)
        for data in [reader.sample(), *sorted(files, key=lambda data: (len(data), data))]:
            path.write_bytes(data)
            # What is at fault is kept too: the tests are to tell it.
            new = steps_of(lambda: wrong_of(lambda: headers.read_once(reader, path, Tally()), "")) - seen
            if new:
                seen |= new
                chosen.append(data)
    return chosen[1:]  # the sample is made anew each time


def main() -> None:
    """Choose and write them."""
    parser = argparse.ArgumentParser(description="Keep a few of the files that fuzzing found, for the tests.")
    parser.add_argument("reader", choices=[reader.name for reader in readers.READERS])
    parser.add_argument("corpus", type=Path)
    args = parser.parse_args()
    if not args.corpus.is_dir():
        parser.error(f"CORPUS={args.corpus}: must be a directory")
    reader = next(reader for reader in readers.READERS if reader.name == args.reader)
    files = [path.read_bytes() for path in args.corpus.iterdir() if path.is_file() and path.stat().st_size <= _LARGEST]
    chosen = choose(reader, list({*files, *kept(reader.name)}))
    if not chosen:
        parser.error(
            f"CORPUS={args.corpus}: has no files of at most {_LARGEST} bytes that take other steps than the sample"
        )
    KEPT.mkdir(exist_ok=True)
    with zipfile.ZipFile(KEPT / f"{reader.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, data in enumerate(chosen):
            archive.writestr(zipfile.ZipInfo(f"{number:03}", _EPOCH), data, zipfile.ZIP_DEFLATED)
    print(f"{len(chosen)} of {len(files)} files kept, {sum(map(len, chosen)):,} bytes")


if __name__ == "__main__":
    main()
