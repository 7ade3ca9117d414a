"""How the bytes and the JSON of checkpoints are damaged: each damage takes bytes and a generator, and is the same for a seed.

Each returns the new bytes, and whether only the structure was damaged, so that numbers that are still read must be the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

EARLY = 800  # bytes that headers of small files have
NUMBERS = (-(2**40), -1, 0, 1, 2, 3, 5, 7, 31, 33, 127, 2**31, 2**40, 2**63, 10**30)
VALUES: tuple[Any, ...] = (*NUMBERS, None, "x", "", [], {}, True, False, 3.5, [1], {"a": 1})
SPECIAL = {
    "F16": (b"\x00\x7c", b"\x00\x7e", b"\x00\xfc"),
    "BF16": (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff"),
    "F32": (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"),
    "I32": (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x40\x00\x00\x00"),
    "I64": (b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(8), b"\x01" + bytes(7)),
}

TEXTS = (
    b"[", b"]", b"{", b"}", b'"', b":", b",", b"\\", b"\n", b"  ", b"\0", b"-", b"9" * 40, b"1e999", b"NaN", b"null", b"&a ", b"*a",
    b"!!python/name:os.system ", b"%", b"#", b"'", b"|", b">", b"? ", b"<<", b"\xff", b"\xef\xbb\xbf", b"[" * 70, b"\t", b"~", b"..",
)  # fmt: skip
Damage = Callable[[bytes, random.Random], tuple[bytes, bool]]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], rest: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def truncated(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Cut somewhere."""
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))], True


def flipped(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A bit."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], False


def flipped_early(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A bit of the header."""
    at = rng.randrange(min(len(data), EARLY))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], False


def eight_bytes(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A length, a count, a shape or an offset of GGUF, or any eight bytes."""
    at = rng.randrange(min(len(data) - 8, EARLY))
    number = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)))
    return data[:at] + number.to_bytes(8, "little") + data[at + 8 :], False


def told_shape(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A tensor's shape."""
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


def told_dtype(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A tensor's dtype."""
    header, rest = split(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    old = entry["dtype"]
    entry["dtype"] = rng.choice(("F64", "F32", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "X", None, 1))
    return joined(header, rest), old[0] != "F"


def told_offsets(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A tensor's place."""
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


def swapped(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
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


def lost(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A tensor less, or under another name."""
    header, rest = split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header.pop(name)
    if rng.randrange(2):
        header[name + rng.choice(("x", ".x", " "))] = entry
    return joined(header, rest), True


def special_number(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
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


def told_metadata(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """What the metadata say."""
    header, rest = split(data)
    told = header.get("__metadata__", {})
    for name, text in told.items():
        if text.startswith("{") and rng.randrange(2):
            told[name] = json.dumps(changed(json.loads(text), rng))
            return joined(header, rest), True
    header["__metadata__"] = rng.choice(({}, VALUES[rng.randrange(len(VALUES))], {"a": 1}))
    return joined(header, rest), True


def changed(value: Any, rng: random.Random) -> Any:
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


def spliced(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Some bytes left out, there twice, or put elsewhere."""
    begin, to = rng.randrange(len(data)), rng.randrange(len(data))
    part = data[begin : begin + int(2 ** rng.uniform(0, 6))]
    how = rng.randrange(3)
    if how == 0:
        return data[:begin] + data[begin + len(part) :], True
    return data[:to] + part * rng.choice((1, 1, 2, 40)) + data[to + (len(part) if how == 1 else 0) :], True


def other_text(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A character or a number of a text exchanged for one with a meaning of its own."""
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(TEXTS) + data[at + rng.randrange(2) :], True


def told_json(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A value of a JSON text."""
    return json.dumps(changed(json.loads(data), rng)).encode(), True


SAFETENSORS: tuple[Damage, ...] = (
    truncated, flipped, flipped_early, eight_bytes, told_shape, told_dtype, told_offsets, lost, swapped, special_number,
    told_metadata,
)  # fmt: skip
OTHER: tuple[Damage, ...] = (truncated, flipped, flipped_early, flipped_early, eight_bytes)
TEXT: tuple[Damage, ...] = (truncated, flipped, spliced, other_text, other_text)
BINARY: tuple[Damage, ...] = (*OTHER, spliced, eight_bytes)
