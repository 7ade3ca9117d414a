"""nybble.load_pretrained: checkpoints of other libraries as models."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.__main__ import _parser, main
from nybble.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "foreign"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}
WEIGHTS: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"all": {"weights": WEIGHTS, "input_activations": INPUTS, "targets": ["Linear"]}},
}


def rounded(weight: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    scale = (weight.abs().amax(1, keepdim=True) / -lowest).to(torch.bfloat16)
    codes = (weight / scale.float()).round().clamp(lowest, 127).to(torch.int8)
    codes[0, 0] = lowest
    return codes, scale


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint of int8 rows, and the dense model of its weights."""
    return write(tmp_path, -127)


def write(
    directory: Path, lowest: int, negative: bool = False, groups: int = 0, **config: object
) -> tuple[Path, nn.Module]:
    """negative: the first row has a negative scale. groups: inputs that share a scale; 0: a row does."""
    torch.manual_seed(0)
    told = transformers.LlamaConfig(**SIZES, **HEADS, attention_bias=True, tie_word_embeddings=True, **config)
    model = transformers.LlamaForCausalLM(told).eval()
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            codes, scale = rounded(layer.weight.detach(), lowest)
            scale[:1] *= -1 if negative else 1
            if groups:
                scale = scale * (1 + torch.arange(codes.shape[1] // groups) % 2).to(scale)
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
            layer.weight.data = codes * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
            if layer.bias is not None:
                layer.bias.data.normal_()
                tensors[f"{name}.bias"] = layer.bias.data.clone()
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    named = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "quantization_config": deepcopy(INT8)}
    if groups:
        of_weights = named["quantization_config"]["config_groups"]["all"]["weights"]
        of_weights |= {"strategy": "group", "group_size": groups}
    (directory / "config.json").write_text(json.dumps(told.to_dict() | named))
    return directory, model


def test_every_layer_is_exact_and_the_model_runs(written: tuple[Path, nn.Module]) -> None:
    directory, dense = written
    model, report = nybble.load_pretrained(directory)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nybble.nn.Linear)}
    assert len(layers) == len(report.layers) == 14
    assert all(row.exact and math.isinf(row.sqnr_db) and row.scheme == "w8a16" for row in report.layers)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantized_weight(), dense.get_submodule(name).weight)
    tokens = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        found, expected = model(tokens).logits, dense(tokens).logits
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "14 of 14 layers are held exactly" in str(report)
    assert {row["sqnr_db"] for row in json.loads(report.to_json())["layers"]} == {None}


def test_a_negative_scale_beside_the_lowest_code_is_held(tmp_path: Path) -> None:
    """The mirrored code would be 128: the row gets a zero point."""
    directory, dense = write(tmp_path, -128, negative=True)
    model, report = nybble.load_pretrained(directory, act_bits=8)
    assert all(row.exact and row.scheme == "w8a8asym" for row in report.layers)
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.dequantized_weight(), dense.model.layers[1].mlp.up_proj.weight)


def test_groups_that_no_scheme_has_are_rounded_again_and_it_is_said(tmp_path: Path) -> None:
    directory, dense = write(tmp_path, -127, groups=8)
    model, report = nybble.load_pretrained(directory, act_bits=8)
    row = next(row for row in report.layers if row.name == "model.layers.1.mlp.up_proj")
    assert not row.exact
    assert row.scheme == "w8a8"
    assert row.why is not None
    assert "groups of 8" in row.why
    layer = model.model.layers[1].mlp.up_proj
    weight, new = dense.model.layers[1].mlp.up_proj.weight.detach(), layer.dequantized_weight()
    noise = (weight - new).square().sum()
    assert row.sqnr_db == pytest.approx(10 * math.log10(weight.square().sum() / noise), abs=0.01)
    assert row.sqnr_db > 40
    assert "0 of 14 layers are held exactly" in str(report)
    assert "rounded again" in str(report)
    assert max(map(len, str(report).splitlines())) <= 120


def test_a_model_has_the_dtype_that_was_asked_for(written: tuple[Path, nn.Module]) -> None:
    model, _ = nybble.load_pretrained(written[0], dtype=torch.bfloat16)
    assert model.get_submodule(NAME).dtype == torch.bfloat16
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: is missing in the checkpoint"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias: is missing in the checkpoint"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"(embed_tokens|lm_head)\.weight: is missing in the checkpoint"),
        (lambda t: t.update({"model.more.weight": torch.ones(3)}), r"model\.more\.weight: the model has no such parameter"),
        (lambda t: t.update({f"{NAME}.bias": torch.ones(128)}), r"up_proj\.bias: is not 0, and the model has no such"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"model\.norm\.weight: is \(63,\).*must be \(64,\)"),
        (
            lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, :32].contiguous()}),
            r"up_proj: is \(128, 32\) in the checkpoint, and \(128, 64\) in the model",
        ),
        (
            lambda t: t.update({f"{NAME}x.{part}": t.pop(f"{NAME}.{part}") for part in ("weight", "weight_scale")}),
            r"up_projx: the model has no such module",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_named(written: tuple[Path, nn.Module], change: Any, rule: str) -> None:
    directory, _ = written
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rule):
        nybble.load_pretrained(directory)


