"""Checkpoints with a tensor set for each expert, in models whose experts are fused; and static activations, and shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.nn.experts import Experts

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96} | HEADS
WEIGHTS: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "symmetric": True}
TOKENS = torch.arange(18).reshape(2, 9)


def told(inputs: dict[str, Any]) -> dict[str, Any]:
    groups = {"all": {"weights": WEIGHTS, "input_activations": inputs, "targets": ["Linear"]}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}


DYNAMIC = told({"num_bits": 8, "strategy": "token", "dynamic": True})


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def qwen() -> tuple[nn.Module, tuple[str, str, str], str]:
    sizes = SIZES | {"intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
    return transformers.Qwen3MoeForCausalLM(config).eval(), ("gate_proj", "up_proj", "down_proj"), "mlp"


def mixtral() -> tuple[nn.Module, tuple[str, str, str], str]:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval(), ("w1", "w3", "w2"), "block_sparse_moe"


Made = tuple[nn.Module, tuple[str, str, str], str]


def write(directory: Path, made: Made, quantized: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    """The experts and projections of a model in int8, by the names of files; the model then has these weights."""
    model, (gate, up, down), folder = made
    tensors: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor) -> None:
        codes, scale = rounded(weight)
        tensors.update({f"{name}.weight": codes, f"{name}.weight_scale": scale})
        weight.copy_(codes * scale.float())

    for name, value in model.state_dict().items():
        old = name.replace(".mlp.", f".{folder}.")
        if name.endswith("gate_up_proj"):
            for i, both in enumerate(value):
                for role, rows in ((gate, both[:32]), (up, both[32:])):
                    add(f"{old.removesuffix('.gate_up_proj')}.{i}.{role}", rows)
        elif name.endswith("experts.down_proj"):
            for i, matrix in enumerate(value):
                add(f"{old.removesuffix('.down_proj')}.{i}.{down}", matrix)
        elif "_proj" in name:
            add(name.removesuffix(".weight"), value)
        else:
            tensors[old] = value
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, directory / "model.safetensors")
    named = {"architectures": [type(model).__name__], "dtype": "float32", "quantization_config": DYNAMIC}
    (directory / "config.json").write_text(json.dumps(model.config.to_dict() | named))
    return model, tensors


@pytest.mark.parametrize("make", [qwen, mixtral])
def test_experts_are_exact_and_the_model_runs(make: Callable[[], Made], tmp_path: Path) -> None:
    dense, _ = write(tmp_path, make())
    model, report = nybble.load_pretrained(tmp_path)
    assert all(row.exact for row in report.layers)
    assert len(report.layers) == 2 * (4 + 4 * 2)
    for block, old in zip(model.model.layers, dense.model.layers, strict=True):
        experts = block.mlp.experts
        assert isinstance(experts, Experts)
        assert experts.explain() is None, "they run in one call"
        for i in range(4):
            assert torch.equal(experts.gate_up_proj[i].dequantized_weight(), old.mlp.experts.gate_up_proj[i])
            assert torch.equal(experts.down_proj[i].dequantized_weight(), old.mlp.experts.down_proj[i])
    with torch.no_grad():
        found, expected = model(TOKENS).logits, dense(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    write(tmp_path, qwen())
    model, _ = nybble.load_pretrained(tmp_path, act_bits=8)
    nybble.save(model, tmp_path / "out")
    with nybble.skeleton():
        again = transformers.Qwen3MoeForCausalLM(model.config).eval()
    nybble.load(again, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            lambda tensors: without(tensors, "layers.1.mlp.experts.2.up_proj"),
            r"layers\.1\.mlp\.experts\.gate_up_proj\.2: has gate, must have gate and up",
        ),
        (
            lambda tensors: without(tensors, "layers.1.mlp.experts.3"),
            r"layers\.1\.mlp\.experts\.(gate_up|down)_proj\.3\.weight: is missing in the checkpoint",
        ),
        (
            lambda tensors: tensors | {
                name.replace("experts.3", "experts.4"): value.clone() for name, value in tensors.items() if "experts.3" in name
            },
            r"experts\.(gate_up|down)_proj\.4: the model has no such module",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_experts_is_named(change: Any, rule: str, tmp_path: Path) -> None:
    _, tensors = write(tmp_path, qwen())
    save_file({name: value.clone() for name, value in change(tensors).items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rule):
        nybble.load_pretrained(tmp_path)


def test_gate_and_up_of_other_groups_are_refused(tmp_path: Path) -> None:
    """One layer cannot have two orders of columns, nor the rows of two widths."""
    _, tensors = write(tmp_path, qwen())
    name = "model.layers.0.mlp.experts.0.up_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:16].clone()
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:16].clone()
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj\.0: gate and up have shape \(32, 64\) and \(16, 64\)"):
        nybble.load_pretrained(tmp_path)


# --- static activations


@pytest.fixture
def static(tmp_path: Path) -> Path:
    _, tensors = write(tmp_path, qwen())
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        stem = name.removesuffix(".weight_scale")
        tensors[f"{stem}.input_scale"] = torch.tensor([0.0625], dtype=torch.bfloat16)
        tensors[f"{stem}.input_zero_point"] = torch.tensor([-5], dtype=torch.int8)
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": False}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": told(inputs)}))
    return tmp_path


def test_static_activations_are_those_of_the_file(static: Path) -> None:
    model, report = nybble.load_pretrained(static, act_bits=8)
    layer = model.model.layers[0].self_attn.q_proj
    assert str(layer.scheme) == "w8a8static"
    assert (layer.act_scale.item(), layer.act_zero_point.item()) == (0.0625, -5)
    assert str(model.model.layers[0].mlp.experts.gate_up_proj[1].scheme) == "w8a8static"
    x = torch.randn(3, 64)
    codes = ((x / 0.0625).round() - 5).clamp(-128, 127)
    with torch.no_grad():
        expected = ((codes + 5) * 0.0625).double() @ layer.dequantized_weight().double().t()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(model(TOKENS).logits).all()
    assert "static inputs (scale 0.0625) as in the file" in " ".join(str(report).split())


def test_static_activations_that_are_not_used_are_told(static: Path) -> None:
    model, report = nybble.load_pretrained(static)
    assert str(model.model.layers[0].self_attn.q_proj.scheme) == "w8a16"
    assert {row.inputs for row in report.layers} == {
        "static inputs (scale 0.0625) are not used: activations are floats"
    }
    assert f"{len(report.layers)} layers have static inputs in the file" in " ".join(str(report).split())
    assert max(map(len, str(report).splitlines())) <= 120


# --- shards


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    write(tmp_path, qwen())
    whole, _ = nybble.load_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + i * 3 // len(names):05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    sharded, report = nybble.load_pretrained(tmp_path)
    assert all(row.exact for row in report.layers)
    with torch.no_grad():
        assert torch.equal(sharded(TOKENS).logits, whole(TOKENS).logits)
