"""Read and write recipe files, YAML or JSON, with the line number of every field for error messages."""

from __future__ import annotations

import json
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoint.files import cut, file_at_once
from .schema import Field, FieldError, Plain

_MOST_BYTES = 1 << 20
_MOST_DEPTH = 8
_MOST_VALUES = 1 << 14
_YAML_KINDS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")
}
_JSON_SPACE = " \t\r\n"

Lines = dict[Field, int]


def read(path: Path) -> tuple[Any, Lines]:
    """The value in a file, with unquoted scalars as ``Plain``, and the line of every field.

    Raises:
        ValueError: the file name does not end in .yaml, .yml or .json; or the file is too large, nested too deeply, not
            UTF-8, or has a syntax error.
        OSError: the file cannot be read.
        ImportError: it is YAML, and PyYAML is not installed.
    """
    parse = _form(path)[0]
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe or a device may have no end
            raise ValueError(f"{path}: must be a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(_MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path}: must have at most {_MOST_BYTES} bytes")
    lines: Lines = {}
    try:
        return parse(data.decode("utf-8-sig"), lines), lines
    except (_Grammar, UnicodeDecodeError) as error:
        raise ValueError(cut(f"{path}: {error}")) from error


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a value atomically, in the format given by the file name. Raises as ``read`` does."""
    text = _form(path)[1](value)
    with file_at_once(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def located(path: Path, error: FieldError, lines: Lines) -> str:
    """The message of an error with the line of its field or, if that is missing, of the field that should hold it."""
    field = error.field
    while field not in lines:
        field = field[:-1]
    return cut(f"{path}: line {lines[field]}: {error}")


class _Grammar(ValueError):
    """The text has a syntax error, or uses something that recipes do not allow."""


def _form(path: Path) -> tuple[Callable[[str, Lines], Any], Callable[[Any], str]]:
    if path.suffix not in _FORMS:
        raise ValueError(f"{path}: must end in {', '.join(_FORMS)}")
    return _FORMS[path.suffix]


def _enter(field: Field, line: int, lines: Lines) -> None:
    if field in lines:
        raise _Grammar(f"line {line}: {field[-1]!r} is a duplicate, first given on line {lines[field]}")
    if len(field) > _MOST_DEPTH:
        raise _Grammar(f"line {line}: nested more than {_MOST_DEPTH} deep")
    if len(lines) == _MOST_VALUES:
        raise _Grammar(f"line {line}: more than {_MOST_VALUES} values")
    lines[field] = line


# --- JSON: the standard decoder reads scalars; _Json reads objects and lists and tracks line numbers


def _parse_json(text: str, lines: Lines) -> Any:
    walk = _Json(text, lines)
    value = walk.value(())
    if walk.at < len(text):
        walk.fail("unexpected text after the recipe")
    return value


class _Json:
    def __init__(self, text: str, lines: Lines) -> None:
        self.text, self.lines, self.at = text, lines, 0
        self._ends = [end.start() for end in re.finditer("\n", text)]
        self._scalar = json.JSONDecoder(parse_int=Plain, parse_float=Plain, parse_constant=Plain)
        self._space()

    def value(self, field: Field) -> Any:
        _enter(field, self._line(), self.lines)
        if self._skip("{"):
            return self._members(field)
        if self._skip("["):
            return self._items(field)
        return self._read_scalar()

    def fail(self, why: str) -> None:
        raise _Grammar(f"line {self._line()}: {why}")

    def _members(self, field: Field) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._skip("}"):
            if found and not self._skip(","):
                self.fail("',' or '}' is missing")
            key = self._read_scalar()
            if type(key) is not str:
                self.fail("a name in double quotes is missing")
            if not self._skip(":"):
                self.fail("':' is missing")
            found[key] = self.value((*field, key))
        return found

    def _items(self, field: Field) -> list[Any]:
        found: list[Any] = []
        while not self._skip("]"):
            if found and not self._skip(","):
                self.fail("',' or ']' is missing")
            found.append(self.value((*field, len(found))))
        return found

    def _read_scalar(self) -> Any:
        if self.text[self.at : self.at + 1] in ("{", "[", ""):
            self.fail("a value is missing")
        try:
            value, self.at = self._scalar.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise _Grammar(f"line {error.lineno}: {error.msg}") from error
        self._space()
        return value

    def _skip(self, character: str) -> bool:
        found = self.text.startswith(character, self.at)
        if found:
            self.at += 1
            self._space()
        return found

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in _JSON_SPACE:
            self.at += 1

    def _line(self) -> int:
        return bisect_left(self._ends, self.at) + 1


def _write_json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


# --- YAML: PyYAML's scanner and parser; _Yaml builds the value from their events, so no objects are constructed, and what is
# refused is refused before the rest is read


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("recipes in YAML need PyYAML: pip install 'nybble[recipe]'; JSON does not") from error
    module: ModuleType = yaml
    return module


def _parse_yaml(text: str, lines: Lines) -> Any:
    yaml = _yaml()
    try:
        return _Yaml(yaml, text, lines).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise _Grammar(f"{where}{getattr(error, 'problem', None) or str(error).splitlines()[0]}") from error


class _Yaml:
    def __init__(self, yaml: ModuleType, text: str, lines: Lines) -> None:
        self.yaml, self.lines = yaml, lines
        self._loader = yaml.SafeLoader(text)

    def document(self) -> Any:
        self._loader.get_event()  # the beginning of the stream
        if isinstance(self._loader.get_event(), self.yaml.StreamEndEvent):
            raise _Grammar("is empty")
        value = self._value((), self._loader.get_event())
        self._loader.get_event()  # the end of the document
        after = self._loader.get_event()
        if not isinstance(after, self.yaml.StreamEndEvent):
            raise _Grammar(f"line {after.start_mark.line + 1}: another document; a recipe is one")
        return value

    def _value(self, field: Field, event: Any) -> Any:
        line = event.start_mark.line + 1
        if isinstance(event, self.yaml.AliasEvent):
            raise _Grammar(f"line {line}: aliases are not allowed; quote '*{event.anchor}'")
        _enter(field, line, self.lines)
        if isinstance(event, self.yaml.ScalarEvent):
            self._check_tag(event, self.yaml.ScalarNode, event.value)
            return str(event.value) if event.style else Plain(event.value)
        if isinstance(event, self.yaml.SequenceStartEvent):
            self._check_tag(event, self.yaml.SequenceNode, None)
            return self._items(field)
        self._check_tag(event, self.yaml.MappingNode, None)
        return self._members(field)

    def _check_tag(self, event: Any, kind: Any, value: str | None) -> None:
        tag = event.tag
        if tag in (None, "!"):
            tag = self._loader.resolve(kind, value, event.implicit)
        if tag not in _YAML_KINDS:
            raise _Grammar(f"line {event.start_mark.line + 1}: the tag {tag} is not allowed")

    def _items(self, field: Field) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._loader.get_event(), self.yaml.SequenceEndEvent):
            found.append(self._value((*field, len(found)), event))
        return found

    def _members(self, field: Field) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._loader.get_event(), self.yaml.MappingEndEvent):
            if not isinstance(event, self.yaml.ScalarEvent):
                raise _Grammar(f"line {event.start_mark.line + 1}: a key must be a scalar")
            key = str(event.value)
            found[key] = self._value((*field, key), self._loader.get_event())
        return found


def _write_yaml(value: Any) -> str:
    return str(_yaml().safe_dump(value, sort_keys=False, allow_unicode=True, width=120))


_FORMS: dict[str, tuple[Callable[[str, Lines], Any], Callable[[Any], str]]] = {
    ".yaml": (_parse_yaml, _write_yaml),
    ".yml": (_parse_yaml, _write_yaml),
    ".json": (_parse_json, _write_json),
}
