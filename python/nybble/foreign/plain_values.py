"""The values that torch.save wrote, without running anything: only plain data is understood.

A file of torch.save is a program for a machine with a stack, which may call any function that it names. Here nothing is
imported and nothing is called: the operations below build dicts, lists, strings and numbers, four names that such files need
stand for plain data, and names of dtypes stay names. Any other operation or name is refused.

The operations are those of the protocols 2 to 4 of Python's pickletools, which documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ..checkpoint.files import CheckpointError

_MARK = object()
_DIMENSIONS = 8
_LONGEST = 512  # characters of a name


class Name(NamedTuple):
    """What a file calls something of a module, such as ``torch float16``."""

    module: str
    name: str


class Storage(NamedTuple):
    """The numbers of a tensor: the file of the archive that has them, what torch calls their kind, and how many they are."""

    key: str
    kind: str
    size: int


class Stored(NamedTuple):
    """A tensor: numbers of a storage from ``first`` on."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(arguments: Any) -> Stored:
    storage, first, shape, strides = arguments[:4]
    whole = all(_whole(value) for value in (first, *shape, *strides))
    if not isinstance(storage, Storage) or not whole or len(shape) > _DIMENSIONS:
        raise ValueError("a tensor of no storage")
    return Stored(storage, first, tuple(shape), tuple(strides))


def _parameter(arguments: Any) -> Stored:
    if not isinstance(arguments[0], Stored):
        raise ValueError("a parameter of no tensor")  # noqa: TRY004 as all that is refused
    return arguments[0]


def _size(arguments: Any) -> tuple[int, ...]:
    (shape,) = arguments
    if not all(_whole(value) for value in shape) or len(shape) > _DIMENSIONS:
        raise ValueError("a shape of other than numbers")
    return tuple(shape)


def _ordered(arguments: Any) -> dict[Any, Any]:
    if arguments != ():
        raise ValueError("an OrderedDict with arguments")
    return {}


# What files of torch.save call, and what stands for it here.
_PLAIN: dict[Name, Callable[[Any], Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch", "Size"): _size,
    Name("collections", "OrderedDict"): _ordered,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_KNOWN = {*_PLAIN, *(Name("torch", name) for name in (*_DTYPES, *STORAGES))}


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def plain_values(data: bytes, where: str) -> Any:
    """The value that a program of torch.save makes: dict, list, tuple, str, int, float, bool, None, Stored or Name.

    Raises CheckpointError for one that is damaged, or does anything but make plain data.
    """
    reader = _Machine(data)
    try:
        return reader.run()
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise CheckpointError(f"{where}: byte {reader.at}: {error}") from error


class _Machine:
    """The stack, what was set aside by number, and how far the program was read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.aside: dict[int, Any] = {}

    def run(self) -> Any:
        """Raises ValueError, TypeError, LookupError or struct.error for a program that is refused."""
        while True:
            code = self.take(1)
            if code == b".":
                (result,) = self.stack
                return result
            if code not in _OPERATIONS:
                raise ValueError(f"operation {code!r} makes no plain data")
            _OPERATIONS[code](self)

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise ValueError("the values are cut off")
        self.at += count
        return found

    def number(self, form: str) -> Any:
        """The next number, in a form of struct."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """The next line."""
        end = self.data.index(b"\n", self.at)
        found = self.take(end - self.at).decode()
        self.at += 1
        return found

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the last value from the stack."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is no value")
        return value

    def since_mark(self) -> list[Any]:
        """All values that were put on the stack after the last mark."""
        found = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def set(self, pairs: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError("keys and values of no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str) or len(key) > _LONGEST:
                raise ValueError(f"a key is {type(key).__name__}: must be a string of at most {_LONGEST} characters")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        """Put values into the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("values of no list")
        target.extend(values)

    def name(self, module: str, name: str) -> None:
        """Put a name on the stack, if it stands for plain data."""
        found = Name(module, name)
        if found not in _KNOWN:
            told = f"{module}.{name}"[:_LONGEST]
            raise ValueError(f"{told}: is not plain data; nybble runs nothing that a file names")
        self.push(found)

    def call(self) -> None:
        """Put on the stack what stands for the result of a call."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or name not in _PLAIN or not isinstance(arguments, tuple):
            raise ValueError("a call of no function that makes plain data")
        self.push(_PLAIN[name](arguments))

    def storage(self) -> None:
        """Put on the stack the numbers that a tensor has."""
        mark, kind, key, _, count = self.pop()
        known = isinstance(kind, Name) and kind.module == "torch" and kind.name in STORAGES
        if mark != "storage" or not known or not isinstance(key, str) or not _whole(count):
            raise ValueError("numbers of an unknown kind")
        self.push(Storage(key, kind.name, count))

    def build(self) -> None:
        """What an OrderedDict has besides its items (the versions of a state_dict) is left out."""
        self.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError("only dicts have a state")


def _many(machine: _Machine, count: int) -> tuple[Any, ...]:
    return tuple(machine.pop() for _ in range(count))[::-1]


def _protocol(machine: _Machine) -> None:
    if not 2 <= machine.number("<B") <= 4:
        raise ValueError("a protocol other than 2 to 4")


def _text(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(form)).decode())


def _get(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.aside[machine.number(form)])


def _put(form: str) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        machine.aside[machine.number(form)] = machine.stack[-1]

    return put


def _memoize(machine: _Machine) -> None:
    machine.aside[len(machine.aside)] = machine.stack[-1]


def _named(machine: _Machine) -> None:
    module, name = _many(machine, 2)
    machine.name(str(module), str(name))


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.number("<Q"),  # the length of a frame, which nothing needs
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": _text("<I"),
    b"\x8c": _text("<B"),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.push(_many(m, 1)),
    b"\x86": lambda m: m.push(_many(m, 2)),
    b"\x87": lambda m: m.push(_many(m, 3)),
    b"s": lambda m: m.set(list(_many(m, 2))),
    b"u": lambda m: m.set(m.since_mark()),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"h": _get("<B"),
    b"j": _get("<I"),
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"\x94": _memoize,
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": _named,
    b"R": lambda m: m.call(),
    b"Q": lambda m: m.storage(),
    b"b": lambda m: m.build(),
}
