"""Checkpoints whose codes are small floats or lie in less usual layouts, and settings of compressed-tensors that shapes alone do
not tell apart."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.foreign import ForeignWeight, open_foreign
from nybble.foreign.choose import choose
from nybble.foreign.fit import fit
from nybble.foreign.float_codes import FLOAT4

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "foreign"


def weight_of(path: Path) -> ForeignWeight:
    (layer,) = open_foreign(path)[1].layers.values()
    return layer.read()


def changed(tmp_path: Path, name: str, part: str = "", change: Any = None, config: Any = None) -> Path:
    """A copy of a checkpoint with one tensor changed, or what its configuration says of quantization."""
    path = tmp_path / name
    shutil.copytree(DATA / name, path)
    if part:
        tensors = load_file(path / "model.safetensors")
        (key,) = (key for key in tensors if key.endswith(f".{part}"))
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, path / "model.safetensors")
    if config is not None:
        told = json.loads((path / "config.json").read_text())
        config(told["quantization_config"])
        (path / "config.json").write_text(json.dumps(told))
    return path


def test_four_bits_of_a_float_are_those_of_torch() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).view(torch.float4_e2m1fn_x2)
    assert packed.numel() == 8  # torch converts none of them: the values are those that its documentation gives
    signs = torch.where(codes < 8, 1.0, -1.0)
    exponent, fraction = (codes >> 1 & 3).int(), (codes & 1).float()
    values = torch.where(exponent == 0, fraction / 2, torch.ldexp(1 + fraction / 2, exponent - 1)) * signs
    assert torch.equal(torch.tensor(FLOAT4), values)


@pytest.mark.parametrize(("name", "scheme"), [("ct-nvfp4", "w4nfa16g16"), ("ct-mxfp4", "w4nfa16g32")])
def test_floats_of_4_bits_are_held_exactly(name: str, scheme: str) -> None:
    weight = weight_of(DATA / name)
    assert weight.describe().startswith("4 bits, groups of "), weight.describe()
    found = fit(weight)
    assert (str(found.scheme), found.why) == (scheme, None)


@pytest.mark.parametrize("name", ["ct-fp8-block", "ct-mxfp8", "fp8-block", "quanto-qfloat8"])
def test_floats_of_8_bits_are_rounded_to_8_bits_which_is_told(name: str) -> None:
    chosen = choose(weight_of(DATA / name), 16)
    assert str(chosen.scheme) == "w8a16"
    assert chosen.why is not None
    assert "float8" in chosen.why
    assert 38 < chosen.sqnr_db < math.inf


def test_the_report_tells_of_float8(tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(160, 40, bias=False)})
    loaded, report = nybble.load_pretrained(DATA / "fp8-block", model=model)
    (row,) = report.layers
    assert (row.scheme, row.exact) == ("w8a16", False)
    assert "the others were rounded again" in str(report)
    weight = load_file(DATA / "fp8-block" / "oracle.safetensors")["fc"]
    x = torch.randn(3, 160)
    assert torch.nn.functional.mse_loss(loaded["fc"](x), x @ weight.T) < 1e-3 * (x @ weight.T).square().mean()


@pytest.mark.parametrize(
    ("name", "part", "change", "rule"),
    [
        ("fp8-block", "weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype), r"fc\.weight: must be finite"),
        ("fp8-block", "weight", lambda t: t.float(), r"fc\.weight: is .* float32, must be float8_e4m3fn"),
        ("fp8-block", "weight_scale_inv", lambda t: t[:1], r"weight_scale_inv: is \(1, 2\) .* must be floats \(2, 2\)"),
        ("ct-mxfp8", "weight_scale", lambda t: t.fill_(255), r"fc\.weight_scale: must be finite"),
        ("ct-mxfp4", "weight_scale", lambda t: t[:, :1], r"fc: the shapes of its tensors fit 0 settings"),
        ("ct-nvfp4", "weight_global_scale", lambda t: -t, r"weight_global_scale: must be finite and above 0"),
        ("ct-nvfp4", "weight_scale", lambda t: t.float(), r"weight_scale: is .* float32, must be float8_e4m3fn"),
        ("quanto-qfloat8", "_data", lambda t: t.view(torch.uint8).fill_(0xFF).view(t.dtype), r"_data: must be finite"),
        ("awq-gemv", "scales", lambda t: t.fill_(1), r"fc\.scales: must be 0 beyond the last group"),
        ("awq-gemv", "qzeros", lambda t: t.fill_(-1), r"fc\.qzeros: must be 0 beyond the last group"),
        ("gptq-w7-planes", "qweight", lambda t: t[:20], r"qweight: 20 words hold no whole number of codes of 7 bits"),
        ("gptq-w7-planes", "qzeros", lambda t: t[:, :6], r"qzeros: is \(3, 6\), must be \(3, 7\)"),
        ("awq-gemv-fast", "qzeros", lambda t: t.fill_(1), r"fc\.qzeros: must be 0 beyond the last group"),
        ("awq-gemv-fast", "qweight", lambda t: t[:, :96], r"fc\.qweight: 96 inputs: must be a multiple of 64"),
    ],
)
def test_damaged_tensors_are_refused(name: str, part: str, change: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rule):
        weight_of(changed(tmp_path, name, part, change))


def test_a_layout_of_awq_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "awq-gemv", config=lambda told: told.update(version="marlin"))
    with pytest.raises(CheckpointError, match="version 'marlin': must be one of gemm, gemv, gemv_fast, llm-awq"):
        open_foreign(path)


def test_seven_bits_are_in_planes_only(tmp_path: Path) -> None:
    path = changed(tmp_path, "gptq-w7-planes", config=lambda told: told.update(checkpoint_format="gptq_v2"))
    with pytest.raises(CheckpointError, match=r"bits 7: must be one of \(2, 3, 4, 8\)"):
        open_foreign(path)
    weight = weight_of(DATA / "gptq-w7-planes")
    assert str(fit(weight).scheme) == "w8a16g32"


def test_awq_for_small_batches_keeps_zero_points_and_minimums() -> None:
    kinds = [fit(weight_of(DATA / name)) for name in ("awq-gemv", "awq-gemv-fast")]
    assert [str(kind.scheme) for kind in kinds] == ["w4a16g64asym", "w4a16g32asym"]
    assert [kind.quantized is not None and kind.quantized.minimum is not None for kind in kinds] == [False, True]


def test_a_float8_tensor_of_no_layer_is_refused(tmp_path: Path) -> None:
    """It has a scale somewhere, and would be wrong without."""
    path = changed(tmp_path, "bnb-int8")
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "other.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.weight: is torch\.float8_e4m3fn, of no layer"):
        open_foreign(path)


# --- compressed-tensors: several groups of layers


def with_group(tmp_path: Path, name: str, **weights: Any) -> Path:
    """A copy of a checkpoint whose configuration has a second group, of layers that are not in the file."""

    def add(told: dict[str, Any]) -> None:
        (first,) = told["config_groups"].values()
        told["config_groups"]["another"] = {**first, "weights": {**first["weights"], **weights}}

    return changed(tmp_path, name, config=add)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("ct-w4a16-asym-g32-edge", {"symmetric": True}),
        ("ct-w4a16-g128", {"symmetric": False}),
        ("ct-w4a16-g128", {"actorder": "group"}),
        ("ct-old-w4a16-g128-actorder-group", {"actorder": None}),
        ("ct-w4a8-g128", {"num_bits": 8}),
        ("ct-w8a8-dynamic", {"num_bits": 4}),
        ("ct-w8a8-dynamic", {"strategy": "block", "block_structure": [16, 32]}),
        ("ct-fp8-block", {"type": "int"}),
    ],
)
def test_a_second_group_does_not_change_a_layer(name: str, weights: dict[str, Any], tmp_path: Path) -> None:
    before, after = weight_of(DATA / name), weight_of(with_group(tmp_path, name, **weights))
    assert after.describe() == before.describe()
    assert torch.equal(after.dequantize(), before.dequantize())


def test_two_groups_of_sizes_that_fit_alike_are_refused(tmp_path: Path) -> None:
    """Rows of 20 codes of 2 bits, and of 3 in the old way and in the new one, have two words each."""
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.20.0"}
    groups = {str(bits): {"weights": {"num_bits": bits, "strategy": "channel"}} for bits in (2, 3)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**config, "config_groups": groups}}))
    words = torch.zeros(4, 2, dtype=torch.int32)
    tensors = {"weight_packed": words, "weight_scale": torch.ones(4, 1), "weight_shape": torch.tensor([4, 20])}
    save_file({f"fc.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc: the shapes of its tensors fit 2 settings"):
        weight_of(tmp_path)


def test_blocks_of_integers_have_a_scale_for_some_rows(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (20, 96), dtype=torch.int8)
    scale = torch.rand(3, 2) + 0.1
    weights = {"num_bits": 8, "strategy": "block", "block_structure": [8, 64]}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({"fc.weight": codes, "fc.weight_scale": scale}, tmp_path / "model.safetensors")
    expected = torch.stack([scale[row // 8].repeat_interleave(64)[:96] * codes[row] for row in range(20)])
    weight = weight_of(tmp_path)
    assert torch.equal(weight.dequantize(), expected)
    assert str(fit(weight).scheme) == "w8a16g64"


@pytest.mark.parametrize(
    ("weights", "rule"),
    [
        ({"strategy": "block"}, r"block_structure None: must be two powers of 2"),
        ({"strategy": "block", "block_structure": [0, 1]}, r"block_structure \[0, 1\]: must be two powers of 2"),
        ({"strategy": "block", "block_structure": [9, 32]}, r"block_structure \[9, 32\]: must be two powers of 2"),
        ({"type": "float", "num_bits": 6}, r"num_bits 6: of floats, must be one of \(4, 8\)"),
        ({"type": "float", "symmetric": False}, r"symmetric False: of floats, must be true"),
        ({"type": "posit"}, r"type 'posit': must be 'int' or 'float'"),
    ],
)
def test_settings_that_no_library_writes_are_refused(weights: dict[str, Any], rule: str, tmp_path: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        for group in told["config_groups"].values():
            group["weights"].update(weights)

    with pytest.raises(CheckpointError, match=rule):
        open_foreign(changed(tmp_path, "ct-w8a8-dynamic", config=change))


def test_scales_of_a_cache_are_told_and_not_used(tmp_path: Path) -> None:
    path = changed(tmp_path, "ct-w8a8-dynamic", config=lambda told: told.update(kv_cache_scheme={"num_bits": 8}))
    tensors: dict[str, Tensor] = load_file(path / "model.safetensors")
    name = next(iter(tensors)).rpartition(".")[0]
    scales = {f"{name.rpartition('.')[0]}.{one}_scale": torch.ones(1) for one in "kv"}
    save_file({**tensors, **scales}, path / "model.safetensors")
    opened = open_foreign(path)[1]
    assert not opened.parts.keys() & scales.keys()
    assert opened.notes[0].startswith("2 scales of a quantized cache of keys and values")
    (path / "config.json").write_text((DATA / "ct-w8a8-dynamic" / "config.json").read_text())
    assert opened.notes
    assert open_foreign(path)[1].parts.keys() >= scales.keys()  # which no model has: they are then refused
