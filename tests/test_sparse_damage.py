"""Damaged sparse weights: whatever a kernel would follow is checked first, and the field that is wrong is named."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble import native
from nybble.checkpoint import CheckpointError
from nybble.checkpoint import files as checkpoint_files
from nybble.native import KernelNames
from nybble.nn import SparseLinear
from nybble.testing.guard import guarded
from nybble.testing.oracle import random_weight
from nybble.weights.scheme import Scheme

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

N, K = 50, 200
TILES = 4
SCHEMES = {"mask8": "sp70w8a8", "mask4": "sp70w4a8g32", "gather8": "sp70w8a8", "blocks8": "bs32x32w8a8"}
LARGE = 2**62


def packed_of(layout: str) -> tuple[Tensor, Scheme]:
    scheme = Scheme.parse(SCHEMES[layout])
    quantized = random_weight(scheme.dense if layout == "blocks8" else scheme, N, K)  # 7 blocks in either strip
    return native.pack(quantized, scheme, K, layout), scheme


def check(packed: Tensor, scheme: Scheme, layout: str) -> None:
    native.check_packed(packed, scheme, N, K, layout)


def sections(layout: str) -> dict[str, int]:
    """Where a packed weight of these shapes has its last start and what follows the sums, by csrc/pack.h."""
    scale = 64 * TILES if layout != "mask4" else 32 * TILES * 7  # float32, or bfloat16 of 7 groups
    return {"last_start": 8 * (2 if layout == "blocks8" else TILES), "next": 64 + scale + 64 * TILES}


def words(packed: Tensor, at: int, dtype: torch.dtype, count: int) -> Tensor:
    return packed[at : at + count * dtype.itemsize].view(dtype)


@pytest.mark.parametrize("layout", SCHEMES)
def test_a_whole_weight_is_accepted_and_one_byte_less_is_not(layout: str) -> None:
    packed, scheme = packed_of(layout)
    check(packed, scheme, layout)
    for short in (packed.numel() - 1, 300, 64, 1, 0):
        with pytest.raises(ValueError, match=r"packed: (has \d+ bytes, needs \d+|start counts)"):
            check(packed[:short], scheme, layout)
        with pytest.raises(ValueError, match=r"packed: (has \d+ bytes, needs \d+|start counts)"):
            native.unpack(packed[:short], scheme, N, K, layout)


@pytest.mark.parametrize("layout", SCHEMES)
@pytest.mark.parametrize("value", [-1, -(2**63), LARGE, 2**63 - 1, 2**32, 10**6])
def test_a_count_beyond_the_bytes(layout: str, value: int) -> None:
    packed, scheme = packed_of(layout)
    words(packed, sections(layout)["last_start"], torch.int64, 1)[0] = value
    with pytest.raises(ValueError, match=r"packed: (start counts|has \d+ bytes)"):
        check(packed, scheme, layout)


@pytest.mark.parametrize("layout", SCHEMES)
def test_starts_that_do_not_ascend(layout: str) -> None:
    original, scheme = packed_of(layout)
    strips = sections(layout)["last_start"] // 8
    for i in range(strips):
        for change in (LARGE, -1, 2**63 - 1):
            packed = original.clone()
            words(packed, 8 * i, torch.int64, 1)[0] = change
            with pytest.raises(ValueError, match=r"packed: start\[\d\]"):
                check(packed, scheme, layout)


def test_no_index_beside_the_weight_is_read() -> None:
    scheme = Scheme.parse(SCHEMES["blocks8"])
    quantized = random_weight(scheme, N, K)
    quantized.qweight.zero_()
    plain = native.pack(quantized, scheme, K, "blocks8")
    with guarded((plain.numel(),), torch.uint8, "right") as packed:
        packed.tensor.copy_(plain)
        check(packed.tensor, scheme, "blocks8")
        words(packed.tensor, 8, torch.int64, 1)[0] = 1  # of no blocks
        with pytest.raises(ValueError, match=r"packed: start\[1\] is greater than the last entry"):
            check(packed.tensor, scheme, "blocks8")


@pytest.mark.parametrize("layout", ["mask8", "mask4"])
def test_masks_that_do_not_fit_their_values(layout: str) -> None:
    original, scheme = packed_of(layout)
    at = sections(layout)["next"]
    starts = words(original, 0, torch.int64, TILES)
    words_of_masks = 8 if layout == "mask8" else 16
    for tile in range(TILES):
        packed = original.clone()
        masks = packed[at + int(starts[tile]) :][: 8 * words_of_masks]
        masks[:] = 0xFF
        with pytest.raises(ValueError, match=rf"packed: start\[{tile + 1}\] (leaves no room|does not match)"):
            check(packed, scheme, layout)
        masks[:] = 0
        with pytest.raises(ValueError, match=rf"packed: start\[{tile + 1}\]"):
            check(packed, scheme, layout)


@pytest.mark.parametrize("value", [-1, 64, 63 + 2**31 - 64, 7, -(2**31)])
def test_an_order_that_is_no_permutation(value: int) -> None:
    packed, scheme = packed_of("gather8")
    order = words(packed, sections("gather8")["next"], torch.int32, 64)
    order[8] = value if value != order[8] else 9
    with pytest.raises(ValueError, match=r"packed: order\[\d+\]=-?\d+: order is not a permutation"):
        check(packed, scheme, "gather8")


def test_an_order_that_its_flag_denies() -> None:
    original, scheme = packed_of("gather8")
    for flag, swapped in ((2, False), (0, True)):
        packed = original.clone()
        order = words(packed, sections("gather8")["next"], torch.int32, 64)
        words(packed, sections("gather8")["last_start"] + 8, torch.int64, 1)[0] = flag
        if swapped:
            order[:2] = order[:2].flip(0)
        with pytest.raises(ValueError, match=r"packed: .*last word of start"):
            check(packed, scheme, "gather8")


@pytest.mark.parametrize("value", [3, 1000, -1])
def test_a_window_beyond_k(value: int) -> None:
    packed, scheme = packed_of("gather8")  # K is padded to 256: windows 0, 1 and 2
    window = words(packed, sections("gather8")["next"] + 256, torch.int16, 2)
    window[1] = value
    with pytest.raises(ValueError, match=r"packed: window\[1\]=\d+: must be at most"):
        check(packed, scheme, "gather8")


@pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, -(2**31)])
def test_a_block_beyond_k(value: int) -> None:
    packed, scheme = packed_of("blocks8")  # 7 blocks of 32
    index = words(packed, sections("blocks8")["next"], torch.int32, 2)
    index[0] = value
    with pytest.raises(ValueError, match=r"packed: index\[[01]\]=-?\d+: must be in"):
        check(packed, scheme, "blocks8")


def test_blocks_out_of_order() -> None:
    packed, scheme = packed_of("blocks8")
    index = words(packed, sections("blocks8")["next"], torch.int32, 2)
    for first, second in ((3, 3), (5, 2)):
        index[0], index[1] = first, second
        with pytest.raises(ValueError, match=r"packed: index\[1\]=-?\d+: must be in"):
            check(packed, scheme, "blocks8")


@pytest.mark.parametrize("layout", SCHEMES)
def test_a_kernel_checks_the_bytes_before_it_runs(layout: str) -> None:
    packed, scheme = packed_of(layout)
    kernels = {
        "mask8": KernelNames("w8a8_scalar", "prepare_scalar", "mask8", "expand_scalar"),
        "mask4": KernelNames("w4a8_scalar", "prepare_scalar", "mask4", "expand_scalar"),
        "gather8": KernelNames("spw8a8_scalar_gather", "prepare_scalar", "gather8"),
        "blocks8": KernelNames("bsw8a8_scalar", "prepare_scalar", "blocks8"),
    }
    plan = native.LinearPlan(kernels[layout], scheme, N, K)
    x, out = torch.randn(3, K), torch.empty(3, N)
    plan(x, packed, None, out)
    for damaged in (packed[:-1], packed[:300], packed[:0]):
        with pytest.raises(ValueError, match="packed: "):
            plan(x, damaged, None, out)
    for other, names in kernels.items():
        if other != layout and names.linear.startswith(("sp", "bs")):
            with pytest.raises(ValueError, match=r"reads|-bit weights"):
                native.LinearPlan(names._replace(layout=layout), scheme, N, K)(x, packed, None, out)


# --- portable tensors, as a state_dict brings them


def state(scheme: str, n: int = 40, k: int = 70) -> dict[str, Tensor]:
    parsed = Scheme.parse(scheme)
    layer = SparseLinear.from_quantized(random_weight(parsed, n, k), k, None, parsed, torch.float32)
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def refused(scheme: str, tensors: dict[str, Tensor], match: str) -> None:
    layer = SparseLinear(70, 40, bias=False, scheme=scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=match):
        layer.load_state_dict(tensors)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the layer is as it was"
    meta = SparseLinear(70, 40, bias=False, scheme=scheme, device="meta")
    with pytest.raises(RuntimeError, match=match):
        meta.load_state_dict(tensors, assign=True)


@pytest.mark.parametrize("scheme", ["sp50w8a8", "sp50w4a8", "sp50w4a16g32", "sp24w8a8"])
def test_masks_and_values_that_do_not_belong_together(scheme: str) -> None:
    good = state(scheme)
    two = torch.cat((good["values"], good["values"]))
    refused(scheme, {**good, "values": two}, "values: has")
    refused(scheme, {**good, "values": good["values"][:-1]}, "values: has")
    refused(scheme, {**good, "values": good["values"][:0]}, "values: has 0 bytes")
    refused(scheme, {**good, "mask": torch.zeros_like(good["mask"])}, "values: has")
    flipped = good["mask"].clone()
    flipped[3, 8] |= 64  # K is 70: bits 6 and 7 of the last byte are beyond
    refused(scheme, {**good, "mask": flipped}, "mask: row 3 has a bit beyond in_features")
    refused(scheme, {**good, "mask": torch.full_like(good["mask"], 255)}, "mask: row 0")


def test_a_mask_that_breaks_n_of_m() -> None:
    good = state("sp24w8a8")
    mask = good["mask"].clone()
    mask[5, 2] = 0b00000111
    mask[5, 3:] = 0
    refused("sp24w8a8", {**good, "mask": mask}, "mask: row 5 keeps more than 2 of the 4 inputs that end at 18")


def test_the_lowest_code_is_held() -> None:
    good = state("sp50w8a8")
    good["values"][7] = -128
    layer = SparseLinear(70, 40, bias=False, scheme="sp50w8a8")
    layer.load_state_dict(good)
    assert torch.equal(layer.state_dict()["values"], good["values"])
    x = torch.eye(70)
    assert torch.allclose(layer(x), layer.dequantized_weight().T, rtol=0.01, atol=1e-6)


def test_a_nibble_beyond_the_last_value() -> None:
    good = state("sp50w4a8")
    kept = int(sum(int(byte).bit_count() for byte in good["mask"].flatten()))
    if kept % 2 == 0:
        row = good["mask"][0]
        first = int(row[0])
        row[0] = first & (first - 1) if first else 1
    good["values"][-1] |= 0x10
    refused("sp50w4a8", good, "values: the unused last nibble must be 0")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("mask", lambda t: t.to(torch.int8)),
        ("mask", lambda t: t[:, :-1].contiguous()),
        ("mask", lambda t: t[:-1]),
        ("mask", lambda t: t.flatten()),
        ("mask", lambda t: t[:0]),
        ("values", lambda t: t.to(torch.uint8)),
        ("values", lambda t: t.to(torch.float32)),
        ("values", lambda t: t[None]),
        ("values", lambda t: t[0]),
        ("scale", lambda t: t.to(torch.float16)),
        ("scale", lambda t: t[:-1]),
        ("scale", lambda t: t * torch.nan),
        ("scale", lambda t: -t),
    ],
)
def test_wrong_shapes_and_dtypes_of_a_bitmask(name: str, damage) -> None:
    good = state("sp50w8a8")
    refused("sp50w8a8", {**good, name: damage(good[name])}, rf"{name}: ")


@pytest.mark.parametrize("name", ["mask", "values", "scale"])
def test_a_tensor_that_is_missing(name: str) -> None:
    good = state("sp50w8a8")
    refused("sp50w8a8", {key: tensor for key, tensor in good.items() if key != name}, rf"but not \['{name}'\]")


@pytest.mark.parametrize("value", [2**31 - 1, -1, -(2**31), 1000])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_block_starts(place: int, value: int) -> None:
    good = state("bs32x32w8a8")
    good["block_start"][place] = value
    refused("bs32x32w8a8", good, rf"block_start\[[012]\]={value}: must")


def test_block_starts_that_descend() -> None:
    good = state("bs32x32w8a8")
    good["block_start"][:] = torch.tensor([0, int(good["block_start"][2]), int(good["block_start"][2])])
    good["block_start"][1] = -2
    refused("bs32x32w8a8", good, r"block_start\[1\]=-2: must be in")


@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1, -(2**31)])
def test_block_places(value: int) -> None:
    good = state("bs32x32w8a8")
    good["block_index"][-1] = value
    refused("bs32x32w8a8", good, rf"block_index\[\d\]={value}: must be in \[0, 3\)")


def test_block_places_that_do_not_ascend() -> None:
    good = state("bs16x4w8a8")
    first = good["block_index"][:2].flip(0)
    good["block_index"][:2] = first
    refused("bs16x4w8a8", good, r"block_index\[1\]=\d+: must be in \[0, 18\) and greater than the previous entry")


def test_codes_beyond_the_edges_of_the_weight() -> None:
    good = state("bs32x32w8a8")  # 40 x 70: the last strip ends at 64, the last column at 96
    good["values"][-1, -1, -1] = 3
    refused("bs32x32w8a8", good, "values: must be 0 beyond the weight's edges")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("block_start", lambda t: t.long()),
        ("block_start", lambda t: t[:-1]),
        ("block_start", lambda t: t[:0]),
        ("block_index", lambda t: t[:-1]),
        ("block_index", lambda t: t.to(torch.int16)),
        ("values", lambda t: t.flatten(1)),
        ("values", lambda t: t[:, :16]),
        ("values", lambda t: t[:0]),
    ],
)
def test_wrong_shapes_and_dtypes_of_blocks(name: str, damage) -> None:
    good = state("bs32x32w8a8")
    refused("bs32x32w8a8", {**good, name: damage(good[name])}, r"(block_start|block_index|values)\S*: ")


# --- checkpoints: sizes, names and checksums fit, as an attacker's would


def forged(directory: Path, scheme: str, damage: Callable[[dict[str, Tensor]], object]) -> nn.Sequential:
    """A directory that holds a damaged layer "0" of a model; the model to load it into."""
    parsed = Scheme.parse(scheme)
    layer = SparseLinear.from_quantized(random_weight(parsed, 40, 70), 70, None, parsed, torch.float32)
    model = nn.Sequential(layer)
    nybble.save(model, directory)
    path = next(directory.glob("model-*.safetensors"))
    tensors = load_file(path)
    damage(tensors)
    forge(directory, path, tensors)
    return nn.Sequential(nn.Linear(70, 40, bias=False))


def forge(directory: Path, path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = {name: [8 + size + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    content = checkpoint_files.digest(path, {})
    path.rename(directory / content.file_name)
    index = json.loads((directory / "nybble.json").read_text())
    index["weights"] = {"file": content.file_name, "bytes": content.nbytes, "sha256": content.sha256}
    ordered = sorted(spans.items(), key=lambda item: item[1])
    index["tensors"] = {name: [b, e, zlib.crc32(data[b:e])] for name, (b, e) in ordered}
    (directory / "nybble.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("scheme", "damage", "match"),
    [
        ("sp50w8a8", lambda t: t["0.mask"].zero_(), r"0\.values: has"),
        ("sp50w8a8", lambda t: t["0.mask"].fill_(255), r"0\.mask: row 0 has a bit beyond"),
        ("sp50w8a8", lambda t: t.update({"0.values": t["0.values"][:-1].clone()}), r"0\.values: "),
        ("sp50w8a8", lambda t: t.update({"0.mask": t["0.mask"].to(torch.int8)}), r"0\.mask: "),
        ("sp50w8a8", lambda t: t["0.scale"].fill_(torch.nan), r"0\.scale: "),
        ("sp24w4a8g32", lambda t: t["0.mask"][:, :8].fill_(255), r"0\.mask: row 0 keeps more than 2 of the 4"),
        ("bs32x32w8a8", lambda t: t["0.block_start"].fill_(9), r"0\.block_start\[0\]=9"),
        ("bs32x32w8a8", lambda t: t["0.block_start"][1].fill_(2**31 - 1), r"0\.block_start\[1\]=2147483647"),
        ("bs32x32w8a8", lambda t: t["0.block_index"].fill_(-1), r"0\.block_index\[0\]=-1"),
        ("bs32x32w8a8", lambda t: t["0.values"].fill_(1), r"0\.values: must be 0 beyond"),
        ("bs32x32w8a8", lambda t: t.update({"0.block_index": t["0.block_index"].long()}), r"0\.block_index: "),
    ],
)
def test_forged_checkpoints_are_refused(tmp_path: Path, scheme: str, damage, match: str) -> None:
    model = forged(tmp_path, scheme, damage)
    before, layer = model[0].weight.clone(), model[0]
    with pytest.raises(CheckpointError, match=match):
        nybble.load(model, tmp_path)
    assert model[0] is layer
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("value", [-1, 0, 1, 2**40, 2**62, 2**64, "7", 1.5, None])
@pytest.mark.parametrize("scheme", ["sp50w8a8", "sp50w4a8", "bs32x32w8a8"])
def test_a_count_that_lies(tmp_path: Path, scheme: str, value: object) -> None:
    model = forged(tmp_path, scheme, lambda tensors: None)
    index = json.loads((tmp_path / "nybble.json").read_text())
    assert index["layers"][0]["stored"] > 1
    index["layers"][0]["stored"] = value
    (tmp_path / "nybble.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"stored|values|block_index|integers|too large"):
        nybble.load(model, tmp_path)


@pytest.mark.parametrize(("kind", "scheme"), [("Linear", "sp50w8a8"), ("SparseLinear", "w8a8"), ("Other", "sp50w8a8")])
def test_a_kind_that_does_not_fit_its_scheme(tmp_path: Path, kind: str, scheme: str) -> None:
    model = forged(tmp_path, "sp50w8a8", lambda tensors: None)
    index = json.loads((tmp_path / "nybble.json").read_text())
    index["layers"][0].update(kind=kind, scheme=scheme)
    (tmp_path / "nybble.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\[0\]|scheme|kind"):
        nybble.load(model, tmp_path)
