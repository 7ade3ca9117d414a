"""HQQ: its files of torch.save are read without running anything of them, and its weights are kept to their last bits."""

from __future__ import annotations

import collections
import io
import json
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign
from nybble.foreign.choose import choose
from nybble.foreign.plain_values import Name, Stored, plain_values
from nybble.foreign.torch_file import TorchFile

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "foreign"
SAVED, TENSORS = DATA / "hqq-w4-g16-saved", DATA / "hqq-w3-g32-tensors"


def values_of(data: bytes) -> Any:
    return plain_values(data, "here")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# --- plain values


def as_saved(value: Any, file: TorchFile) -> Any:
    """A value of the file as torch knows it, to be changed and saved again."""
    if isinstance(value, dict):
        return {key: as_saved(one, file) for key, one in value.items()}
    if isinstance(value, Stored):
        return file.tensor(value, "a tensor")
    return getattr(torch, value.name) if isinstance(value, Name) else value


def made_before() -> dict[str, Any]:
    file = TorchFile(SAVED / "qmodel.pt")
    made: dict[str, Any] = as_saved(file.values, file)
    return made


def saved(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_data_and_tensors_are_read(protocol: int, tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.int16)
    tensors = {
        "half": torch.randn(3, 4).half(),
        "bf": torch.randn(5).bfloat16(),
        "part": shared[4:10].reshape(2, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    plain = {"a": 1, "b": [1.5, -2, 70000, 1 << 40, True, None], "c": torch.Size([2, 3]), "d": torch.float16, "é": "ü"}
    state = nn.Linear(2, 3).state_dict()  # an OrderedDict with the versions of its modules
    path = tmp_path / "file.pt"
    torch.save({"plain": plain, **tensors, "state": state}, path, pickle_protocol=protocol)
    file = TorchFile(path)
    assert file.values["plain"] == plain | {"c": (2, 3), "d": Name("torch", "float16")}
    for name, tensor in tensors.items():
        read = file.tensor(file.values[name], name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    assert {name: file.tensor(value, name).shape for name, value in file.values["state"].items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


class Harmless:
    """Would print, if it was run."""

    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    "value",
    [
        Harmless(),
        {"fc": {"W_q": Harmless()}},
        [nn.Linear(2, 2)],
        {"a": np.float32(1)},
        collections.Counter("ab"),
        {1: 2},
        {"a": {1, 2}},
        b"bytes",
        complex(1, 2),
        torch.zeros(2, 2).to_sparse(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_and_not_run(value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(value, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt: data\.pkl: byte \d+: "):
        TorchFile(path)
    assert "must not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        (b"cbuiltins\nprint\n.", r"builtins\.print: is not plain data; nybble runs nothing"),
        (b"\x80\x04" + text("os") + text("getpid") + b"\x93.", r"os\.getpid: is not plain data"),
        (b"ctorch\nload\n.", r"torch\.load: is not plain data"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "byte"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "OrderedDict with arguments"),
        (b"(ibuiltins\nprint\n.", r"operation b'i' makes no plain data"),
        (b"(" + text("builtins") + b"o.", r"operation b'o'"),
        (b")\x81.", r"operation b'\\x81'"),
        (b"\x82\x01.", r"operation b'\\x82'"),
        (b"Pkey\n.", r"operation b'P'"),
        (b"S'a'\n.", r"operation b'S'"),
        (b"\x80\x05N.", "protocol other than 2 to 4"),
        (b"", "cut off"),
        (b"N", "cut off"),
        (b"K", "cut off"),
        (b"X\xff\xff\xff\xffa.", "cut off"),
        (b"X\x01\x00\x00\x00\xff.", "byte 6"),
        (b".", "byte 1"),
        (b"NN.", "byte 3"),
        (b"t.", "byte 1"),
        (b"h\x07.", "byte 2"),
        (b"NK\x01s.", "byte"),
        (b"(s.", "byte"),
        (b"(a.", "byte"),
        (b"}K\x01K\x02s.", "a key is int: must be a string"),
        (b"}" + text("k" * 513) + b"Ns.", "at most 512 characters"),
        (b"N}b.", "only dicts have a state"),
        (text("abcde") + b"Q.", "numbers of an unknown kind"),
        (b"c" + b"x" * 10000, "byte"),
        (b"c" + b"x" * 100000 + b"\ny\n.", "is not plain data"),
        (b"K\x01" * 3 + b"\x87)R.", "no function that makes plain data"),
    ],
    ids=str,
)
def test_programs_are_refused_with_the_place(program: bytes, rule: str) -> None:
    with pytest.raises(CheckpointError, match=rule) as caught:
        values_of(program)
    assert str(caught.value).startswith("here: byte ")
    assert len(str(caught.value)) < 800


def test_what_is_deep_wide_or_in_a_circle_ends_soon() -> None:
    started = time.monotonic()
    deep = values_of(b"N" + b"\x85" * 200_000 + b".")
    assert isinstance(deep, tuple)
    circle = values_of(b"}q\x00" + text("self") + b"h\x00s.")
    assert circle["self"] is circle
    twice = values_of(b"]q\x00" + b"h\x00\x86q\x00" * 200 + b".")  # 2 ** 200 lists, if it was unfolded
    assert len(twice) == 2
    assert time.monotonic() - started < 5


# --- the archive


def archive(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, data in files.items():
            made.writestr(name, data)
    return path


def stored(first: int, shape: str, strides: str, kind: str = "FloatStorage", count: int = 6) -> bytes:
    """A program for a tensor."""
    numbers = (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + bytes([75, count]) + b"tQ"
    )
    tuples = b"".join(b"(" + b"".join(bytes([75, int(n)]) for n in part) + b"t" for part in (shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + numbers + bytes([75, first]) + tuples + b"\x89}tR."


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        (stored(0, "23", "31"), None),
        (stored(3, "13", "31"), None),
        (stored(1, "23", "31"), "numbers 1 to 7 of 6: beyond the end"),
        (stored(0, "29", "91"), "beyond the end"),
        (stored(0, "23", "12"), r"strides \(1, 2\) of \(2, 3\): must be row by row"),
        (stored(0, "23", "00"), "must be row by row"),
        (stored(0, "23", "31", count=7), "data/0 has 24 bytes, must have 7 numbers of 4 bytes"),
        (stored(0, "23", "31", kind="HalfStorage"), "must have 6 numbers of 2 bytes"),
    ],
)
def test_a_tensor_must_be_within_its_numbers(program: bytes, rule: str | None, tmp_path: Path) -> None:
    numbers = torch.arange(6, dtype=torch.float32)
    path = archive(tmp_path / "file.pt", {"x/data.pkl": program, "x/data/0": numbers.numpy().tobytes()})
    file = TorchFile(path)
    assert isinstance(file.values, Stored)
    if rule is None:
        read = file.tensor(file.values, "name")
        assert torch.equal(read.flatten(), numbers[file.values.first :][: read.numel()])
        return
    with pytest.raises(CheckpointError, match=f"name: .*{rule}"):
        file.tensor(file.values, "name")


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ({"x/data": b"N."}, r"data\.pkl: is missing: not a file of torch\.save"),
        ({"data.pkl": b"N."}, "must be in one folder"),
        ({"x/data.pkl": b"N.", "y/data.pkl": b"N."}, "there once"),
        ({"x/data.pkl": b"N.", "x/byteorder": b"big"}, r"byteorder b'big': must be little"),
        ({"x/data.pkl": b"}" * (1 << 20) + b"N."}, "1048578 bytes: at most 1048576 are read in a file of this size"),
    ],
)
def test_an_archive_of_something_else_is_refused(files: dict[str, bytes], rule: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rule):
        TorchFile(archive(tmp_path / "file.pt", files))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "file.pt", {"x/data.pkl": b"N" * 1000 + b"."}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        TorchFile(path)


@pytest.mark.parametrize("data", [b"x", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(100), b"\x80\x02N."])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "qmodel.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"qmodel\.pt: "):
        open_foreign(tmp_path)


def test_files_of_an_archive_do_not_overlap(tmp_path: Path) -> None:
    path = archive(tmp_path / "file.pt", {"x/data.pkl": b"N.", "x/data/0": bytes(8), "x/data/1": bytes(8)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as made:
        first, second = (made.getinfo(f"x/data/{i}").header_offset for i in (0, 1))
    at = data.rindex(struct.pack("<I", second), data.index(b"PK\x01\x02"))
    data[at : at + 4] = struct.pack("<I", first)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"overlaps with data/0"):
        TorchFile(path)


# --- layers


@pytest.mark.parametrize("directory", [SAVED, TENSORS], ids=lambda path: path.name)
def test_codes_are_kept_and_all_but_last_bits(directory: Path) -> None:
    """HQQ rounds code - zero to float16, which no scheme does; its weights differ by that."""
    format, opened = open_foreign(directory)
    assert format.name == "hqq"
    weight = opened.layers["fc"].read()
    oracle = load_file(directory / "oracle.safetensors")["fc"]
    assert torch.equal(weight.dequantize(), oracle.float())
    chosen = choose(weight, 16)
    assert str(chosen.scheme) == "w4a16g16asym"
    assert chosen.why == "the library rounds twice in float16, so that last bits differ"
    assert chosen.sqnr_db > 70
    assert opened.parts["fc.bias"].read().shape == (24,)


def test_a_model_is_filled() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(80, 24), "norm": nn.LayerNorm(80, bias=False)})
    report = nybble.load_pretrained(SAVED, model=model).report
    layer: Any = model["fc"]
    oracle = load_file(SAVED / "oracle.safetensors")["fc"].float()
    assert (layer.dequantized_weight() - oracle).abs().max() < 1e-3 * oracle.abs().max()
    assert torch.equal(layer.bias, open_foreign(SAVED)[1].parts["fc.bias"].read().float())
    assert [row.exact for row in report.layers] == [False]


def test_settings_of_old_versions_are_in_a_dict_of_their_own(tmp_path: Path) -> None:
    made = made_before()
    layer = made["fc"]
    outside = {key: layer.pop(key) for key in ("W_q", "bias")}
    saved({"fc": {**outside, "meta": layer}}, tmp_path / "qmodel.pt")
    read = open_foreign(tmp_path)[1].layers["fc"].read()
    assert torch.equal(read.dequantize(), load_file(SAVED / "oracle.safetensors")["fc"].float())


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("axis", 2, r"fc\.axis 2: must be 0 or 1"),
        ("nbits", 5, r"fc\.nbits 5: must be 1 to 4 with 4bit_u8"),
        ("nbits", 3, r"fc\.W_q: code \d+: must have 3 bits"),
        ("packing", "5bit_u8", r"fc\.packing '5bit_u8': must be one of"),
        ("packing", None, r"fc\.packing None"),
        ("group_size", 7, r"fc\.group_size 7: must be a number above 0 that divides the 24 \* 80 weights"),
        ("group_size", 32, r"fc\.W_q: is \(60, 16\) torch\.uint8, must be \(30, 32\)"),
        ("shape", torch.Size([24]), r"fc\.shape \(24,\): must be two numbers"),
        ("shape", torch.Size([80, 48]), r"fc\.W_q: is \(60, 16\)"),
        ("compute_dtype", torch.int8, r"fc\.compute_dtype: must be one of float16, bfloat16, float32"),
        ("quant_scale", False, r"fc\.scale: must be a tensor"),
        ("meta_scale", 3, r"fc\.meta_scale: must be a dict of settings"),
        ("scale_q", torch.zeros(8, 15), r"fc\.meta_scale\.W_q: is \(8, 15\) torch\.float32, must be"),
        ("axis", [1], r"fc\.axis: must be a setting"),
        ("packing", "4" * 65, r"fc\.packing: must be a setting"),
        ("zero_scale", 1, r"fc\.zero_scale: .* not read"),
        ("bias", 1, r"fc\.bias: must be a tensor"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object, rule: str, tmp_path: Path) -> None:
    made = made_before()
    made["fc"][key] = value
    saved(made, tmp_path / "qmodel.pt")
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(tmp_path)[1].layers["fc"].read()


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        ([1], "must be a dict of modules"),
        ({"fc": 1}, "fc: must be a dict of what the module has"),
        ({"fc": {"weight": 1}}, r"fc\.weight: must be a tensor"),
        ({"fc": {"weight": torch.ones(2)}}, "no module has W_q"),
    ],
)
def test_a_file_of_no_layers_is_refused(made: object, rule: str, tmp_path: Path) -> None:
    saved(made, tmp_path / "qmodel.pt")
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("shape", torch.zeros(65, dtype=torch.int64), r"fc\.shape: is \(65,\) torch\.int64: must be a setting"),
        ("packing", torch.tensor([52, 53], dtype=torch.uint8), r"fc\.packing '45': must be one of"),
        ("quant_zero", torch.tensor(1, dtype=torch.uint8), r"fc: scales or zero points that are quantized"),
        ("scale", torch.zeros(3), r"fc\.scale: is \(3,\) torch\.float32, must be 60 floats"),
        ("zero", torch.full((60, 1), torch.inf), r"fc\.zero: must be finite"),
        ("other", torch.zeros(1), r"fc\.other: not a tensor that a quantized layer of this format has"),
    ],
)
def test_a_wrong_tensor_is_named(key: str, value: torch.Tensor, rule: str, tmp_path: Path) -> None:
    shutil.copytree(TENSORS, tmp_path / "it")
    tensors = load_file(TENSORS / "model.safetensors")
    save_file(tensors | {f"fc.{key}": value}, tmp_path / "it" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(tmp_path / "it")[1].layers["fc"].read()


def test_transformers_says_the_method(tmp_path: Path) -> None:
    shutil.copytree(TENSORS, tmp_path / "it")
    config = tmp_path / "it" / "config.json"
    config.write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    assert open_foreign(tmp_path / "it")[0].name == "hqq"
    save_file({"fc.weight": torch.ones(1)}, tmp_path / "it" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says HQQ, but has no tensor \*\.W_q"):
        open_foreign(tmp_path / "it")


def groups_along_columns(weight: torch.Tensor, size: int) -> dict[str, object]:
    """4 bits with axis 0: a group has every (N * K / size)-th weight of the flattened matrix."""
    matrix = weight.float().reshape(size, -1)
    low, high = matrix.min(0, keepdim=True)[0], matrix.max(0, keepdim=True)[0]
    scale = ((high - low) / 15).half()
    zero = (-low / scale).half()
    codes = (matrix / scale + zero).round().clamp(0, 15).to(torch.uint8)
    packed = codes[: size // 2] << 4 | codes[size // 2 :]
    told = {"nbits": 4, "group_size": size, "shape": weight.shape, "axis": 0, "packing": "4bit_u8"}
    return {"W_q": packed, "scale": scale, "zero": zero, "compute_dtype": torch.float16, **told}


def test_groups_along_columns_are_rounded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    told: dict[str, Any] = groups_along_columns(weight, 64)
    saved({"fc": told}, tmp_path / "qmodel.pt")
    read = open_foreign(tmp_path)[1].layers["fc"].read()
    high, low = (told["W_q"] >> 4).half(), (told["W_q"] & 15).half()
    expected = ((torch.cat([high, low]) - told["zero"]) * told["scale"]).reshape(32, 48)
    assert torch.equal(read.dequantize(), expected.float())
    assert (read.dequantize() - weight).abs().max() < 0.3
    chosen = choose(read, 16)
    assert chosen.why is not None
    assert "groups of 1:" in chosen.why
    assert chosen.sqnr_db > 18
