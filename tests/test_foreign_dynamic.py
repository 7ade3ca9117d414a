"""GPTQ's `dynamic` and auto-round's `extra_config`: settings of single layers, told by expressions that are never run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign

pytest.importorskip("safetensors")
from safetensors.torch import save_file

N, K = 32, 128
COMMON: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "checkpoint_format": "gptq_v2",
}


def layer(name: str, bits: int, size: int, zero: int | None) -> dict[str, Tensor]:
    """The tensors of a layer with random codes, and a scale of 1 everywhere."""
    groups, each = -(-K // size), 32 // bits
    zeros = torch.randint(0, 1 << bits, (groups, N)) if zero is None else torch.full((groups, N), zero)
    words = sum(zeros.view(groups, -1, each)[..., i] << bits * i for i in range(each))
    return {
        f"{name}.qweight": torch.randint(-(2**31), 2**31, (K * bits // 32, N)).to(torch.int32),
        f"{name}.qzeros": torch.as_tensor(words).to(torch.uint32).view(torch.int32),
        f"{name}.scales": torch.ones(groups, N, dtype=torch.float16),
        f"{name}.g_idx": (torch.arange(K) // size).to(torch.int32),
    }


def write(path: Path, layers: dict[str, tuple[int, int, int | None]], dynamic: object, **config: object) -> Path:
    tensors = {}
    for name, told in layers.items():
        tensors |= layer(name, *told)
    save_file(tensors | {"head.weight": torch.ones(4, 4)}, path / "model.safetensors")
    told = COMMON | config | {"dynamic": dynamic}
    (path / "config.json").write_text(json.dumps({"quantization_config": told}))
    return path


LAYERS: dict[str, tuple[int, int, int | None]] = {
    "blocks.0.up": (4, 128, 8),
    "blocks.0.down": (8, 32, 128),
    "blocks.1.up": (4, 32, None),
    "blocks.1.down": (2, 128, None),
}
RULES = {
    "-:.*head.*": {},
    r"+:.*\.0\.down": {"bits": 8, "group_size": 32},
    r".*\.1\.(up|gate)$": {"group_size": 32, "sym": False},
    r"+:^blocks\.1\.down$": {"bits": 2, "sym": False},
}


def test_the_shapes_tell_what_an_expression_is_for(tmp_path: Path) -> None:
    opened = open_foreign(write(tmp_path, LAYERS, RULES))[1]
    for name, (bits, size, zero) in LAYERS.items():
        weight = opened.layers[name].read()
        assert (weight.bits, weight.group_size, weight.shape) == (bits, size, (N, K)), name
        assert (weight.zero if isinstance(weight.zero, int) else None) == zero, name
        assert weight.dequantize().abs().max() > 1 << bits - 2


def test_the_settings_of_auto_round(tmp_path: Path) -> None:
    rules = {
        "blocks.0.down": {"bits": 8, "group_size": 32},
        "blocks.1.up": {"group_size": 32, "sym": False},
        ".*1\\.down.*": {"bits": 2, "sym": False},
        "head": {"bits": 16},
    }
    told = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "extra_config": rules}
    opened = open_foreign(write(tmp_path, LAYERS, {}, **told))[1]
    found = {name: layer.read() for name, layer in opened.layers.items()}
    assert {name: (w.bits, w.group_size) for name, w in found.items()} == {
        name: (bits, size) for name, (bits, size, _) in LAYERS.items()
    }


def test_an_expression_is_not_run(tmp_path: Path) -> None:
    started = time.monotonic()
    name = "a" * 64 + "!"
    rules = {"+:(a+)+$": {"bits": 8}, "-:(a+)+$": {}, "+:(": {"bits": 2}}
    opened = open_foreign(write(tmp_path, {name: (4, 128, 8)}, rules))[1]
    assert opened.layers[name].read().bits == 4
    assert time.monotonic() - started < 5


def test_zero_points_are_read_where_one_of_two_settings_has_none(tmp_path: Path) -> None:
    """Both fit the shapes: a layer may be of either, and its zero points are in the file anyway."""
    rules = {"+:.*other.*": {"sym": False}}
    weight = open_foreign(write(tmp_path, {"fc": (4, 128, None)}, rules))[1].layers["fc"].read()
    assert isinstance(weight.zero, Tensor)


def test_shapes_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    """Three groups of 48 columns, or two of 50 and another: both are three."""
    rules = {"+:.*a.*": {"group_size": 50}}
    path = write(tmp_path, {"fc": (4, 48, 8)}, rules, group_size=48)
    with pytest.raises(CheckpointError, match=r"fc\.scales: its shape fits .* group_size 48, 50: must be one"):
        open_foreign(path)


def test_shapes_that_fit_no_setting_are_refused(tmp_path: Path) -> None:
    rules = {"+:.*a.*": {"group_size": 64}}
    opened = open_foreign(write(tmp_path, {"fc": (4, 32, 8)}, rules))[1]
    with pytest.raises(CheckpointError, match=r"fc\.scales: is \(4, 32\), must be \(1, 32\)"):
        opened.layers["fc"].read()


@pytest.mark.parametrize(
    ("dynamic", "rule"),
    [
        ([], None),
        ([1], r"dynamic \[1\]: must be an object"),
        ({"+:.*": 1}, r"dynamic '\+:\.\*': must have an object of settings"),
        ({"+:.*": {"bits": 7}}, r"dynamic '\+:\.\*': bits 7: must be one of"),
        ({r"^fc$": {"group_size": 0}}, r"group_size 0: must be -1"),
    ],
)
def test_wrong_rules_are_refused(dynamic: object, rule: str | None, tmp_path: Path) -> None:
    path = write(tmp_path, {"fc": (4, 128, 8)}, dynamic)
    if rule is None:
        assert open_foreign(path)[1].layers["fc"].read().bits == 4
        return
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(path)