def test_biases_of_zeros_that_a_writer_adds_are_left_out(written: tuple[Path, nn.Module]) -> None:
    directory, _ = written
    tensors = load_file(directory / "model.safetensors") | {f"{NAME}.bias": torch.zeros(128)}
    save_file(tensors, directory / "model.safetensors")
    model, _ = nybble.load_pretrained(directory)
    assert model.get_submodule(NAME).bias is None


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("architectures", ["os"], r"architectures \['os'\]: must name a model of transformers"),
        ("architectures", None, "must name a model of transformers"),
        ("dtype", "int8", "dtype 'int8': must be one of"),
    ],
)
def test_a_wrong_configuration_is_named(written: tuple[Path, nn.Module], key: str, value: object, rule: str) -> None:
    directory, _ = written
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=rule):
        nybble.load_pretrained(directory)


def test_an_imported_model_is_saved_as_nybbles_own(written: tuple[Path, nn.Module], tmp_path: Path) -> None:
    directory, _ = written
    model, _ = nybble.load_pretrained(directory)
    nybble.save(model, tmp_path / "own")
    with nybble.skeleton():
        fresh = transformers.LlamaForCausalLM(model.config).eval()
    nybble.load(fresh, tmp_path / "own")
    assert torch.equal(fresh.get_submodule(NAME).dequantized_weight(), model.get_submodule(NAME).dequantized_weight())


# --- nybble import


def test_the_examples_of_import_run(
    written: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, dense = written
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  nybble import ")]
    out = tmp_path / "new"
    words, other = [[{"DIR": str(directory), "OUT": str(out)}.get(word, word) for word in line[1:]] for line in lines]
    assert _parser().parse_args(other).act_bits == 8, "a GGUF file, as in test_foreign_gguf_model"
    assert main(words) == 0
    assert "14 of 14 layers are held exactly" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"nybble.json", "config.json", "report.json", "tokenizer.json"}
    config = transformers.LlamaConfig.from_pretrained(out)
    with nybble.skeleton():
        fresh = transformers.LlamaForCausalLM(config).eval()
    nybble.load(fresh, out)
    assert torch.equal(fresh.get_submodule(NAME).dequantized_weight(), dense.get_submodule(NAME).weight)
    assert main(words) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err


def test_an_import_that_fails_writes_nothing(
    written: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = written
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(directory), "--out", str(tmp_path / "new"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "nybble: model.norm.weight: is missing in the checkpoint\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: tensors["zz.scales"].view(-1)[:1].fill_(torch.nan), "zz"),
        (
            lambda tensors: tensors.update({"norm.other": torch.ones(8)}),
            r"norm\.other: the model has no such parameter",
        ),
        (lambda tensors: tensors.update({"norm.running_var": torch.ones(3)}), r"norm\.running_var: is \(3,\)"),
    ],
    ids=["a later layer", "a parameter", "a later buffer"],
)
def test_a_given_model_is_as_it_was_after_a_refusal(tmp_path: Path, damage: Any, words: str) -> None:
    source = DATA / "gptq-w8-g128"
    tensors, old = load_file(source / "model.safetensors"), "model.layers.1.self_attn.k_proj"
    tensors = {name.replace(old, one): value.clone() for name, value in tensors.items() for one in ("aa", "zz")}
    tensors |= {"norm.weight": torch.full((8,), 2.0), "norm.running_mean": torch.full((8,), 3.0)}
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    def made() -> nn.Module:
        parts = {"aa": nn.Linear(256, 128, bias=False), "zz": nn.Linear(256, 128, bias=False)}
        return nn.ModuleDict({**parts, "norm": nn.BatchNorm1d(8)})

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = nybble.load_pretrained(tmp_path, model=made()).model
    assert (type(model["aa"]), type(model["zz"])) == (nybble.nn.Linear, nybble.nn.Linear)
    assert (model["norm"].weight[0], model["norm"].running_mean[0]) == (2.0, 3.0)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = made()
    held = [*model.modules(), *model.parameters(), *model.buffers()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        nybble.load_pretrained(tmp_path, model=model)
    assert all(a is b for a, b in zip(held, [*model.modules(), *model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
