"""Hostile files, each refused with the field named: quickly, in words, and the model that was to be filled stays as it was."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import CheckpointError, load, save
from ..passes.quantize import quantize
from . import hostile_cases, hostile_files
from .attempt import must, wrong_of
from .children import in_memory
from .figure import Tally, Trial
from .hostile_cases import Hostile
from .hostile_files import HostileFile

_SCHEME = "w4a16g32asym"
_SLOW = 2.0  # seconds of processors
_LONGEST = 2000  # characters of a message


def dense(seed: int = 1) -> nn.Sequential:
    """The model that the checkpoints are of: two layers share a weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(41, 8), nn.LayerNorm(8), nn.Linear(41, 8, bias=False), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    return model


def saved(directory: Path) -> Path:
    """A good checkpoint, to be changed."""
    model = dense(0)
    quantize(model, _SCHEME, goal="memory", exclude="3")
    save(model, directory)
    return directory


def refusal(directory: Path, pattern: str | None = None) -> str:
    """The message of a refusal. Raises RuntimeError if the checkpoint is loaded, if the message does not match, or is long, if
    it takes time, or if the model changes."""
    model = dense()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = [*model.modules(), *model.parameters()]
    begin = time.process_time()
    try:
        load(model, directory)
    except CheckpointError as error:
        message = str(error)
    else:
        raise RuntimeError("it is loaded")
    seconds = time.process_time() - begin
    must(seconds < _SLOW, f"took {seconds:.1f} s")
    must(all(a is b for a, b in zip(held, [*model.modules(), *model.parameters()], strict=True)), "the model changed")
    must(all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()), "the model changed")
    must(len(message) < _LONGEST, f"the message has {len(message)} characters")
    must(pattern is None or bool(re.search(pattern, message)), f"the message names no {pattern}: {message[:300]}")
    return message


def try_case(case: Hostile) -> str:
    """Make a checkpoint, and refuse it after the case's change. As ``refusal``."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        case.change(saved(Path(folder)))
        return refusal(Path(folder), case.pattern)


def try_file(case: HostileFile) -> str:
    """Write a file of another format, and refuse it. Raises as ``refusal``."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = Path(folder, case.reader.file)
        case.write(path)
        begin = time.process_time()
        try:
            case.reader.read(path)
        except case.reader.refuses as error:
            message = str(error)
        else:
            raise RuntimeError("it is read")
        seconds = time.process_time() - begin
    must(seconds < _SLOW, f"took {seconds:.1f} s")
    must(len(message) < _LONGEST, f"the message has {len(message)} characters")
    must(bool(re.search(case.pattern, message)), f"the message names no {case.pattern}: {message[:300]}")
    return message


def refused(trial: Trial) -> Tally:
    """``count`` of the cases."""
    found = Tally()
    cases = [(f"nybble {case.name}", lambda case=case: try_case(case)) for case in hostile_cases.CASES]
    cases += [(f"{case.reader.name} {case.name}", lambda case=case: try_file(case)) for case in hostile_files.usable()]
    for number in trial.part(len(cases)):
        name, attempt = cases[number]
        found.add(wrong_of(attempt, name))
    return found
