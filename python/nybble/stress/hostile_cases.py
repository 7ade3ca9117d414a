"""Checkpoints of nybble that were damaged or forged by hand: what is done to each, and what the refusal must name.

Forged ones have sizes, names and checksums that fit, as an attacker would make them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.files import INDEX, digest

Edit = Callable[[dict[str, Any]], object]


class Hostile(NamedTuple):
    """A case: its name, what it does to a good checkpoint, and a pattern that the message of the refusal must match."""

    name: str
    change: Callable[[Path], None]
    pattern: str


def weights(directory: Path) -> Path:
    """The weights file of a checkpoint."""
    return next(directory.glob("model-*.safetensors"))


def edit(directory: Path, change: Edit) -> None:
    """Change what the index says."""
    path = directory / INDEX
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def forge(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors, and make all else fit again."""
    from safetensors.torch import load_file, save_file

    path = weights(directory)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = {name: [8 + size + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    spans = dict(sorted(spans.items(), key=lambda item: item[1]))
    content = digest(path, {})
    path.rename(directory / content.file_name)

    def update(index: dict[str, Any]) -> None:
        index["weights"] = {"file": content.file_name, "bytes": content.nbytes, "sha256": content.sha256}
        index["tensors"] = {name: [b, e, zlib.crc32(data[b:e])] for name, (b, e) in spans.items()}

    edit(directory, update)


def put(*path: Any) -> Edit:
    """put("a", 0, "b", value): set a[0].b to value."""

    def change(data: Any) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Edit:
    """drop("a", 0, "b"): remove a[0].b."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "model.bin",
    "..",
    "",
    "model-0123456789abcdef.safetensors/..",
    "m\0",
    7,
    None,
]
NUMBERS = [-1, 0, 1 << 31, 10**30, True, "8", None, [8]]

INDEX_CASES: list[tuple[Edit, str]] = [
    (put("schema", "gguf"), "schema"),
    (put("schema", None), "schema"),
    (drop("schema"), "schema"),
    (put("version", 2), "version is 2"),
    (put("version", "1"), "version"),
    (put("version", True), "version is True"),
    (put("nybble", 1), "nybble"),
    (put("more", 1), "unknown keys .*more"),
    (drop("layers"), "missing keys .*layers"),
    (put("layers", {}), "layers"),
    (put("layers", [3]), r"layers\[0\]"),
    (drop("layers", 0, "bias"), r"layers\[0\]: missing keys .*bias"),
    (put("layers", 0, "code", "x"), r"layers\[0\].*code"),
    (put("layers", 0, "name", ""), r"layers\[0\]\.name"),
    (put("layers", 0, "name", "x" * 5000), r"layers\[0\]\.name"),
    (put("layers", 1, "name", "0"), r"layers\[1\]\.name.*twice"),
    (put("layers", 0, "kind", "Conv9d"), r"layers\[0\]\.kind"),
    (put("layers", 0, "scheme", "w4a16g33"), r"layers\[0\].*w4a16g33"),
    (put("layers", 0, "scheme", "w8a8"), "scheme differs"),
    (put("layers", 0, "bias", 1), r"layers\[0\]\.bias"),
    (put("layers", 0, "bias", False), "0: .*bias"),
    (put("layers", 0, "dtype", "float64"), r"layers\[0\]\.dtype"),
    (put("layers", 0, "dtype", "float16"), "0: .*dtype"),
    (put("layers", 0, "tied_to", "0"), r"layers\[0\]\.tied_to"),
    (put("layers", 1, "tied_to", "none"), r"layers\[1\]\.tied_to"),
    (put("layers", 1, "tied_to", None), r"2\.qweight: must be stored"),
    (drop("layers", 1), "model lacks"),
    (put("layers", []), "model lacks"),
    (put("weights", "file"), "weights"),
    (drop("weights", "sha256"), "weights: missing keys .*sha256"),
    (put("weights", "sha256", "0" * 63), r"weights\.sha256"),
    (put("weights", "sha256", "0" * 64), "sha256"),
    (put("tensors", []), "tensors"),
    (put("tensors", "0.scale", [0, 1]), r"0\.scale.*begin, end"),
    (put("tensors", "0.scale", [5, 1, 0]), r"0\.scale"),
    (put("tensors", "0.scale", [0, 1 << 49, 0]), r"0\.scale"),
    (put("tensors", "0.scale", [0, 1, -1]), r"0\.scale.*"),
    (put("tensors", "0.extra", [2000, 2000, 0]), r"0\.extra"),
    (drop("tensors", "0.scale"), r"lacks 0\.scale"),
    (put("aliases", []), "aliases"),
    (put("aliases", "2.scale", 3), r"aliases.*2\.scale"),
    (put("aliases", "2.scale", "0.zero_point"), r"aliases.*2\.scale"),
    (put("aliases", "2.scale", "nowhere"), r"aliases.*2\.scale"),
    (put("aliases", "2.scale", "2.scale"), r"aliases.*2\.scale"),
    (put("aliases", "0.scale", "0.zero_point"), r"aliases.*0\.scale"),
    (put("aliases", "1.bias", "1.weight"), r"aliases.*1\.bias"),
    (put("aliases", "4.scale", "0.scale"), r"4\.scale"),
    (drop("aliases", "2.scale"), r"lacks 2\.scale"),
    *[(put("weights", "file", name), r"weights\.file") for name in NAMES],
    *[(put("weights", "bytes", number), r"bytes|too large|truncated") for number in NUMBERS],
    *[(put("layers", 0, "in_features", number), r"in_features|too large") for number in NUMBERS],
    *[(put("layers", 0, "out_features", number), r"out_features|too large") for number in NUMBERS],
]


RAW_CASES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not JSON"),
    "not UTF-8": (lambda data: b"\xff" + data, "UTF-8"),
    "a list": (lambda data: b"[]", "object"),
    "null": (lambda data: b"null", "object"),
    "two values": (lambda data: data + data, "not JSON"),
    "deep list": (lambda data: b"[" * 100_000, "nested deeper"),
    "deep object": (lambda data: b'{"a":' * 9 + b"1" + b"}" * 9, "nested deeper"),
    "brackets in a string": (lambda data: b'{"schema": "[[[[[[[[[["}', "schema"),
    "duplicate key": (lambda data: data.replace(b'"version"', b'"schema": "x", "version"', 1), "schema.* twice"),
    "duplicate tensor": (lambda data: data.replace(b'"0.scale"', b'"0.qweight"', 1), "qweight.* twice"),
    "duplicate field": (lambda data: data.replace(b'"in_features"', b'"out_features"', 1), "out_features.* twice"),
    "float": (lambda data: data.replace(b'"version": 1', b'"version": 1.0'), "integers"),
    "NaN": (lambda data: data.replace(b'"version": 1', b'"version": NaN'), "integers"),
    "infinity": (lambda data: data.replace(b'"version": 1', b'"version": -Infinity'), "integers"),
    "giant number": (lambda data: data.replace(b'"version": 1', b'"version": ' + b"9" * 100_000), "too large"),
    "too large": (lambda data: data + b" " * (2 << 20), "bytes, at most"),
    "many layers": (lambda data: b'{"schema":"nybble.checkpoint","version":1,"layers":[' + b"{}," * 99_999, "not JSON"),
    "a pickle": (lambda data: b"\x80\x04\x95\x0b", "UTF-8"),
}


def halve(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


FORGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing tensor": (lambda t: t.pop("1.bias"), r"lacks 1\.bias"),
    "missing codes": (lambda t: t.pop("0.qweight"), r"lacks 0\.qweight|0\.qweight.*"),
    "extra tensor": (lambda t: t.update({"evil": torch.zeros(1)}), "model lacks evil"),
    "extra dimension": (lambda t: t.update({"1.bias": torch.zeros(1, 8)}), r"1\.bias: .*\(1, 8\)"),
    "short tensor": (lambda t: t.update({"1.bias": torch.zeros(7)}), r"1\.bias: .*\(7,\)"),
    "empty tensor": (lambda t: t.update({"0.scale": torch.zeros(0, dtype=torch.bfloat16)}), r"0\.scale: .*\(0,\)"),
    "wrong dtype": (lambda t: halve(t, "1.weight"), r"1\.weight: .*float16"),
    "wrong dtype of codes": (lambda t: t.update({"0.qweight": t["0.qweight"].view(torch.int8)}), r"0\.qweight: .*int8"),
    "wrong dtype of scales": (lambda t: halve(t, "0.scale"), r"0\.scale: .*float16"),
    "transposed codes": (lambda t: t.update({"0.qweight": t["0.qweight"].t().contiguous()}), r"0\.qweight: "),
    "scale NaN": (lambda t: t["0.scale"][2, 1].fill_(float("nan")), r"0\.scale: .*finite"),
    "scale infinite": (lambda t: t["0.scale"][0, 0].fill_(float("inf")), r"0\.scale: .*finite"),
    "scale negative": (lambda t: t["0.scale"][7, 1].fill_(-1), r"0\.scale: .*negative"),
    "zero point 16": (lambda t: t["0.zero_point"][0, 1].fill_(16), r"0\.zero_point: "),
    "code beyond the end": (lambda t: t["0.qweight"][3, -1].fill_(0xF0), r"0\.qweight: "),
}


def _lies(data: bytes) -> dict[str, bytes]:
    """Weights files whose headers lie."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    return {
        "huge header": (1 << 62).to_bytes(8, "little") + data[8:],
        "zero header": bytes(8) + data[8:],
        "unknown dtype": data.replace(b'"U8"', b'"X8"', 1),
        "huge shape": data.replace(b'"shape":[8]', b'"shape":[9]', 1),
        "not JSON": data[:8] + b"[" + header[1:] + data[8 + size :],
        "no content": b"",
        "a pickle": b"\x80\x04" + data[2:],
    }


LIES = tuple(_lies(bytes(8)))


def _lie(name: str, directory: Path) -> None:
    path = weights(directory)
    path.write_bytes(_lies(path.read_bytes())[name])
    content = digest(path, {})
    path.rename(directory / content.file_name)
    told = {"file": content.file_name, "bytes": content.nbytes, "sha256": content.sha256}
    edit(directory, put("weights", told))


def _rewrite(change: Callable[[bytes], bytes], directory: Path) -> None:
    path = directory / INDEX
    path.write_bytes(change(path.read_bytes()))


def _cut(of: Callable[[Path], Path], percent: int, directory: Path) -> None:
    path = of(directory)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * percent // 100])


def index_of(directory: Path) -> Path:
    """The index of a checkpoint."""
    return directory / INDEX


def _gone(of: Callable[[Path], Path], directory: Path) -> None:
    of(directory).unlink()


def _link(of: Callable[[Path], Path], to: str, directory: Path) -> None:
    path = of(directory)
    aside = directory / f"{path.name}.aside"
    path.rename(aside)
    path.symlink_to(to or aside)


def _pipe(of: Callable[[Path], Path], directory: Path) -> None:
    path = of(directory)
    path.unlink()
    os.mkfifo(path)


def _folder(of: Callable[[Path], Path], directory: Path) -> None:
    path = of(directory)
    path.unlink()
    path.mkdir()


def _places() -> list[Hostile]:
    """What stands where a file should be; a link is refused wherever it leads."""
    found = []
    for what, of, name in (("index", index_of, r"nybble\.json"), ("weights", weights, "model-")):
        found += [
            Hostile(f"{what} gone", partial(_gone, of), f"{name}|holds no checkpoint"),
            Hostile(f"{what} a link", partial(_link, of, ""), name),
            Hostile(f"{what} a link to a device", partial(_link, of, "/dev/zero"), name),
            Hostile(f"{what} a link to itself", partial(_link, of, "nybble.json"), name),
            Hostile(f"{what} a pipe", partial(_pipe, of), f"{name}.*not a regular file"),
            Hostile(f"{what} a directory", partial(_folder, of), f"{name}.*not a regular file"),
        ]
    return found


_LIED = "safetensors|weights.bytes|truncated|end is"
CASES: tuple[Hostile, ...] = (
    *(Hostile(f"index {i}: {p}", lambda d, c=c: edit(d, c), p) for i, (c, p) in enumerate(INDEX_CASES)),  # type: ignore[misc]
    *(Hostile(f"index {name}", partial(_rewrite, change), pattern) for name, (change, pattern) in RAW_CASES.items()),
    *(Hostile(f"forged {n}", lambda d, c=c: forge(d, c), p) for n, (c, p) in FORGED.items()),  # type: ignore[misc]
    *(Hostile(f"header {name}", partial(_lie, name), _LIED) for name in LIES),
    *(Hostile(f"weights cut at {p} %", partial(_cut, weights, p), "truncated tensors: ") for p in range(0, 100, 5)),
    *(Hostile(f"index cut at {p} %", partial(_cut, index_of, p), r"nybble\.json") for p in range(0, 100, 5)),
    *_places(),
)
