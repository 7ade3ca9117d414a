"""What is measured of a contestant in processes of their own: the time to the first output, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from ...evaluate.memory import held_bytes, resident_mb
from ...model.allocator import return_freed
from ..apart import apart
from ..results import Row
from . import lines
from .contestant import Contestant
from .files import prepared
from .subject import Subject
from .suites import find

_TURNS = 3


def start_up(subject: Subject, contestants: Sequence[Contestant], root: Path, threads: int) -> list[Row]:
    """Seconds from loading to the first output of the first case, in a process that has imported torch and transformers."""
    here = [one for one in contestants if one.why_not() is None]
    folders = [prepared(root, subject, one, threads) for one in here]
    turns = [
        [
            apart(partial(_start, str(folder), subject.name), one.name, threads)
            for one, folder in zip(here, folders, strict=True)
        ]
        for _ in range(_TURNS)
    ]
    return [
        lines.line(subject.name, lines.START, one.name, one.peer, median(seconds))
        for one, *seconds in zip(here, *turns, strict=True)
    ]


def _start(folder: str, subject: str, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model = find(subject)
    inputs = model.subject.example()
    contestant = model.by_name(name)
    start = perf_counter()
    (contestant.start or contestant.load)(model.subject, Path(folder))(inputs)()
    return perf_counter() - start


def resident(subject: Subject, contestants: Sequence[Contestant], root: Path, threads: int) -> list[Row]:
    """The memory of a process with a quantized model after a call, over the bytes that the model holds. What the process
    had with the dense model, after the same call and less its bytes, is torch's own and not counted."""
    return [
        lines.line(
            subject.name, lines.RESIDENT, one.name, one.peer, apart(partial(_resident, subject.name), one.name, threads)
        )
        for one in contestants
        if one.convert is not None
    ]


def _resident(subject: str, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model = find(subject)
    convert = model.by_name(name).convert
    assert convert is not None, "chosen by resident()"  # noqa: S101
    inputs, built = model.subject.example(), model.subject.build()
    return_freed()
    model.subject.ready(built, inputs)()
    own = resident_mb() * 1e6 - held_bytes(built)
    convert(built, model.subject)
    model.subject.ready(built, inputs)()
    return (resident_mb() * 1e6 - own) / held_bytes(built)
