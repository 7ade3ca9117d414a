"""Checkpoints of other libraries: their weights equal what the library itself dequantizes, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.checkpoint import CheckpointError
from nybble.foreign import ForeignWeight, foreign_formats, open_foreign
from nybble.foreign.bits import unpack_stream
from nybble.foreign.fit import fit
from nybble.foreign.gguf_header import GgufHeader, read_header
from nybble.foreign.gguf_types import _TYPES
from nybble.weights.rounding import dequantize_weight

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "foreign"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def oracle_of(name: str) -> tuple[str, Tensor]:
    """The layer's name, and the rows of its weight that the library computed."""
    with safe_open(DATA / name / "oracle.safetensors", "pt") as file:
        (layer,) = file.keys()
        return layer, file.get_tensor(layer)


def rows_read(name: str) -> Tensor:
    """All rows of the only layer of a checkpoint, float32, in the order of the file."""
    opened = open_foreign(DATA / name)[1]
    if not opened.layers:
        return next(part.read() for key, part in opened.parts.items() if key.endswith(".weight")).float()
    (layer,) = opened.layers.values()
    return layer.read().dequantize()


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """transformers' order of the rows of a rotary projection, from llama.cpp's."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_equal_the_librarys_own(name: str) -> None:
    if name.startswith("onnx"):
        pytest.importorskip("onnx")
    layer, oracle = oracle_of(name)
    read = rows_read(name)
    if name.startswith("gguf"):
        back = torch.empty(len(read), dtype=torch.long)
        back[unpermuted(torch.arange(len(read)).reshape(-1, 1), 2).flatten()] = torch.arange(len(read))
        assert not torch.equal(back, torch.arange(len(read)))
        read = read[back]
    cut = oracle.shape[0] != read.shape[0]
    if name.startswith("quanto"):  # the file does not have the shape
        read = read.reshape(-1, oracle.shape[1])
        cut = oracle.shape[0] != read.shape[0]
    assert torch.equal(read[::3].to(oracle.dtype) if cut else read.to(oracle.dtype), oracle), layer


def test_every_format_has_a_checkpoint() -> None:
    found = set()
    for name in CHECKPOINTS:
        if not name.startswith("onnx"):
            found.add(open_foreign(DATA / name)[0].name)
    assert found | {"onnx"} == {row.name for row in foreign_formats()}


@pytest.mark.parametrize(
    "name", [key.removesuffix(".raw") for key in load_file(DATA / "gguf-blocks.safetensors") if key.endswith(".raw")]
)
def test_every_block_type_equals_the_gguf_package(name: str, tmp_path: Path) -> None:
    stored = load_file(DATA / "gguf-blocks.safetensors")
    raw, expected = stored[f"{name}.raw"], stored[f"{name}.weight"]
    number = next(number for number, kind in _TYPES.items() if kind.name == name)
    write_gguf(tmp_path / "model.gguf", raw.numpy().tobytes(), number, expected.shape)
    (layer,) = open_foreign(tmp_path)[1].layers.values()
    assert torch.equal(layer.read().dequantize(), expected)
    held = fit(layer.read())
    if held.why == "negative scales beside a float minimum":  # these are random bytes; files of libraries have none
        assert (layer.read().scale < 0).any()
        return
    assert held.scheme is not None, held.why
    assert held.quantized is not None
    assert torch.equal(dequantize_weight(held.quantized, held.scheme, expected.shape[1]), expected)


def write_gguf(path: Path, data: bytes, number: int, shape: torch.Size | tuple[int, int]) -> None:
    """A GGUF file with one tensor, `output.weight`."""

    def size(value: int) -> bytes:
        return value.to_bytes(8, "little")

    def text(value: str) -> bytes:
        return size(len(value)) + value.encode()

    out = b"GGUF" + (3).to_bytes(4, "little") + size(1) + size(1)
    out += text("general.architecture") + (8).to_bytes(4, "little") + text("toy")
    out += text("output.weight") + (2).to_bytes(4, "little") + size(shape[1]) + size(shape[0])
    out += number.to_bytes(4, "little") + size(0)
    path.write_bytes(out + bytes(-len(out) % 32) + data)


def test_gguf_bytes_of_no_tensor_are_refused(tmp_path: Path) -> None:
    """A shape that is told too small leaves some; those that fill a tensor up to the alignment are none."""
    block = bytes(34)  # of Q8_0
    write_gguf(tmp_path / "model.gguf", block * 2 + bytes(28), 8, (2, 32))
    (layer,) = open_foreign(tmp_path)[1].layers.values()
    assert layer.read().shape == (2, 32)
    write_gguf(tmp_path / "model.gguf", block * 2, 8, (1, 32))
    with pytest.raises(CheckpointError, match=r"output\.weight: shape or offset: 34 bytes .* belong to no tensor"):
        open_foreign(tmp_path)


# --- kinds of GPTQ that no checkpoint here has, packed by other arithmetic than the reader's


def packed_columns(codes: Tensor, bits: int) -> Tensor:
    """Codes (K, N) to words (K * bits / 32, N), each column one long number in base 2 ** bits."""
    columns = []
    for column in codes.T.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(column))
        columns.append(np.frombuffer(number.to_bytes(len(column) * bits // 8, "little"), np.int32).copy())
    return torch.from_numpy(np.stack(columns, 1))


def write_gptq(directory: Path, codes: Tensor, zeros: Tensor, bits: int, **config: object) -> Tensor:
    """A GPTQ v1 checkpoint of codes (K, N) and zero points (G, N); returns its scales (G, N)."""
    directory.mkdir(exist_ok=True)
    words = []
    for row in zeros.tolist():  # v1: one less, in whole words of 32 bits, where codes do not cross them
        number = sum(zero << (i * bits) for i, zero in enumerate(row))
        ones = sum(1 << (i * bits) for i in range(32 // bits))
        parts = [(number >> at) & 0xFFFFFFFF for at in range(0, len(row) * bits, 32)]
        words.append(np.array([(part - ones) % (1 << 32) for part in parts], np.uint32).view(np.int32))
    scales = (torch.rand(zeros.shape) + 0.5).to(torch.float16)
    tensors = {
        "fc.qweight": packed_columns(codes, bits),
        "fc.qzeros": torch.from_numpy(np.stack(words)),
        "fc.scales": scales,
    }
    save_file(tensors, directory / "model.safetensors")
    told = {"quant_method": "gptq", "bits": bits, "group_size": codes.shape[0] // zeros.shape[0], "sym": False}
    (directory / "config.json").write_text(json.dumps({"quantization_config": told | config}))
    return scales


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_borrow_from_their_neighbours(bits: int, tmp_path: Path) -> None:
    codes = torch.randint(0, 1 << bits, (64, 32))
    zeros = torch.randint(0, 1 << bits, (2, 32))
    zeros[:, ::3] = 0
    scales = write_gptq(tmp_path, codes, zeros, bits)
    weight = open_foreign(tmp_path)[1].layers["fc"].read()
    expected = (codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)
    assert torch.equal(weight.dequantize(), expected.T)
    assert not weight.symmetric


def test_zero_points_that_are_not_those_of_sym_are_refused(tmp_path: Path) -> None:
    codes, zeros = torch.randint(0, 16, (64, 32)), torch.full((2, 32), 8)
    write_gptq(tmp_path, codes, zeros, 4, sym=True)
    assert open_foreign(tmp_path)[1].layers["fc"].read().symmetric
    write_gptq(tmp_path, codes, zeros, 4, sym=True, checkpoint_format="gptq_v2")
    with pytest.raises(CheckpointError, match=r"fc\.qzeros: are not all 8.*checkpoint_format"):
        open_foreign(tmp_path)[1].layers["fc"].read()


def test_one_group_of_all_inputs(tmp_path: Path) -> None:
    codes, zeros = torch.randint(0, 16, (64, 32)), torch.randint(0, 16, (1, 32))
    scales = write_gptq(tmp_path, codes, zeros, 4, group_size=-1)
    assert torch.equal(open_foreign(tmp_path)[1].layers["fc"].read().dequantize(), ((codes - zeros) * scales.float()).T)


# --- shapes of files


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    directory = copied("gptq-w4-g128", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{i + 1}-of-00004.safetensors" for i, name in enumerate(names)}
    for name, file in files.items():
        save_file({name: tensors[name]}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    (layer,) = open_foreign(directory)[1].layers.values()
    assert torch.equal(layer.read().dequantize(), rows_read("gptq-w4-g128"))
    for wrong, rule in (
        ("../x.safetensors", r"is no \.safetensors file beside it"),
        ("none.safetensors", "cannot be opened"),
    ):
        index.write_text(json.dumps({"weight_map": files | {names[0]: wrong}}))
        with pytest.raises(CheckpointError, match=rule):
            open_foreign(directory)
    index.write_text(json.dumps({"weight_map": files | {"more": files[names[0]]}}))
    with pytest.raises(CheckpointError, match="more is in none of the files"):
        open_foreign(directory)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [8, 7])
def test_quanto_of_any_number_of_groups(bits: int, rows: int, tmp_path: Path) -> None:
    """Rows of groups are packed above each other, in parts of equal height: the last part may be shorter."""
    each, size = 8 // bits, 16
    height = -(-rows // each)
    codes = torch.randint(0, 1 << bits, (rows, size), dtype=torch.uint8)
    whole = torch.cat([codes, torch.zeros(height * each - rows, size, dtype=torch.uint8)]).unflatten(0, (each, height))
    packed = sum(part << bits * i for i, part in enumerate(whole))
    scale, shift = torch.rand(rows, 1), torch.randn(rows, 1)
    tensors = {"fc.weight._data._data": packed, "fc.weight._scale": scale, "fc.weight._shift": shift}
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({"fc": {"weights": f"qint{bits}", "activations": "none"}}))
    save_file(tensors, tmp_path / "model.safetensors")
    weight = read_all(tmp_path)
    assert torch.equal(weight.dequantize(), (codes * scale - shift).reshape(1, -1))
    assert f"{bits} bits, groups of 16, float minimum" in weight.describe()
    save_file(tensors | {"fc.weight._scale": scale[:1]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"fc\.weight\._scale: is \(1, 1\), .* of {each} codes a byte"):
        read_all(tmp_path)


def test_dense_tensors_are_kept(tmp_path: Path) -> None:
    opened = open_foreign(DATA / "gptq-w4-g64-gpt2")[1]
    assert list(opened.parts) == ["transformer.h.1.mlp.c_proj.bias"]
    assert opened.parts["transformer.h.1.mlp.c_proj.bias"].read().shape == (128,)


def test_static_activations_are_kept() -> None:
    (layer,) = open_foreign(DATA / "ct-w8a8-static-asym")[1].layers.values()
    weight = layer.read()
    assert weight.input_scale is not None
    assert weight.input_zero is not None
    assert weight.input_zero.dtype == torch.int8


def test_codes_of_minus_128_and_negative_scales_are_read_as_they_are() -> None:
    (layer,) = open_foreign(DATA / "ct-w8a8-dynamic")[1].layers.values()
    assert (layer.read().codes == -128).any()
    (layer,) = open_foreign(DATA / "autoround-gptq-w4-g128")[1].layers.values()
    assert (layer.read().scale < 0).any()


def test_weights_are_described() -> None:
    words = {
        name: next(iter(open_foreign(DATA / name)[1].layers.values())).read().describe()
        for name in ("gptq-w4-g128-desc-act", "bnb-nf4-flat", "gguf-q4-k-m", "ct-w8a8-dynamic")
    }
    assert words == {
        "gptq-w4-g128-desc-act": "4 bits, groups of 128, symmetric, columns in activation order, float16 scales",
        "bnb-nf4-flat": "4 bits, groups of 64, code book, over the flattened matrix, float32 scales",
        "gguf-q4-k-m": "4 bits, groups of 32, float minimum, two-level scales",
        "ct-w8a8-dynamic": "8 bits, one scale a row, symmetric, bfloat16 scales",
    }


# --- what is refused, and how


def test_an_unknown_format_lists_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "magic"}}))
    with pytest.raises(CheckpointError, match=r"quant_method 'magic' is not known.*gptq: .*awq: .*gguf: "):
        open_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_foreign(tmp_path / "none")


def test_a_directory_of_directories_names_one(tmp_path: Path) -> None:
    copied("gptq-w4-g128", tmp_path)
    with pytest.raises(CheckpointError, match=r"no quantized checkpoint is found; is one of .* such as gptq-w4-g128\?"):
        open_foreign(tmp_path)


def test_two_formats_at_once_are_refused(tmp_path: Path) -> None:
    directory = copied("gptq-w4-g128", tmp_path)
    shutil.copy(DATA / "gguf-q4-0" / "model.gguf", directory)
    with pytest.raises(CheckpointError, match=r"checkpoints of 2 formats.*gptq.*gguf"):
        open_foreign(directory)


def read_all(directory: Path) -> ForeignWeight:
    return next(iter(open_foreign(directory)[1].layers.values())).read()


@pytest.mark.parametrize(
    ("name", "ending", "edit", "rule"),
    [
        ("gptq-w4-g128-desc-act", "g_idx", None, r"k_proj\.g_idx: is missing, though .* desc_act"),
        ("gptq-w4-g128-desc-act", "g_idx", lambda t: t.fill_(-1), r"k_proj\.g_idx: -1: must be in \[0, 1\]"),
        ("gptq-w4-g128-desc-act", "g_idx", lambda t: t.fill_(2), r"k_proj\.g_idx: 2: must be in \[0, 1\]"),
        ("gptq-w4-g128-desc-act", "g_idx", lambda t: t.fill_(1), r"g_idx: group 0 has 0 columns, must have 128"),
        ("gptq-w4-g128", "scales", None, r"k_proj\.scales: is missing"),
        ("gptq-w4-g128", "scales", lambda t: t * float("nan"), r"k_proj\.scales: must be finite"),
        ("gptq-w4-g128", "scales", lambda t: t * 0, r"k_proj\.scales: is 0 for weights that are not 0"),
        ("gptq-w4-g128", "scales", lambda t: t.double(), r"k_proj\.scales: is .* float64, must be float16"),
        ("gptq-w4-g128", "qzeros", lambda t: t[:1].clone(), r"k_proj\.qzeros: is \(1, 16\), must be \(2, 16\)"),
        ("awq-gemm-w4-g32-edge", "qzeros", lambda t: t[:, 1:].clone(), r"k_proj\.qzeros: is .*must be \(8, 16\)"),
        ("ct-w4a16-g128", "weight_shape", lambda t: -t, r"weight_shape: \[-128, -256\]: both must be at least 1"),
        ("ct-w4a16-g128", "weight_shape", lambda t: t * 2, r"k_proj: the shapes of its tensors fit 0 settings"),
        ("ct-old-w4a16-g128-actorder-group", "weight_g_idx", None, r"weight_g_idx: is missing, though .* actorder 'group'"),
        ("bnb-int8", "SCB", lambda t: t.fill_(3e38), r"SCB: must be finite, and below"),
        ("ct-w8a8-dynamic", "weight_scale", None, r"k_proj\.weight: is torch\.int8, but has no weight_scale|has no tensor"),
        ("ct-w4a8-g128", "weight", lambda t: t.fill_(9), r"k_proj\.weight: 9 to 9: must be numbers of 4 bits"),
        ("ct-old-sparse24-w8a8", "bitmask", lambda t: t.fill_(7), r"bitmask: must have two set bits in each four"),
        ("ct-old-sparse-bitmask-bf16", "row_offsets", lambda t: t + 1, r"row_offsets: are not the sums"),
        ("ct-old-marlin24-w4-g128", "meta", lambda t: t.fill_(0), r"meta: two places of four columns must be in ascending"),
        ("ct-old-marlin24-w4-g128", "scale_packed", lambda t: t[:2].clone(), r"down_proj: the shapes .* fit 0 settings"),
        ("bnb-int8", "weight_format", lambda t: t.fill_(1), r"weight_format: must be 0"),
        ("bnb-nf4-double", "nested_absmax", None, r"one of the two is missing"),
        ("torchao-int8wo", "_weight_scale", lambda t: t[1:].clone(), r"_weight_scale: is \(127, 1\).*\(128, 1\)"),
    ],
)  # fmt: skip
def test_a_lying_tensor_is_named(name: str, ending: str, edit: object, rule: str, tmp_path: Path) -> None:
    directory = copied(name, tmp_path)
    if name.startswith("torchao"):
        with safe_open(directory / "model.safetensors", "pt") as file:
            metadata = file.metadata()
    tensors = load_file(directory / "model.safetensors")
    (key,) = [key for key in tensors if key.endswith(f".{ending}")]
    if edit is None:
        del tensors[key]
    else:
        tensors[key] = edit(tensors[key])  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors", metadata if name.startswith("torchao") else None)
    with pytest.raises(CheckpointError, match=rule):
        read_everything(directory)


def read_everything(directory: Path) -> None:
    opened = open_foreign(directory)[1]
    for one in (*opened.layers.values(), *opened.parts.values()):
        one.read()


def test_a_version_decides_where_word_counts_do_not(tmp_path: Path) -> None:
    """43 codes of 3 bits are 5 words in both ways of packing."""
    codes = torch.randint(0, 8, (32, 43))
    number = [sum(code << (3 * i) for i, code in enumerate(row)) for row in codes.tolist()]
    words = np.stack([np.frombuffer(n.to_bytes(20, "little"), np.int32) for n in number])
    tensors = {
        "fc.weight_packed": torch.from_numpy(words.copy()),
        "fc.weight_scale": torch.ones(32, 1),
        "fc.weight_shape": torch.tensor([32, 43]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["config_groups"] = {"a": {"weights": {"num_bits": 3, "strategy": "channel"}}}  # type: ignore[assignment]

    def read(**more: object) -> Tensor:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config | more}))
        return read_all(tmp_path).dequantize()

    assert torch.equal(read(version="0.18.0"), codes - 4.0)
    assert not torch.equal(read(version="0.17.1"), codes - 4.0)
    with pytest.raises(
        CheckpointError, match=r"fc\.weight_packed: 3 bits: 5 words hold 43 codes .* no version is told"
    ):
        read()


def test_a_stream_is_unpacked_for_every_width() -> None:
    for bits in range(1, 9):
        codes = torch.randint(0, 1 << bits, (3, 37))
        numbers = [sum(code << (i * bits) for i, code in enumerate(row)) for row in codes.tolist()]
        rows = np.stack([np.frombuffer(n.to_bytes(-(-37 * bits // 8), "little"), np.uint8) for n in numbers])
        assert np.array_equal(unpack_stream(rows, bits, 37), codes.numpy())


def test_pieces_do_not_change_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: rows_read(name) for name in ("gptq-w4-g128-desc-act", "bnb-nf4-flat", "gguf-q4-k-m")}
    monkeypatch.setattr("nybble.foreign.weight._AT_ONCE", 200)
    assert all(torch.equal(rows_read(name), weight) for name, weight in whole.items())


def test_a_header_of_gguf_is_read() -> None:
    header = read_header(DATA / "gguf-q4-0" / "model.gguf")
    assert isinstance(header, GgufHeader)
    assert header.fields["llama.attention.head_count_kv"] == 2
    assert list(header.tensors) == ["blk.1.attn_k.weight"]
