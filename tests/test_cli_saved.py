"""The command line on a directory that transformers' save_pretrained wrote of a model with nybble's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.__main__ import main
from nybble.checkpoint import CheckpointError

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file

from nybble.hf.versions import why_too_old

pytestmark = pytest.mark.skipif(why_too_old() is not None, reason="transformers is too old to save nybble's layers")
IDS = torch.arange(12).reshape(1, 12)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small decoder with a tied head, and layers of two schemes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    nybble.quantize(model, "w8a8", goal="memory", include="*.up_proj")
    nybble.quantize(model, "w4a16g32", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def said(capsys: Any, *words: object) -> Any:
    """What a command that succeeds prints with --json."""
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_inspect_and_report_show_its_layers(saved: Path, capsys: Any) -> None:
    found = said(capsys, "inspect", saved)
    assert found["format"] == "nybble"
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["model.layers.0.mlp.up_proj"]["scheme"] == "w8a8"
    assert rows["model.layers.0.mlp.down_proj"]["shape"] == [32, 64]
    assert {"model.embed_tokens", "lm_head"} <= rows.keys()
    stored = load_file(saved / "model.safetensors")
    assert found["nbytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert said(capsys, "report", saved) == found
    assert main(["inspect", str(saved)]) == 0
    assert "format nybble" in capsys.readouterr().out


def test_import_makes_a_checkpoint_that_nybble_loads(saved: Path, tmp_path: Path, capsys: Any) -> None:
    report = said(capsys, "import", saved, "--out", tmp_path / "out")
    assert all(row["exact"] for row in report["layers"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    nybble.load(model, tmp_path / "out")
    expected = transformers.LlamaForCausalLM.from_pretrained(saved, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_export_writes_what_it_writes_of_nybbles_own(format: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    said(capsys, "import", saved, "--out", tmp_path / "own")
    for name, source in (("one", saved), ("two", tmp_path / "own")):
        more = ("--format", format, "--round-scales", "--out", tmp_path / name)
        assert said(capsys, "export", source, *more)["format"] == format
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] == format


def fails(capsys: Any, *words: object) -> str:
    """The line that a command prints that fails."""
    assert main(list(map(str, words))) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return str(err)


def test_what_cannot_be_done_exits_1_with_one_line(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = ("--out", tmp_path / "out")
    assert "--act-bits 8: the layers" in fails(capsys, "import", saved, "--act-bits", "8", *out)
    assert "`nybble import`" in fails(capsys, "quantize", saved, "--scheme", "w8a8", *out)
    assert "--round-scales rounds them" in fails(capsys, "export", saved, "--format", "gptq", *out)
    with pytest.raises(CheckpointError, match="from_pretrained of transformers loads them"):
        nybble.load_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["stored"]["layers"][0]["scheme"] = "w4b16"
    (saved / "config.json").write_text(json.dumps(config))
    for command in (("inspect", saved), ("report", saved), ("import", saved, *out)):
        assert "w4b16" in fails(capsys, *command)
    del config["quantization_config"]["stored"]
    (saved / "config.json").write_text(json.dumps(config))
    assert "quantization_config.stored: must be an object" in fails(capsys, "inspect", saved)
    assert not (tmp_path / "out").exists()
