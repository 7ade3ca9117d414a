"""Saves that are killed, or run out of disk, over a checkpoint: the directory always holds the old one or the new one, whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load, save
from ..passes.quantize import quantize
from .attempt import must, wrong_of
from .children import Child
from .faults import is_full, small_disk
from .figure import Tally, Trial

_WIDTH = 256
_VALUES = (1.0, 2.0)
_SLACK = 32 << 10  # bytes: pages that files do not fill


def valued(value: float) -> nn.Sequential:
    """A model of a quantized and a dense layer, all of whose numbers come from one value."""
    model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    quantize(model, "w8a16", goal="memory", include="0")
    return model


def value_in(directory: Path) -> float:
    """The value of the checkpoint in a directory. Raises RuntimeError where it is made of two."""
    model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH))
    load(model, directory)
    with torch.no_grad():
        first: Any = model[0]  # quantized by now
        parts = [first.dequantize().weight, first.bias, *model[1].parameters()]
        found = {round(float(end), 3) for part in parts for end in (part.min(), part.max())}
    must(len(found) == 1, f"values of {sorted(found)} in one checkpoint")
    return found.pop()


def saves(directory: Path, say: Callable[[str], None]) -> None:
    """Save one model and then the other, until the process is killed."""
    models = [valued(value) for value in _VALUES]
    for turn in count():
        save(models[turn % 2], directory)
        if turn == 1:
            say("saves")


def killed(trial: Trial) -> Tally:
    """``count`` kills, each at a random moment of the first few saves that a process makes over a checkpoint."""
    found, draw = Tally(), random.Random(trial.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(valued(_VALUES[0]), directory)
        begin = time.perf_counter()
        save(valued(_VALUES[1]), directory)
        longest = 4 * (time.perf_counter() - begin)
        for number in range(trial.count):
            found.add(wrong_of(lambda: _kill(directory, draw.uniform(0, longest), found), f"kill {number}"))
    return found


def _kill(directory: Path, after: float, found: Tally) -> None:
    child = Child(saves, directory)
    must(child.heard() == "saves", "the child does not save")
    time.sleep(after)
    child.signal(signal.SIGKILL)
    must(child.end() == -signal.SIGKILL, "the child was not killed")
    orphans = [name for name in os.listdir(directory) if name.endswith(".tmp")]
    found.count("during a save", bool(orphans))
    value = value_in(directory)
    must(value in _VALUES, f"holds {value}")
    save(valued(value), directory)
    must(value_in(directory) == value, "the next save does not hold what was saved")
    left = sorted(os.listdir(directory))
    must(len(left) == 2, f"after the next save there are {left}")


def on_full_disk(trial: Trial) -> Tally:
    """``count`` saves over a checkpoint, on disks that get full after a random number of bytes."""
    found, draw = Tally(), random.Random(trial.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as folder:
        save(valued(_VALUES[0]), folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    for number in range(trial.count):
        share = draw.random()
        found.add(wrong_of(partial(_fill, size, share, found), f"disk {number}, {share:.3f} of a checkpoint free"))
    return found


def _fill(size: int, share: float, found: Tally) -> None:
    with tempfile.TemporaryDirectory() as folder:
        child = Child(save_on_small_disk, Path(folder), size, share, True)
        said = child.heard()
        must(child.end() == 0, "the child raised")
        found.count(said)


def save_on_small_disk(directory: Path, size: int, share: float, mounts: bool, say: Callable[[str], None]) -> None:
    """In a child: save on a disk that has room for a checkpoint and a share of another. Says "full" or "fits"."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder)
        save(valued(_VALUES[0]), first)
        new = valued(_VALUES[1])
        shutil.copytree(first, directory, dirs_exist_ok=True)
        limits = small_disk(directory, int(size * (1 + share)) + _SLACK, int(size * share), mounts)
        if not os.listdir(directory):  # the disk is a new one
            shutil.copytree(first, directory, dirs_exist_ok=True)
    before = sorted(os.listdir(directory))
    try:
        save(new, directory)
        said = "fits"
    except OSError as error:
        must(is_full(error), str(error))
        must("no checkpoint could be written" in str(error), str(error))
        must(sorted(os.listdir(directory)) == before, f"holds {sorted(os.listdir(directory))}, not {before}")
        said = "full"
    must(value_in(directory) == _VALUES[said == "fits"], "holds another checkpoint")
    limits.lift()
    save(new, directory)
    must(value_in(directory) == _VALUES[1], "the next save does not hold what was saved")
    say(said)
