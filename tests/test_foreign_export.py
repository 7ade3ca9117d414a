"""nybble.save_pretrained of models of transformers, and `nybble export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.__main__ import main
from nybble.foreign import open_foreign

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
UP = "model.layers.0.mlp.up_proj"


def llama(scheme: str = "w4a16g32", tied: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, attention_bias=True, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    frequencies = model.model.rotary_emb.inv_freq
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies  # which no loader rounds
    nybble.quantize(model, scheme, goal="memory", **{"exclude": ("lm_head", "model.embed_tokens"), **options})
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(18).reshape(2, 9)).logits.float()
    return out


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_model_comes_back(format: str, tmp_path: Path) -> None:
    model = llama()
    report = nybble.save_pretrained(model, tmp_path / "out", format=format)
    assert "14 of 14 layers are written quantized, 14 exactly" in str(report)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert config["tie_word_embeddings"] is True
    assert (tmp_path / "out" / "generation_config.json").is_file()
    opened = open_foreign(tmp_path / "out")[1]
    assert "lm_head.weight" not in opened.parts
    again, imported = nybble.load_pretrained(tmp_path / "out")
    assert all(row.exact for row in imported.layers)
    assert torch.equal(logits(again), logits(model))


def test_what_is_not_quantized_is_ignored(tmp_path: Path) -> None:
    nybble.save_pretrained(llama(), tmp_path / "out", format="compressed-tensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head"]
    assert "dynamic" not in told
    nybble.save_pretrained(llama(), tmp_path / "gptq", format="gptq")
    told = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert not {"dynamic", "modules_in_block_to_quantize"} & told.keys()


def test_a_head_that_shares_its_codes_with_the_embedding_is_dense(tmp_path: Path) -> None:
    model = llama("w8a16", exclude=())
    assert model.lm_head.weight_id == model.model.embed_tokens.weight_id
    report = nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    dense = {row.name for row in report.layers if row.dense}
    assert dense == {"model.embed_tokens", "lm_head"}
    opened = open_foreign(tmp_path / "out")[1]
    assert torch.equal(opened.parts["model.embed_tokens.weight"].read(), model.model.embed_tokens.dequantized_weight())
    assert "lm_head.weight" not in opened.parts
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is True
    assert told["quantization_config"]["ignore"] == ["lm_head"]


def test_a_head_with_codes_of_its_own_is_untied(tmp_path: Path) -> None:
    model = llama(exclude=("model.embed_tokens",), untie=True)
    assert isinstance(model.lm_head, nybble.nn.Linear)
    model.config.tie_word_embeddings = True  # as a configuration that was not told says
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is False
    opened = open_foreign(tmp_path / "out")[1]
    assert torch.equal(opened.layers["lm_head"].read().dequantize().bfloat16(), model.lm_head.dequantized_weight())
    assert "model.embed_tokens.weight" in opened.parts


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    nybble.quantize(model, "w4a16g32", goal="memory", exclude=("lm_head", "*wte", "*wpe"))
    return model


def test_conv1d_is_no_linear_layer_of_compressed_tensors(tmp_path: Path) -> None:
    model, name = gpt2(), "transformer.h.0.mlp.c_fc"
    with pytest.raises(ValueError, match=r"c_attn and 3 more: is a Conv1D: compressed-tensors quantizes torch.nn.Lin"):
        nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    model.transformer.h[0].mlp.c_proj = nybble.nn.Linear.from_dense(nn.Linear(256, 64), "w4a16g32")
    nybble.save_pretrained(model, tmp_path / "gptq", format="gptq")
    opened = open_foreign(tmp_path / "gptq")[1]
    mine = model.get_submodule(name).dequantized_weight()
    assert torch.equal(opened.layers[name].read().dequantize(), mine)
    with pytest.raises(ValueError, match="has no layer that compressed-tensors holds"):
        nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors", dense=True)


def moe() -> Any:
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **HEADS, **more)).eval()
    nybble.quantize(model, "w4a16g32", goal="memory", exclude=("lm_head", "*embed_tokens"))
    return model


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_experts_are_written_one_by_one(format: str, tmp_path: Path) -> None:
    model = moe()
    nybble.save_pretrained(model, tmp_path / "out", format=format)
    opened = open_foreign(tmp_path / "out")[1]
    experts = model.model.layers[0].mlp.experts.close()
    for i in (0, 3):
        gate, up, down = (
            opened.layers[f"model.layers.0.mlp.experts.{i}.{name}"].read().dequantize()
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        assert torch.equal(torch.cat((gate, up)), experts.gate_up_proj[i])
        assert torch.equal(down, experts.down_proj[i])
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if format == "compressed-tensors":
        assert told["ignore"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    again, _ = nybble.load_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_experts_that_no_file_has_are_refused_or_dense(tmp_path: Path) -> None:
    model = moe()
    model.config.model_type = "unknown"
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts and 1 more: transformers reads no"):
        nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors", dense=True)
    opened = open_foreign(tmp_path / "out")[1]
    whole = model.model.layers[0].mlp.experts.close()
    for name, value in whole.state_dict().items():
        assert torch.equal(opened.parts[f"model.layers.0.mlp.experts.{name}"].read(), value)


# --- nybble export


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, nn.Module]:
    """nybble's own checkpoint of a model of transformers."""
    model = llama()
    nybble.save(model, tmp_path / "own")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    return tmp_path / "own", model


def test_the_example_of_export_runs(
    own: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, model = own
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    (words,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("example: ")]
    words = [{"DIR": str(directory), "OUT": str(tmp_path / "new")}.get(word, word) for word in words[2:]]
    assert main(words) == 0
    assert "14 of 14 layers are written quantized, 14 exactly" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "report.json", "report.txt"}
    again, _ = nybble.load_pretrained(tmp_path / "new")
    assert torch.equal(logits(again), logits(model))
    assert main(words) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq-v2"])
def test_what_export_writes_is_what_the_function_writes(
    format: str, own: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, model = own
    assert main(["export", str(directory), "--format", format, "--out", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == format
    nybble.save_pretrained(model, tmp_path / "same", format=format)
    one, other = (path / "model.safetensors" for path in (tmp_path / "new", tmp_path / "same"))
    assert one.read_bytes() == other.read_bytes()


def test_an_export_that_fails_writes_nothing(
    own: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = own
    before = sorted(tmp_path.iterdir())
    for name, rule in (("awq", "format='awq': must be one of 'compressed-tensors', "),):
        assert main(["export", str(directory), "--format", name, "--out", str(tmp_path / "new")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"nybble: {rule}")
        assert err.count("\n") == 1
    assert main(["export", str(tmp_path), "--format", "gptq", "--out", str(tmp_path / "new")]) == 1
    assert "has no nybble.json: must be a directory that nybble import or quantize, or" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_scales_are_rounded_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama("w8a16")
    nybble.save(model, tmp_path / "own")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    words = ["export", str(tmp_path / "own"), "--format", "gptq", "--out", str(tmp_path / "new")]
    assert main(words) == 1
    assert "not all of its float32 scales are float16" in capsys.readouterr().err
    assert main([*words, "--round-scales"]) == 0
    assert "14 of 14 layers are written quantized, 0 exactly" in capsys.readouterr().out
