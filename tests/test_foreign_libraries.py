"""What nybble writes is loaded by the libraries themselves, with the same weights bit for bit.

They need compressed-tensors (0.15 or later), or optimum and gptqmodel, besides transformers; without them tests skip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Linear, SparseLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


def llama(attention: str, mlp: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model whose projections of attention have one scheme, and those of the MLPs another, or none."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, attention_bias=True)
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    for pattern, scheme in (("*self_attn*", attention), ("*mlp*", mlp)):
        if scheme is not None and scheme.startswith("sp"):
            prune(model, scheme)
        elif scheme is not None:
            batches = [{"input_ids": torch.randint(96, (2, 8))} for _ in range(2)] if "static" in scheme else None
            nybble.quantize(model, scheme, goal="memory", include=pattern, calibration=batches)
    return model


def prune(model: nn.Module, scheme: str) -> None:
    """Two of four weights of each projection are 0."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith("_proj"):
            layer.weight.data.reshape(-1, 4)[:, ::2] = 0
            model.set_submodule(name, SparseLinear.from_dense(layer, scheme))


def loaded(directory: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    with torch.no_grad():  # compressed-tensors decompresses at the first call
        model(torch.arange(12).reshape(2, 6))
    return model


def same_weights(found: nn.Module, model: nn.Module, weight: Any) -> None:
    """Those of every quantized layer, in the dtype that the library dequantizes to, and every other parameter."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert layers
    for name, layer in layers.items():
        theirs = weight(found.get_submodule(name))
        mine = layer.float().dequantized_weight()
        assert torch.equal(theirs, mine.to(theirs.dtype)), name
    theirs = dict(found.named_parameters())
    for name, value in model.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(theirs[name], value), name


# --- compressed-tensors


def dequantizing() -> dict[str, Any]:
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a16", "w4a8g64", "w8a16", "w8a8", "w8a8static", "sp24w8a8"])
def test_compressed_tensors_loads_it(scheme: str, dequantize: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = llama(scheme, scheme)
    exact = scheme.startswith("w4") or dequantize  # else transformers casts float32 scales to bfloat16
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors", round_scales=not exact)
    if not exact:
        model, _ = nybble.load_pretrained(tmp_path / "out")
    found = loaded(tmp_path / "out", **(dequantizing() if dequantize else {}))
    same_weights(found, model, lambda layer: layer.weight)


def test_compressed_tensors_loads_float32_scales_into_float32(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = llama("w8a8", "w8a16", torch.float32)
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    same_weights(loaded(tmp_path / "out"), model, lambda layer: layer.weight)


@pytest.mark.parametrize("scheme", ["w4a16g32asym", "w4a16asym", "w4a8g32asym"])
def test_compressed_tensors_loads_zero_points(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = llama(scheme, scheme)
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    same_weights(loaded(tmp_path / "out", **dequantizing()), model, lambda layer: layer.weight)


@pytest.mark.parametrize(
    ("attention", "mlp"), [("w4a16g32", "w4a16g64"), ("w4a16g32", "w4a8g32"), ("w4a16g128", None), ("w4a8g32", None)]
)
def test_compressed_tensors_loads_several_schemes(attention: str, mlp: str | None, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = llama(attention, mlp)
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors", shard_bytes=60_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    same_weights(loaded(tmp_path / "out"), model, lambda layer: layer.weight)


def test_the_activations_of_compressed_tensors_are_nybbles(tmp_path: Path) -> None:
    """Rounded for each token with a zero point, or with the static scale: the outputs are as near as rounding lets them."""
    pytest.importorskip("compressed_tensors")
    tokens = torch.arange(18).reshape(2, 9)
    for scheme in ("w8a8", "w8a8static"):
        model = llama(scheme, scheme, torch.float32)
        nybble.save_pretrained(model, tmp_path / scheme, format="compressed-tensors")
        with torch.no_grad():
            theirs, mine = loaded(tmp_path / scheme)(tokens).logits, model(tokens).logits
            dense = loaded(tmp_path / scheme, **dequantizing())(tokens).logits
        assert (theirs - mine).norm() < 0.6 * (dense - mine).norm(), scheme


@pytest.mark.parametrize("dequantize", [False, True])
def test_compressed_tensors_loads_experts(dequantize: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **HEADS, **more))
    model.eval().to(torch.bfloat16)
    nybble.quantize(model, "w4a16g32", goal="memory", exclude=("lm_head", "*embed_tokens"))
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    found = loaded(tmp_path / "out", **(dequantizing() if dequantize else {}))
    for i in range(2):
        theirs, mine = found.model.layers[i].mlp.experts, model.model.layers[i].mlp.experts.close()
        assert torch.equal(theirs.gate_up_proj, mine.gate_up_proj)
        assert torch.equal(theirs.down_proj, mine.down_proj)
        attention = model.model.layers[i].self_attn.q_proj.dequantized_weight()
        assert torch.equal(found.model.layers[i].self_attn.q_proj.weight, attention)


# --- GPTQ


def gptq_weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.dequantize_weight().T if hasattr(layer, "dequantize_weight") else layer.weight
    return weight


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
@pytest.mark.parametrize(
    ("attention", "mlp"),
    [("w4a16g32", "w4a16g32"), ("w4a16g64asym", "w4a16g64asym"), ("w4a16", "w4a16"), ("w4a16g128", None)],
)
def test_gptqmodel_loads_it_in_transformers(
    attention: str, mlp: str | None, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    monkeypatch.setenv("CXX", "false")  # it compiles a kernel for minutes where it can
    pytest.importorskip("optimum")
    pytest.importorskip("gptqmodel")
    model = llama(attention, mlp)
    nybble.save_pretrained(model, tmp_path / "out", format=format)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_weights(found, model, gptq_weight)


def test_gptqmodel_reads_rules_for_single_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    monkeypatch.setenv("CXX", "false")
    gptqmodel = pytest.importorskip("gptqmodel")
    model = llama("w4a16g32", "w4a16g64")
    model.model.layers[1].mlp.down_proj = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    nybble.save_pretrained(model, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["dynamic"]) == 6
    tokenizer(tmp_path / "out")
    found = gptqmodel.GPTQModel.load(str(tmp_path / "out"), backend=gptqmodel.BACKEND.TORCH, device="cpu").model
    same_weights(found, model, gptq_weight)


def tokenizer(directory: Path) -> None:
    """The least that gptqmodel asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")))
    fast.add_special_tokens({"pad_token": "b", "eos_token": "b"})
    fast.save_pretrained(directory)
