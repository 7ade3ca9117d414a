"""Saves that are killed, over a checkpoint that is there: the directory always holds the old one or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load, save
from ..passes.quantize import quantize
from .attempt import must, wrong_of
from .children import Child
from .figure import Tally, Trial

_WIDTH = 256
_VALUES = (1.0, 2.0)


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
