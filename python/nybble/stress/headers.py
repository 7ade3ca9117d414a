"""Files of every format that nybble reads, damaged: refused in words, or read; never anything else, nor slowly.

A failure is anything but a refusal of the reader's own kind, such as a MemoryError: there is little memory; a message that
says nothing or everything; or a file of a few kilobytes that takes seconds.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from io import FileIO
from pathlib import Path

from .attempt import must, wrong_of
from .children import in_children, in_memory, limited_memory, slices
from .damage import Damage
from .figure import Tally, Trial
from .readers import READERS, Reader

_SLOW = 5.0  # seconds of processors
_LENGTHS = range(10, 2000)  # of messages


def usable() -> list[Reader]:
    """The readers whose packages are there."""
    return [reader for reader in READERS if not reader.needs or find_spec(reader.needs)]


def mutated(trial: Trial) -> Tally:
    """``count`` damaged files, as many for each reader."""
    readers = usable()
    each = max(trial.count // len(readers), 1)
    found = in_children(_mutated, [(trial.seed, begin, end) for begin, end in slices(each)])
    found.on["readers"] = len(readers)
    return found


def damaged(data: bytes, damages: tuple[Damage, ...], draw: random.Random) -> bytes:
    """A file after one to three damages, of which those that need structure are left out where there is none left."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            data = draw.choice(damages)(data, draw)[0]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # it is no JSON any more, or too short or too deep
    return data


def read_once(reader: Reader, path: Path, found: Tally) -> None:
    """Read a file. Raises RuntimeError where the reader does anything but read or refuse it."""
    begin = time.process_time()
    try:
        reader.read(path)
    except reader.refuses as error:
        must(len(str(error)) in _LENGTHS, f"a message of {len(str(error))} characters: {str(error)[:80]}")
        found.count("refused")
    else:
        found.count("read")
    seconds = time.process_time() - begin
    found.most("most seconds", round(seconds, 3))
    must(seconds < _SLOW, f"took {seconds:.1f} s")


def rewrite(file: FileIO, data: bytes) -> None:
    """Give an open file another content."""
    file.truncate(0)
    file.seek(0)
    must(file.write(data) == len(data), "the disk is full")


def _mutated(seed: int, first: int, last: int, say: Callable[[Tally], None]) -> None:
    """The damages of these numbers, for each reader."""
    found, readers = Tally(), usable()
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        paths = {reader.name: Path(folder, reader.name, reader.file) for reader in readers}
        samples = {reader.name: reader.sample() for reader in readers}
        for reader in readers:
            path = paths[reader.name]
            path.parent.mkdir()
            path.write_bytes(samples[reader.name])
            reader.read(path)  # which imports what it needs; the sample itself is fine
        limited_memory()
        for reader in readers:
            path, sample = paths[reader.name], samples[reader.name]
            with open(path, "r+b", buffering=0) as file:  # kept open, which takes less time than a new one for each
                for number in range(first, last):
                    draw = random.Random(f"{reader.name} {seed} {number}")  # noqa: S311
                    rewrite(file, damaged(sample, reader.damages, draw))
                    where = f"{reader.name} seed {seed} number {number}"
                    found.add(wrong_of(partial(read_once, reader, path, found), where))
    say(found)
