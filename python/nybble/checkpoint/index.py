"""``nybble.json``: the index of a checkpoint, and a reader that checks every field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..nn.kinds import quantized_classes
from ..weights.form import Form
from ..weights.scheme import Scheme
from .files import INDEX, WEIGHTS_NAME, CheckpointError
from .strict_json import parse, short

SCHEMA = "nybble.checkpoint"
VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")

_MAX_DEPTH = 8
_MAX_SIZE = (1 << 31) - 1
_MAX_BYTES = 1 << 50
_MAX_NAME = 4096


@dataclass(frozen=True)
class LayerEntry:
    """A quantized layer: what is needed to make it without its tensors.

    ``kind`` is the name of its class, see ``nn.kinds``. ``dtype`` is that of its bias and activations. ``stored`` is
    the number of values or blocks that a sparse weight stores, 0 for a dense one. ``tied_to`` is the name of another
    layer with the same weight, or None. The first layer that multiplies with the weight has it, or else the first one.
    ``form`` is that of the weight's tensors, see ``weights.form``; the file has it only if it is not the usual one.
    """

    name: str
    kind: str
    scheme: str
    in_features: int
    out_features: int
    bias: bool
    dtype: str
    stored: int
    tied_to: str | None
    form: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry as it is in the file."""
        entry = asdict(self)
        if not self.form:
            del entry["form"]
        return entry


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's bytes [begin, end) in the weights file, and their crc32, which finds the damaged tensor."""

    begin: int
    end: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """The whole index.

    ``aliases`` maps the name of a tensor to the name under which it is stored. ``fused``: the names of the modules that
    ran fused when the model was saved; loading lets them run fused again; ``fused_int8``: those of them that attend in 8 bits. The
    file has either only if there are any.
    """

    nybble: str
    file: str
    nbytes: int
    sha256: str
    layers: tuple[LayerEntry, ...]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    fused: tuple[str, ...] = ()
    fused_int8: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The content of the file."""
        weights = {"file": self.file, "bytes": self.nbytes, "sha256": self.sha256}
        data = {
            "schema": SCHEMA,
            "version": VERSION,
            "nybble": self.nybble,
            "weights": weights,
            "layers": [layer.to_json() for layer in self.layers],
            "tensors": {name: [entry.begin, entry.end, entry.crc32] for name, entry in self.tensors.items()},
            "aliases": self.aliases,
            **({"fused": list(self.fused)} if self.fused else {}),
            **({"fused_int8": list(self.fused_int8)} if self.fused_int8 else {}),
        }
        return json.dumps(data, indent=1).encode()


def parse_index(data: bytes) -> Index:
    """Read an index and check every field. Raises CheckpointError with the name of the field."""
    top = _object("the index", parse(data, INDEX, _MAX_DEPTH, integers_only=True))
    if top.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{INDEX}: schema is {short(top.get('schema'))}, must be {SCHEMA!r}; not a nybble checkpoint"
        )
    version = _integer("version", top.get("version"), 1, _MAX_SIZE)
    if version != VERSION:
        raise CheckpointError(f"{INDEX}: version is {version}, this nybble reads version {VERSION}; update nybble")
    fused, fused_int8 = (_names(key, top.pop(key, [])) for key in ("fused", "fused_int8"))
    if unknown := set(fused_int8) - set(fused):
        raise CheckpointError(f"{INDEX}: fused_int8 has {short(min(unknown))}, which fused does not have")
    _keys("the index", top, ("schema", "version", "nybble", "weights", "layers", "tensors", "aliases"))
    weights = _object("weights", top["weights"])
    _keys("weights", weights, ("file", "bytes", "sha256"))
    layers = top["layers"]
    if not isinstance(layers, list):
        raise CheckpointError(f"{INDEX}: layers is {short(layers)}, must be a list")
    nbytes = _integer("weights.bytes", weights["bytes"], 8, _MAX_BYTES)
    return Index(
        nybble=_string("nybble", top["nybble"]),
        file=_pattern("weights.file", weights["file"], WEIGHTS_NAME),
        nbytes=nbytes,
        sha256=_pattern("weights.sha256", weights["sha256"], re.compile("[0-9a-f]{64}")),
        layers=_layers(layers),
        tensors=_tensors(_object("tensors", top["tensors"]), nbytes),
        aliases={
            _string("aliases", name): _string(f"aliases[{name!r}]", target)
            for name, target in _object("aliases", top["aliases"]).items()
        },
        fused=fused,
        fused_int8=fused_int8,
    )


def _names(key: str, names: object) -> tuple[str, ...]:
    """The names of modules; the model itself has none."""
    if not isinstance(names, list):
        raise CheckpointError(f"{INDEX}: {key} is {short(names)}, must be a list")
    return tuple("" if name == "" else _string(f"{key}[{i}]", name) for i, name in enumerate(names))


def _layers(values: list[Any]) -> tuple[LayerEntry, ...]:
    entries: dict[str, LayerEntry] = {}
    for i, value in enumerate(values):
        entry = _layer(f"layers[{i}]", _object(f"layers[{i}]", value))
        if entry.name in entries:
            raise CheckpointError(f"{INDEX}: layers[{i}].name: {short(entry.name)} is there twice")
        entries[entry.name] = entry
    for i, entry in enumerate(entries.values()):
        if entry.tied_to is not None:
            _check_tie(f"layers[{i}].tied_to", entry, entries.get(entry.tied_to))
    return tuple(entries.values())


def _layer(where: str, value: dict[str, Any]) -> LayerEntry:
    form = value.pop("form", "")
    _keys(where, value, tuple(field.name for field in fields(LayerEntry) if field.name != "form"))
    scheme = _string(f"{where}.scheme", value["scheme"])
    try:
        sparse = Scheme.parse(scheme).sparsity is not None
        Form.parse(form if form == "" else _string(f"{where}.form", form))
    except ValueError as error:
        raise CheckpointError(f"{INDEX}: {where}.{error}") from error
    classes = quantized_classes()
    kind = _choice(f"{where}.kind", value["kind"], tuple(classes))
    if classes[kind].is_sparse is not sparse:
        raise CheckpointError(f"{INDEX}: {where}.kind: a {kind} cannot have the scheme {short(scheme)}")
    return LayerEntry(
        name=_string(f"{where}.name", value["name"]),
        kind=kind,
        scheme=scheme,
        in_features=_integer(f"{where}.in_features", value["in_features"], 1, _MAX_SIZE),
        out_features=_integer(f"{where}.out_features", value["out_features"], 1, _MAX_SIZE),
        bias=_boolean(f"{where}.bias", value["bias"]),
        dtype=_choice(f"{where}.dtype", value["dtype"], DTYPES),
        stored=_integer(f"{where}.stored", value["stored"], 0, 1 << 40),
        tied_to=None if value["tied_to"] is None else _string(f"{where}.tied_to", value["tied_to"]),
        form=form,
    )


def _check_tie(where: str, entry: LayerEntry, first: LayerEntry | None) -> None:
    if first is None or first.tied_to is not None:
        raise CheckpointError(f"{INDEX}: {where} is {short(entry.tied_to)}, must be a layer with its own weight")
    for field in ("in_features", "out_features", "stored", "form"):
        if getattr(entry, field) != getattr(first, field):
            raise CheckpointError(f"{INDEX}: {where}: {field} differs from that of {short(first.name)}")
    if not Scheme.parse(entry.scheme).shares_codes_of(Scheme.parse(first.scheme)):
        raise CheckpointError(f"{INDEX}: {where}: scheme differs from that of {short(first.name)}")


def _tensors(values: dict[str, Any], nbytes: int) -> dict[str, TensorEntry]:
    entries = {}
    position = 0
    for name, value in values.items():
        where = f"tensors[{short(_string('tensors', name))}]"
        if not isinstance(value, list) or len(value) != 3:
            raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be [begin, end, crc32]")
        begin = _integer(f"{where}.begin", value[0], position, nbytes)
        end = _integer(f"{where}.end", value[1], begin, nbytes)
        entries[name] = TensorEntry(begin, end, _integer(f"{where}.crc32", value[2], 0, (1 << 32) - 1))
        position = end
    return entries


def _keys(where: str, value: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in value]
    extra = [name for name in value if name not in names]
    if missing or extra:
        raise CheckpointError(f"{INDEX}: {where}: missing keys {short(missing)}, unknown keys {short(extra)}")


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be an object")
    return value


def _integer(where: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be an integer in {low}..{high}")
    return value


def _boolean(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be true or false")
    return value


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_NAME:
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be a string of 1..{_MAX_NAME} characters")
    return value


def _choice(where: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must be one of {', '.join(choices)}")
    return value


def _pattern(where: str, value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise CheckpointError(f"{INDEX}: {where} is {short(value)}, must match {pattern.pattern}")
    return value
