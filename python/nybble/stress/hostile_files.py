"""Files of other formats that lie: what each says, and what the refusal must name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .damage import joined, split
from .readers import READERS, Reader
from .samples import PROGRAM, torch_file

_BY_NAME = {reader.name: reader for reader in READERS}
_HUGE = 1 << 62


@dataclass(frozen=True)
class HostileFile:
    """A case: its name, what reads it, what writes it, and a pattern that the message of the refusal must match."""

    name: str
    reader: Reader
    write: Callable[[Path], None]
    pattern: str


def _bytes(reader: Reader, change: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(change(reader.sample()))


def _case(reader: str, name: str, change: Callable[[bytes], bytes], pattern: str) -> HostileFile:
    row = _BY_NAME[reader]
    return HostileFile(name, row, partial(_bytes, row, change), pattern)


def _link(to: str, path: Path) -> None:
    path.symlink_to(to)


def _exchanged(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """The first occurrence of bytes, which must be there, exchanged."""

    def change(data: bytes) -> bytes:
        if old not in data:
            raise RuntimeError(f"{old!r} is not in the sample")
        return data.replace(old, new, 1)

    return change


def _number(at: bytes, form: str, value: int, skip: int = 0) -> Callable[[bytes], bytes]:
    """The number that follows some bytes of the sample, after ``skip`` more bytes."""

    def change(data: bytes) -> bytes:
        begin = data.index(at) + len(at) + skip
        return data[:begin] + struct.pack(f"<{form}", value) + data[begin + struct.calcsize(f"<{form}") :]

    return change


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def rewritten(data: bytes) -> bytes:
        header, rest = split(data)
        change(header)
        return joined(header, rest)

    return rewritten


def _put(name: str, key: str, value: Any) -> Callable[[bytes], bytes]:
    return _header(lambda header: header[name].update({key: value}))


def _gguf() -> Iterator[HostileFile]:
    tensor, other = b"blk.0.ffn_up.weight", b"output_norm.weight"
    for name, change, pattern in (
        ("empty", lambda data: b"", "regular file that is not empty"),
        ("magic", _exchanged(b"GGUF", b"GGUX"), "magic"),
        ("version 1", _number(b"GGUF", "I", 1), "version 1"),
        ("big-endian", _number(b"GGUF", "I", 3 << 24), "version"),
        ("tensors beyond count", _number(b"GGUF", "Q", _HUGE, 4), "tensor_count"),
        ("fields beyond count", _number(b"GGUF", "Q", _HUGE, 12), "metadata_kv_count"),
        ("one tensor more", _number(b"GGUF", "Q", 3, 4), "tensor 2|past the end|dimensions"),
        ("key of 2^62 bytes", _number(b"GGUF", "Q", _HUGE, 20), "field 0"),
        ("key of all bytes", _number(b"GGUF", "Q", 1 << 20, 20), "field 0"),
        ("key not UTF-8", _exchanged(b"general.arch", b"\xff\xfe\xfd\xfceral.arch"), "not UTF-8"),
        ("value of 2^62 bytes", _number(b"general.architecture", "Q", _HUGE, 4), "general.architecture"),
        ("type 77", _number(b"general.architecture", "I", 77), "general.architecture: type 77"),
        ("array of arrays", _number(b"tokenizer.ggml.scores", "I", 9, 4), "an array of type 9"),
        ("array of 2^62", _number(b"tokenizer.ggml.scores", "Q", _HUGE, 8), "tokenizer.ggml.scores"),
        ("2^62 strings", _number(b"tokenizer.ggml.tokens", "Q", _HUGE, 8), "tokenizer.ggml.tokens"),
        ("a string of 2^62", _number(b"tokenizer.ggml.tokens", "Q", _HUGE, 16), "tokenizer.ggml.tokens"),
        ("key twice", _exchanged(b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"), "is there twice"),
        ("alignment 0", _number(b"general.alignment", "I", 0, 4), "general.alignment"),
        ("alignment 3", _number(b"general.alignment", "I", 3, 4), "general.alignment"),
        ("alignment 2^31", _number(b"general.alignment", "I", 1 << 31, 4), "general.alignment"),
        ("0 dimensions", _number(tensor, "I", 0), "0 dimensions"),
        ("5 dimensions", _number(tensor, "I", 5), "5 dimensions"),
        ("2^31 dimensions", _number(tensor, "I", 1 << 31), "dimensions"),
        ("size 0", _number(tensor, "Q", 0, 4), "shape"),
        ("size 2^63", _number(tensor, "Q", 1 << 63, 4), "shape"),
        ("size 2^40", _number(tensor, "Q", 1 << 40, 12), "outside the file's data"),
        ("columns of half a block", _number(tensor, "Q", 48, 4), "no multiple"),
        ("a row less", _number(tensor, "Q", 6, 12), "belong to no tensor"),
        ("a row more", _number(tensor, "Q", 9, 12), "overlaps|outside"),
        ("type of tensor 999", _number(tensor, "I", 999, 20), "999"),
        ("another type of tensor", _number(tensor, "I", 8, 20), "overlaps|outside|belong"),
        ("offset 1", _number(tensor, "Q", 1, 24), "offset 1"),
        ("offset 2^62", _number(tensor, "Q", _HUGE, 24), "outside the file's data"),
        ("offset of another", _number(other, "Q", 0, 16), "overlaps"),
        ("tensor twice", lambda data: data.replace(_named(other), _named(tensor)), "is there twice|past the end"),
        ("name of 2^62 bytes", lambda data: data.replace(_named(tensor), struct.pack("<Q", _HUGE)), "tensor 0"),
    ):
        yield _case("gguf", name, change, pattern)
    for percent in range(2, 100, 7):
        cut = partial(lambda percent, data: data[: len(data) * percent // 100], percent)
        yield _case("gguf", f"cut at {percent} %", cut, "past the end|outside the file|more than a file")


def _named(name: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name


def _safetensors() -> Iterator[HostileFile]:
    name = "a.qweight"
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
    for what, change, pattern in (
        ("empty", lambda data: b"", "regular file that is not empty"),
        ("7 bytes", lambda data: data[:7], "header"),
        ("header of 2^62 bytes", lambda data: struct.pack("<Q", _HUGE) + data[8:], "header"),
        ("header beyond the file", lambda data: struct.pack("<Q", len(data)) + data[8:], "header"),
        ("header of 0 bytes", lambda data: bytes(8) + data[8:], "not JSON"),
        ("a list", lambda data: struct.pack("<Q", 2) + b"[]", "must be a JSON object"),
        ("deep", lambda data: struct.pack("<Q", len(deep)) + deep, "nested deeper|not JSON"),
        ("dtype", _put(name, "dtype", "X"), f"{name}: dtype"),
        ("no dtype", _put(name, "dtype", None), f"{name}: dtype"),
        ("another dtype", _put(name, "dtype", "F64"), f"{name}: data_offsets"),
        ("shape a word", _put(name, "shape", "x"), f"{name}: shape"),
        ("shape below 0", _put(name, "shape", [-1, 8]), f"{name}: shape"),
        ("shape of 2^62", _put(name, "shape", [_HUGE]), f"{name}: shape"),
        ("shape whose product wraps", _put(name, "shape", [1 << 32, 1 << 32, 8]), f"{name}: data_offsets"),
        ("shape of floats", _put(name, "shape", [8.0, 8.0]), f"{name}: shape"),
        ("shape of booleans", _put(name, "shape", [True, 64]), f"{name}: shape"),
        ("shape of 10,000 sizes", _put(name, "shape", [1] * 10_000), f"{name}: shape"),
        ("a larger shape", _put(name, "shape", [8, 9]), f"{name}: data_offsets"),
        ("offsets a number", _put(name, "data_offsets", 3), f"{name}: data_offsets"),
        ("offsets below 0", _put(name, "data_offsets", [-256, 0]), f"{name}: data_offsets"),
        ("offsets backwards", _put(name, "data_offsets", [256, 0]), f"{name}: data_offsets"),
        ("offsets beyond the end", _put(name, "data_offsets", [1 << 40, (1 << 40) + 256]), f"{name}: offsets"),
        ("offsets of another", _put("a.g_idx", "data_offsets", [0, 256]), "overlaps"),
        ("no object", _header(lambda header: header.update({name: 3})), f"{name}: must be an object"),
        ("name twice", _exchanged(b'"b.weight"', b'"a.g_idx" '), "is there twice"),
        ("metadata of numbers", _put("__metadata__", "format", 3), "__metadata__"),
        ("metadata a list", _header(lambda header: header.update({"__metadata__": []})), "__metadata__"),
        ("a pickle", lambda data: b"\x80\x04\x95" + data, "header"),
    ):
        yield _case("safetensors", what, change, pattern)
    row = _BY_NAME["safetensors"]
    yield HostileFile("a link to a device", row, partial(_link, "/dev/zero"), "regular file|outside|link")
    yield HostileFile("a link to /etc/passwd", row, partial(_link, "/etc/passwd"), "link")
    yield HostileFile("a link to itself", row, partial(_link, row.file), "cannot be opened|link")


def _recipes() -> Iterator[HostileFile]:
    for what, text, pattern in (
        ("empty", "", "is empty"),
        ("an object of Python", "!!python/object/apply:os.system ['x']", "tag|could not determine"),
        ("an alias", "a: &a [1]\nb: *a", "aliases are not allowed"),
        ("a bomb of aliases", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases are not allowed"),
        ("deep", "a: " + "[" * 1000, "nested more than"),
        ("a key twice", "seed: 1\nseed: 2", "duplicate"),
        ("a complex key", "? [a, b]\n: 1", "key must be a scalar"),
        ("2 MB", "#" * (2 << 20), "at most"),
        ("many values", "stages:\n" + "  - a\n" * 100_000, "more than 16384 values"),
        ("not UTF-8", "\udcff", "utf-8|UTF-8"),
        ("a pass that is none", "schema: nybble.recipe/1\nstages:\n  - pass: os.system\n", "pass"),
        ("two documents", "a: 1\n---\nb: 2", "another document|expected"),
        ("a long text", f"schema: nybble.recipe/1\nstages:\n- pass: {'x' * 9000}", "stages.0..pass"),
        ("a merge", "a: 1\n<<: {b: 2}", "tag|<<|unknown|schema|stages"),
        ("binary", "a: !!binary AAAA", "tag"),
        ("a set", "a: !!set {x}", "tag"),
    ):
        yield _case(
            "recipe-yaml", what, partial(lambda text, data: text.encode("utf-8", "surrogateescape"), text), pattern
        )
    for what, text, pattern in (
        ("empty", "", "a value is missing"),
        ("deep", "[" * 100_000, "nested more than"),
        ("a key twice", '{"seed": 1, "seed": 2}', "duplicate"),
        ("text after it", "{} {}", "unexpected text"),
        ("cut off", '{"seed": ', "a value is missing"),
        ("many values", "[" + "1," * 400_000 + "1]", "more than 16384 values"),
        ("2 MB", " " * (2 << 20), "at most"),
    ):
        yield _case("recipe-json", what, partial(lambda text, data: text.encode(), text), pattern)


def _programs() -> Iterator[HostileFile]:
    """Files of torch.save whose program would run something; their archive is written anew."""
    for what, old, new, pattern in (
        (
            "calls os.system",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"cposix\nsystem\n",
            "posix.system: is not plain data",
        ),
        ("calls eval", b"ctorch._utils\n_rebuild_tensor_v2\n", b"c__builtin__\neval\n", "is not plain data"),
        ("imports by dots", b"ctorch\nFloatStorage\n", b"ctorch\nserialization.load\n", "is not plain data"),
        ("another protocol", b"\x80\x02", b"\x80\x05", "protocol"),
        ("a size of 2^31", b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86", "beyond the end|strides"),
        ("a size below 0", b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "a tensor of no storage"),
        ("storage of another size", b"K\x06tQ", b"K\x07tQ", "bytes, must have"),
        ("storage that is missing", b"X\x01\x00\x00\x000X", b"X\x01\x00\x00\x001X", "are missing"),
        ("an operation of objects", b")RtRs.", b")\x81tRs.", "makes no plain data"),
        ("no end", b")RtRs.", b")RtRs", "cut off"),
    ):
        yield _case("torch", what, partial(_program, old, new), pattern)
    for what, change, pattern in (
        ("no archive", lambda data: b"\x80\x02" + data[:100], "zip archive"),
        ("cut off", lambda data: data[: len(data) // 2], "zip archive"),
        ("text", lambda data: b"x" * 100, "zip archive"),
    ):
        yield _case("torch", what, change, pattern)


def _program(old: bytes, new: bytes, data: bytes) -> bytes:
    return torch_file(_exchanged(old, new)(PROGRAM))


def _configs() -> Iterator[HostileFile]:
    for what, text, pattern in (
        ("empty", b"", "not empty"),
        ("a list", b"[]", "must be a JSON object"),
        ("deep", b"[" * 100_000, "nested deeper|not JSON"),
        ("a key twice", b'{"a": 1, "a": 2}', "is there twice"),
        (
            "40,000 keys, one twice",
            b"{%s}" % b",".join(b'"%d": 1' % (i % 39_999) for i in range(40_000)),
            "is there twice",
        ),
        ("a number of 10,000 digits", b'{"a": %s}' % (b"9" * 10_000), "not JSON|too large"),
        ("not UTF-8", b'{"a": "\xff"}', "not JSON|not UTF-8"),
    ):
        yield _case("config", what, partial(lambda text, data: text, text), pattern)


def _graphs() -> Iterator[HostileFile]:
    for what, change, pattern in (
        ("empty", lambda data: b"", "not empty"),
        ("text", lambda data: b"x" * 100, "not an ONNX model|no node"),
        ("cut off", lambda data: data[: len(data) // 2], "not an ONNX model|no node|is missing"),
        ("another node", _exchanged(b"MatMulNBits", b"MatMulNBitt"), "no node MatMulNBits"),
        ("another weight", _exchanged(b"a.weight_Q4", b"a.weight_Q5"), "is missing"),
    ):
        yield _case("onnx", what, change, pattern)


CASES: tuple[HostileFile, ...] = (
    *_gguf(),
    *_safetensors(),
    *_recipes(),
    *_programs(),
    *_configs(),
    *_graphs(),
)


def usable() -> list[HostileFile]:
    """Those whose packages are there."""
    return [case for case in CASES if not case.reader.needs or find_spec(case.reader.needs)]
