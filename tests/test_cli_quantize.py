"""`nybble quantize`: from a directory of transformers to one that nybble.load reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.__main__ import main
from nybble.demo.model import load, model_dir

transformers: Any = pytest.importorskip("transformers")

RECIPE = {"schema": "nybble.recipe/1", "stages": [{"pass": "quantize", "scheme": "w4a16g32", "goal": "memory"}]}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small decoder in bfloat16, as transformers saves one."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def arguments(folder: Path, model: Path, recipe: dict[str, Any] | None = None, *more: str) -> list[str]:
    (folder / "r.json").write_text(json.dumps(recipe or RECIPE), encoding="utf-8")
    return ["quantize", "--recipe", str(folder / "r.json"), "--model", str(model), "--out", str(folder / "out"), *more]


def test_the_output_loads_and_is_what_the_passes_make(tmp_path: Path, llama: Path, capsys: Any) -> None:
    assert main(arguments(tmp_path, llama)) == 0
    assert "stage 1 of 1: quantize" in capsys.readouterr().out
    loaded, expected = (transformers.LlamaForCausalLM.from_pretrained(llama, dtype="auto").eval() for _ in range(2))
    nybble.load(loaded, tmp_path / "out")
    nybble.quantize(expected, "w4a16g32", goal="memory")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert str(loaded.model.layers[0].mlp.up_proj.scheme) == "w4a16g32"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 32
    assert nybble.Recipe.load(tmp_path / "out" / "recipe.json").to_dict()["stages"] == RECIPE["stages"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out", "r.json"], "nothing is left beside it"


def test_json(tmp_path: Path, llama: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    assert main(arguments(tmp_path, llama, None, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "nybble.optimized/1"
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))


def test_calibration_by_the_tokenizer_of_the_model(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text\nabout nothing." for i in range(9)), encoding="utf-8")
    stages = [{"pass": "sparsify", "layers": {"*.0.*.query": "sp24w8a8"}, "goal": "memory"}]
    done = main(
        arguments(tmp_path, model_dir(), {**RECIPE, "stages": stages}, "--calibration", str(text), "--texts", "4")
    )
    assert (done, capsys.readouterr().err) == (0, "")
    model = load().model
    nybble.load(model, tmp_path / "out")
    assert str(model.encoder.layer[0].attention.self.query.scheme) == "sp24w8a8"
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["reports"][0]
    assert [row["pruned"]["method"] for row in report["layers"] if row["swapped"]] == ["wanda"]


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _config(**changes: Any) -> Any:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("damage", "recipe", "more", "why"),
    [
        (_no_weights, None, (), "model.safetensors"),
        (_pickled, None, (), "model.safetensors"),
        (_config(architectures=["Evil"], auto_map={"AutoModel": "evil.Evil"}), None, (), "has no model 'Evil'"),
        (_config(architectures=["GenerationMixin"]), None, (), "has no model 'GenerationMixin'"),
        (_config(architectures=None), None, (), "has no 'architectures'"),
        (lambda model: (model / "config.json").unlink(), None, (), "must be a directory of a transformers model"),
        (None, {"schema": "other"}, (), "line 1: schema"),
        (None, {**RECIPE, "stages": [{"pass": "sparsify", "pattern": "2:4"}]}, (), "needs calibration data"),
        (None, None, ("--calibration", "none.txt"), "none.txt"),
        (None, None, ("--texts", "0", "--calibration", "none.txt"), "--texts 0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_exits_1_with_one_line(
    tmp_path: Path, llama: Path, capsys: Any, damage: Any, recipe: Any, more: tuple[str, ...], why: str
) -> None:
    if damage is not None:
        damage(llama)
    assert main(arguments(tmp_path, llama, recipe, *more)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("nybble: ")
    assert why in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_not_touched(tmp_path: Path, llama: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine", encoding="utf-8")
    assert main(arguments(tmp_path, llama)) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, llama: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("nybble.commands.quantize.save", full)
    assert main(arguments(tmp_path, llama)) == 1
    assert "no space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "r.json"]
