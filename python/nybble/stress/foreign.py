"""Checkpoints of other libraries after each of many small damages: refused by name, or read as they were.

A failure has the number of the damage. It is one where

- anything but a CheckpointError is raised, such as a MemoryError: no memory that the file does not justify is there;
- a refusal says nothing of where it is;
- a weight is not finite, or has another shape than before;
- numbers changed although only the structure was damaged: a wrong load that nobody would see;
- other weights changed than that of the tensor in which a code or a scale was damaged, or more than one of a bit in a code.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..foreign import open_foreign
from .attempt import must, wrong_of
from .children import in_children, limited_memory, slices
from .damage import OTHER, SAFETENSORS, flipped, split, told_json
from .figure import Misuse, Tally, Trial

# Tensors of codes, in which a bit is of one weight.
CODES = ("W_q", "qweight", "weight_packed", "qdata", "compressed", "._data", "._data._data")


def weights(path: Path) -> dict[str, Tensor]:
    """Every matrix of a checkpoint, read and dequantized, after its configuration was asked for, which may be refused.

    Other tensors are only read: what they should be like is known when they are put into a model."""
    opened = open_foreign(path)[1]
    with contextlib.suppress(CheckpointError):
        opened.config()
    found = {name: layer.read().dequantize() for name, layer in opened.layers.items()}
    parts = {name: part.read().float() for name, part in opened.parts.items()}
    return found | {name: part for name, part in parts.items() if part.dim() > 1}


def flipped_in(before: bytes, after: bytes) -> str | None:
    """The tensor of a safetensors file in which a single bit was changed, or None: another damage."""
    places = [at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    size = 8 + int.from_bytes(before[:8], "little")
    if len(before) != len(after) or len(places) != 1 or places[0] < size:
        return None
    if (before[places[0]] ^ after[places[0]]).bit_count() != 1:
        return None
    entries = {name: entry["data_offsets"] for name, entry in split(before)[0].items() if name != "__metadata__"}
    return next((name for name, (begin, end) in entries.items() if begin <= places[0] - size < end), None)


def damage(directory: Path, number: int) -> tuple[bool, str | None]:
    """Damages one file of a copy of a checkpoint. Returns whether only the structure was damaged, and ``flipped_in``."""
    rng = random.Random(number)  # noqa: S311
    files = sorted(path for path in directory.iterdir() if path.name != "oracle.safetensors")
    path = rng.choice(files)
    data = path.read_bytes()
    if path.suffix == ".json":
        data, structure = (told_json if rng.randrange(5) else flipped)(data, rng)
    else:
        data, structure = rng.choice(SAFETENSORS if path.suffix == ".safetensors" else OTHER)(data, rng)
    tensor = flipped_in(path.read_bytes(), data) if path.suffix == ".safetensors" else None
    path.write_bytes(data)
    return structure, tensor


def attempt(checkpoint: Path, number: int, expected: Mapping[str, Tensor]) -> bool:
    """Whether a damaged copy was read; RuntimeError where it should not have been."""
    with tempfile.TemporaryDirectory() as aside:
        directory = Path(aside, checkpoint.name)
        shutil.copytree(checkpoint, directory)
        structure, tensor = damage(directory, number)
        try:
            found = weights(directory)
        except CheckpointError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            must(10 < len(refused) < 2000, f"the message is of {len(refused)} characters")
            return False
        for name in expected.keys() & found.keys():
            must(found[name].shape == expected[name].shape, f"{name}: another shape")
            must(name.endswith(".bias") or bool(found[name].isfinite().all()), f"{name}: not finite")
            must(not structure or torch.equal(found[name], expected[name]), f"{name}: other numbers")
            differ = int((found[name] != expected[name]).sum()) if tensor is not None else 0
            must(not differ or str(tensor).startswith(name), f"{tensor}: a bit of it changed {name}")
            must(differ < 2 or not str(tensor).endswith(CODES), f"{tensor}: a bit of it changed {differ} weights")
        gone = {name for name in expected.keys() - found.keys() if not name.endswith(".bias")}
        must(not structure or not gone, "layers are lost")
        return True


def damages(checkpoint: Path, first: int, last: int, say: Callable[[Tally], None]) -> None:
    """The damages of these numbers, in a process of its own, which gets little memory."""
    found, expected = Tally(), weights(checkpoint)
    limited_memory()
    for number in range(first, last):

        def once(number: int = number) -> None:
            found.count("read" if attempt(checkpoint, number, expected) else "refused")

        found.add(wrong_of(once, f"damage {number} of {checkpoint.name}"))
    say(found)


def mutated(trial: Trial) -> Tally:
    """``count`` damages of each checkpoint in the directory ``data``."""
    if trial.data is None or not trial.data.is_dir():
        raise Misuse(f"data={trial.data}: must be a directory of checkpoints")
    checkpoints = sorted(path for path in trial.data.iterdir() if path.is_dir())
    if not checkpoints:
        raise Misuse(f"data={trial.data}: must hold directories, each of a checkpoint")
    read = [path for path in checkpoints if find_spec("onnx") or not list(path.glob("*.onnx"))]
    first = trial.seed << 32  # so that no two seeds have a damage in common
    parts = [(path, first + begin, first + end) for path in read for begin, end in slices(trial.count)]
    found = in_children(damages, parts)
    found.on = {"checkpoints": len(read), "left out without onnx": len(checkpoints) - len(read)}
    return found
