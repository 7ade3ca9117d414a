"""Reads a checkpoint after each of many small damages, in a process of its own with little memory.

`python foreign_mutations.py CHECKPOINT FROM TO`: the damages of these numbers, each always the same. Prints JSON: how many
were refused, and how many read. Fails with the number of the damage where

- anything but a CheckpointError is raised, such as a MemoryError: no memory that the file does not justify is there;
- a refusal says nothing of where it is;
- a weight is not finite, or has another shape than before;
- numbers changed although only the structure was damaged: a wrong load that nobody would see;
- other weights changed than that of the tensor in which a code or a scale was damaged, or more than one of a bit in a code.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign

EARLY = 800  # bytes that headers of small files have
# Tensors of codes, in which a bit is of one weight.
CODES = ("W_q", "qweight", "weight_packed", "qdata", "compressed", "._data", "._data._data")
SPARE = 384 << 20  # bytes of memory beyond those that importing took
NUMBERS = (-(2**40), -1, 0, 1, 2, 3, 5, 7, 31, 33, 127, 2**31, 2**40, 2**63, 10**30)
VALUES = (*NUMBERS, None, "x", "", [], {}, True, False, 3.5, [1], {"a": 1})
SPECIAL = {
    "F16": (b"\x00\x7c", b"\x00\x7e", b"\x00\xfc"),
    "BF16": (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff"),
    "F32": (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"),
    "I32": (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x40\x00\x00\x00"),
    "I64": (b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(8), b"\x01" + bytes(7)),
}


def weights(path):
    """Every matrix of a checkpoint, read and dequantized, after its configuration was asked for, which may be refused.

    Other tensors are only read: what they should be like is known when they are put into a model."""
    opened = open_foreign(path)[1]
    with contextlib.suppress(CheckpointError):
        opened.config()
    found = {name: layer.read().dequantize() for name, layer in opened.layers.items()}
    parts = {name: part.read().float() for name, part in opened.parts.items()}
    return found | {name: part for name, part in parts.items() if part.dim() > 1}


def split(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


# Each damage of a file's bytes returns the new bytes, and whether only the structure was damaged.


def truncated(data, rng):
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))], True


def flipped(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], False


def flipped_early(data, rng):
    at = rng.randrange(min(len(data), EARLY))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], False


def eight_bytes(data, rng):
    """A length, a count, a shape or an offset of GGUF, or any eight bytes."""
    at = rng.randrange(min(len(data) - 8, EARLY))
    number = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)))
    return data[:at] + number.to_bytes(8, "little") + data[at + 8 :], False


def told_shape(data, rng):
    header, rest = split(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    how = rng.randrange(4)
    if how == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(VALUES)
    elif how == 1:
        shape.reverse()
    elif how == 2:
        shape.append(rng.choice((1, 2)))
    else:
        entry["shape"] = rng.choice(VALUES)
    return joined(header, rest), True


def told_dtype(data, rng):
    header, rest = split(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    old = entry["dtype"]
    entry["dtype"] = rng.choice(("F64", "F32", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "X", None, 1))
    return joined(header, rest), old[0] != "F"


def told_offsets(data, rng):
    header, rest = split(data)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    how = rng.randrange(4)
    if how == 0:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif how == 1:
        shift = rng.choice((-64, -2, 2, 64, 2**40))
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    elif how == 2:
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    else:
        entry["data_offsets"] = rng.choice(VALUES)
    return joined(header, rest), True


def swapped(data, rng):
    """Two tensors with each other's bytes, shape, dtype or name: of one kind, that is another checkpoint."""
    header, rest = split(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    key = rng.choice(("data_offsets", "shape", "dtype", None))
    if key is None:
        header[one], header[other] = header[other], header[one]
    else:
        header[one][key], header[other][key] = header[other][key], header[one][key]
    return joined(header, rest), False


def lost(data, rng):
    header, rest = split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header.pop(name)
    if rng.randrange(2):
        header[name + rng.choice(("x", ".x", " "))] = entry
    return joined(header, rest), True


def special_number(data, rng):
    """A number that no tensor should have, somewhere in a tensor."""
    header, rest = split(data)
    entries = [e for n, e in header.items() if n != "__metadata__" and e["dtype"] in SPECIAL and e["shape"]]
    if not entries:
        return flipped(data, rng)
    entry = rng.choice(entries)
    new = rng.choice(SPECIAL[entry["dtype"]])
    begin, end = entry["data_offsets"]
    at = begin + rng.randrange((end - begin) // len(new)) * len(new)
    return joined(header, rest[:at] + new + rest[at + len(new) :]), False


def told_metadata(data, rng):
    header, rest = split(data)
    told = header.get("__metadata__", {})
    for name, text in told.items():
        if text.startswith("{") and rng.randrange(2):
            told[name] = json.dumps(changed(json.loads(text), rng))
            return joined(header, rest), True
    header["__metadata__"] = rng.choice(({}, VALUES[rng.randrange(len(VALUES))], {"a": 1}))
    return joined(header, rest), True


def changed(value, rng):
    """A JSON object with one of its values, at any depth, changed, exchanged for another or left out."""
    if isinstance(value, dict) and value and rng.randrange(8):
        key = rng.choice(sorted(value))
        if not rng.randrange(6):
            return {name: inner for name, inner in value.items() if name != key}
        if not rng.randrange(6):
            other = rng.choice(sorted(value))
            return value | {key: value[other], other: value[key]}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.randrange(4):
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


SAFETENSORS = (
    truncated, flipped, flipped_early, eight_bytes, told_shape, told_dtype, told_offsets, lost, swapped, special_number,
    told_metadata,
)  # fmt: skip
OTHER = (truncated, flipped, flipped_early, flipped_early, eight_bytes)


def flipped_in(before, after):
    """The tensor of a safetensors file in which a single bit was changed, or None: another damage."""
    places = [at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    size = 8 + int.from_bytes(before[:8], "little")
    if len(before) != len(after) or len(places) != 1 or places[0] < size:
        return None
    if (before[places[0]] ^ after[places[0]]).bit_count() != 1:
        return None
    entries = {name: entry["data_offsets"] for name, entry in split(before)[0].items() if name != "__metadata__"}
    return next((name for name, (begin, end) in entries.items() if begin <= places[0] - size < end), None)


def damage(directory, number):
    """Damages one file of a copy of a checkpoint. Returns whether only the structure was damaged, and ``flipped_in``."""
    rng = random.Random(number)  # noqa: S311
    files = sorted(path for path in directory.iterdir() if path.name != "oracle.safetensors")
    path = rng.choice(files)
    data = path.read_bytes()
    if path.suffix == ".json":
        if not rng.randrange(5):
            data, structure = flipped(data, rng)
        else:
            data, structure = json.dumps(changed(json.loads(data), rng)).encode(), True
    else:
        data, structure = rng.choice(SAFETENSORS if path.suffix == ".safetensors" else OTHER)(data, rng)
    tensor = flipped_in(path.read_bytes(), data) if path.suffix == ".safetensors" else None
    path.write_bytes(data)
    return structure, tensor


def attempt(checkpoint, number, expected):
    """Whether a damaged copy was read; AssertionError where it should not have been."""
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
            assert 10 < len(refused) < 2000, f"the message is of {len(refused)} characters"
            return False
        for name in expected.keys() & found.keys():
            assert found[name].shape == expected[name].shape, f"{name}: another shape"
            assert name.endswith(".bias") or found[name].isfinite().all(), f"{name}: not finite"
            assert not structure or torch.equal(found[name], expected[name]), f"{name}: other numbers"
            differ = int((found[name] != expected[name]).sum()) if tensor is not None else 0
            assert not differ or tensor.startswith(name), f"{tensor}: a bit of it changed {name}"
            assert differ < 2 or not tensor.endswith(CODES), f"{tensor}: a bit of it changed {differ} weights"
        gone = {name for name in expected.keys() - found.keys() if not name.endswith(".bias")}
        assert not structure or not gone, "layers are lost"
        return True


def main(checkpoint, first, last):
    expected = weights(checkpoint)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    read = 0
    for number in range(first, last):
        try:
            read += attempt(checkpoint, number, expected)
        except Exception as error:
            raise AssertionError(f"damage {number} of {checkpoint.name}: {type(error).__name__}: {error}") from error
    print(json.dumps({"read": read, "refused": last - first - read}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
