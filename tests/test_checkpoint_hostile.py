"""nybble.load of damaged, forged and hostile files: a CheckpointError that names what is wrong, and an untouched model."""

from __future__ import annotations

import json
import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.checkpoint import files as checkpoint_files

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

SCHEME = "w4a16g32asym"


def dense(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(41, 8), nn.LayerNorm(8), nn.Linear(41, 8, bias=False), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = dense(0)
    nybble.quantize(model, SCHEME, goal="memory", exclude="3")
    nybble.save(model, tmp_path)
    return tmp_path


def weights(directory: Path) -> Path:
    return next(directory.glob("model-*.safetensors"))


def refused(directory: Path, pattern: str | None = None) -> str:
    """The message of the refusal, after checking that it is quick and that the model is as it was."""
    model = dense()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, parameters = list(model.modules()), list(model.parameters())
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=pattern) as caught:
        nybble.load(model, directory)
    assert time.perf_counter() - start < 1
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "nybble.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def forge(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and make sizes, names and checksums fit again, as an attacker would."""
    path = weights(directory)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = {name: [8 + size + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    spans = dict(sorted(spans.items(), key=lambda item: item[1]))
    content = checkpoint_files.digest(path, {})
    path.rename(directory / content.file_name)

    def update(index: dict[str, Any]) -> None:
        index["weights"] = {"file": content.file_name, "bytes": content.nbytes, "sha256": content.sha256}
        index["tensors"] = {name: [b, e, zlib.crc32(data[b:e])] for name, (b, e) in spans.items()}

    edit(directory, update)


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """put("a", 0, "b", value): set a[0].b to value."""

    def change(data: Any) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], object]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def test_the_fixture_loads(saved: Path) -> None:
    model = nybble.load(dense(), saved)
    assert model[0].packed.data_ptr() == model[2].packed.data_ptr()
    forge(saved, lambda tensors: tensors["1.bias"].fill_(3))
    assert nybble.load(dense(), saved)[1].bias.tolist() == [3.0] * 8


def test_every_truncation_of_the_weights_names_the_tensors(saved: Path) -> None:
    path = weights(saved)
    data = path.read_bytes()
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        assert "truncated tensors: " in refused(saved)
    path.write_bytes(data[:-1])
    last = list(json.loads((saved / "nybble.json").read_text())["tensors"])[-1]
    assert f"truncated tensors: {last}" in refused(saved)
    path.write_bytes(data + b"\0")
    refused(saved, "bytes instead of")


def test_every_truncation_of_the_index(saved: Path) -> None:
    path = saved / "nybble.json"
    data = path.read_bytes()
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        refused(saved, r"nybble\.json")


def test_bit_flips_in_the_weights_name_the_tensor(saved: Path) -> None:
    path = weights(saved)
    data = path.read_bytes()
    spans = json.loads((saved / "nybble.json").read_text())["tensors"]
    rng = random.Random(0)  # noqa: S311
    for _ in range(300):
        position = rng.randrange(len(data))
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        inside = [name for name, (begin, end, _) in spans.items() if begin <= position < end]
        assert refused(saved).endswith(f"damaged tensors: {inside[0] if inside else 'none'}")


def test_bit_flips_in_the_index_are_refused_or_harmless(saved: Path) -> None:
    path = saved / "nybble.json"
    data = path.read_bytes()
    good = nybble.load(dense(), saved).state_dict()
    rng = random.Random(1)  # noqa: S311
    refusals = 0
    for _ in range(300):
        position = rng.randrange(len(data))
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        model = dense()
        before = model.state_dict()
        try:
            nybble.load(model, saved)
        except CheckpointError:
            refusals += 1
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        else:
            assert all(torch.equal(good[name], tensor) for name, tensor in model.state_dict().items())
    assert refusals > 200


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

INDEX_CASES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
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


@pytest.mark.parametrize("case", range(len(INDEX_CASES)))
def test_hostile_index(saved: Path, case: int) -> None:
    change, pattern = INDEX_CASES[case]
    edit(saved, change)
    refused(saved, pattern)


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


@pytest.mark.parametrize("case", RAW_CASES)
def test_hostile_bytes_of_the_index(saved: Path, case: str) -> None:
    change, pattern = RAW_CASES[case]
    path = saved / "nybble.json"
    path.write_bytes(change(path.read_bytes()))
    refused(saved, pattern)


def halve(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


FORGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
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


@pytest.mark.parametrize("case", FORGED)
def test_forged_tensors_with_valid_checksums(saved: Path, case: str) -> None:
    change, pattern = FORGED[case]
    forge(saved, change)
    refused(saved, pattern)


def test_headers_that_lie_with_valid_checksums(saved: Path) -> None:
    path = weights(saved)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    lies = {
        "huge header": (1 << 62).to_bytes(8, "little") + data[8:],
        "zero header": bytes(8) + data[8:],
        "unknown dtype": data.replace(b'"U8"', b'"X8"', 1),
        "huge shape": data.replace(b'"shape":[8]', b'"shape":[9]', 1),
        "not JSON": data[:8] + b"[" + header[1:] + data[8 + size :],
        "no content": b"",
        "a pickle": b"\x80\x04" + data[2:],
    }
    for name, forged in lies.items():
        for old in saved.glob("model-*"):
            old.unlink()
        path.write_bytes(forged)
        content = checkpoint_files.digest(path, {})
        path.rename(saved / content.file_name)

        def update(index: dict[str, Any], content: checkpoint_files.Digest = content) -> None:
            index["weights"] = {"file": content.file_name, "bytes": content.nbytes, "sha256": content.sha256}

        edit(saved, update)
        assert refused(saved, "safetensors|weights.bytes|truncated|end is"), name


class TestPlaces:
    def test_nothing_there(self, tmp_path: Path) -> None:
        refused(tmp_path / "missing", "no such directory")
        refused(tmp_path, r"nybble\.json")
        (tmp_path / "file").write_text("x")
        refused(tmp_path / "file", "no such directory")

    def test_weights_missing(self, saved: Path) -> None:
        weights(saved).unlink()
        refused(saved, r"model-.*No such file")

    @pytest.mark.parametrize("which", ["index", "weights"])
    def test_symbolic_links_are_not_followed(
        self, saved: Path, tmp_path_factory: pytest.TempPathFactory, which: str
    ) -> None:
        path = saved / "nybble.json" if which == "index" else weights(saved)
        outside = tmp_path_factory.mktemp("outside") / path.name
        path.rename(outside)
        path.symlink_to(outside)
        refused(saved, path.name)

    @pytest.mark.parametrize("which", ["index", "weights"])
    def test_pipes_and_directories_do_not_hang(self, saved: Path, which: str) -> None:
        path = saved / "nybble.json" if which == "index" else weights(saved)
        path.unlink()
        os.mkfifo(path)
        refused(saved, f"{path.name}: not a regular file")
        path.unlink()
        path.mkdir()
        refused(saved, f"{path.name}: not a regular file")

    def test_a_linked_directory_is_fine(self, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        link = tmp_path_factory.mktemp("links") / "link"
        link.symlink_to(saved)
        assert isinstance(nybble.load(dense(), link)[0], nybble.nn.Linear)
