"""nybble.load of damaged, forged and hostile files: a CheckpointError that names what is wrong, and an untouched model.

The cases are those of nybble.stress: python -m nybble.stress hostile.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

import nybble
from nybble.checkpoint import CheckpointError, strict_json
from nybble.stress import hostile_cases, hostile_files
from nybble.stress.hostile import dense, refusal, saved, try_case, try_file
from nybble.stress.hostile_cases import forge, weights

pytest.importorskip("safetensors")


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> Path:
    return saved(tmp_path)


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
        assert "truncated tensors: " in refusal(saved)
    path.write_bytes(data[:-1])
    last = list(json.loads((saved / "nybble.json").read_text())["tensors"])[-1]
    assert f"truncated tensors: {last}" in refusal(saved)
    path.write_bytes(data + b"\0")
    refusal(saved, "bytes instead of")


def test_every_truncation_of_the_index(saved: Path) -> None:
    path = saved / "nybble.json"
    data = path.read_bytes()
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        refusal(saved, r"nybble\.json")


def test_bit_flips_in_the_weights_name_the_tensor(saved: Path) -> None:
    path = weights(saved)
    data = path.read_bytes()
    spans = json.loads((saved / "nybble.json").read_text())["tensors"]
    rng = random.Random(0)  # noqa: S311
    for _ in range(300):
        position = rng.randrange(len(data))
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        inside = [name for name, (begin, end, _) in spans.items() if begin <= position < end]
        assert refusal(saved).endswith(f"damaged tensors: {inside[0] if inside else 'none'}")


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


@pytest.mark.parametrize("case", hostile_cases.CASES, ids=lambda case: case.name[:40])
def test_hostile_checkpoints(case: hostile_cases.Hostile) -> None:
    try_case(case)


@pytest.mark.parametrize("case", hostile_files.CASES, ids=lambda case: f"{case.reader.name} {case.name}")
def test_hostile_files(case: hostile_files.HostileFile) -> None:
    if case.reader.needs:
        pytest.importorskip(case.reader.needs)
    try_file(case)


def test_what_is_no_refusal_is_a_failure(saved: Path) -> None:
    with pytest.raises(RuntimeError, match="it is loaded"):
        refusal(saved)
    weights(saved).unlink()
    with pytest.raises(RuntimeError, match="names no zebra"):
        refusal(saved, "zebra")
    harmless = hostile_files.CASES[0]
    with pytest.raises(RuntimeError, match="it is read"):
        try_file(hostile_files.HostileFile("good", harmless.reader, lambda p: _write(p, harmless), ""))


def _write(path: Path, case: hostile_files.HostileFile) -> None:
    path.write_bytes(case.reader.sample())


class TestPlaces:
    def test_nothing_there(self, tmp_path: Path) -> None:
        refusal(tmp_path / "missing", "no such directory")
        refusal(tmp_path / ("n" * 300), "File name too long")
        refusal(tmp_path / "a\0b", "null byte")
        refusal(tmp_path, r"nybble\.json")
        (tmp_path / "file").write_text("x")
        refusal(tmp_path / "file", "no such directory")

    def test_a_linked_directory_is_fine(self, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        link = tmp_path_factory.mktemp("links") / "link"
        link.symlink_to(saved)
        assert isinstance(nybble.load(dense(), link)[0], nybble.nn.Linear)


def test_nesting_is_counted_outside_of_strings() -> None:
    for text, depth in (
        (b"1", 0),
        (b"[]", 1),
        (b'{"[[[": [{}, "]}", {"\\\\": []}]}', 4),
        (b'["\\"[", [[], {}], {"a": [1]}]', 3),
    ):
        assert strict_json.parse(text, "x", depth) == json.loads(text)
        if depth:
            with pytest.raises(CheckpointError, match=f"x: nested deeper than {depth - 1}"):
                strict_json.parse(text, "x", depth - 1)


def test_a_message_of_a_whole_file_is_cut() -> None:
    assert str(CheckpointError("short")) == "short"
    long = str(CheckpointError("begin" + "x" * 100_000 + "end"))
    assert re.fullmatch(r"beginx+ \[\.\.\.\] x+end", long)
    assert len(long) < 2000
