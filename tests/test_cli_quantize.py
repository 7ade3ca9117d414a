"""`nybble quantize`: from a directory of transformers to one that nybble.load reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.__main__ import main
from nybble.demo.model import load, model_dir

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file

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
    return ["quantize", str(model), "--recipe", str(folder / "r.json"), "--out", str(folder / "out"), *more]


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


# --- without a recipe file


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of nybble's checkpoint in a directory."""
    (path,) = directory.glob("model-*.safetensors")
    found: dict[str, torch.Tensor] = load_file(path)
    return found


def shown_help(command: str, capsys: Any) -> list[list[str]]:
    """The words of each example in the help of a command."""
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    lines = [line.strip().removeprefix("example: ") for line in capsys.readouterr().out.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith(f"nybble {command} ")]


def test_the_examples_of_the_help_run(tmp_path: Path, llama: Path, capsys: Any, monkeypatch: Any) -> None:
    """On a model with a tokenizer, the first layers of the demo's."""
    model = tmp_path / "DIR"
    shutil.copytree(model_dir(), model)
    loaded = load().model
    loaded.encoder.layer = loaded.encoder.layer[:1]
    loaded.save_pretrained(model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(4)), encoding="utf-8")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    examples = shown_help("quantize", capsys)
    assert len(examples) == 3
    for i, words in enumerate(examples):
        assert main([f"OUT{i}" if word == "OUT" else word for word in words]) == 0
        assert "stage 1 of 1: quantize" in capsys.readouterr().out
        assert (tmp_path / f"OUT{i}" / "tokenizer.json").is_file()


def test_a_scheme_does_as_the_recipe_that_it_writes(tmp_path: Path, llama: Path, capsys: Any) -> None:
    words = [
        "quantize",
        str(llama),
        "--scheme",
        "w4a16g32",
        "--method",
        "mse",
        "--exclude",
        "lm_head",
        "--exclude",
        "*.0.*",
    ]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert (
        main(
            ["quantize", str(llama), "--recipe", str(tmp_path / "one" / "recipe.json"), "--out", str(tmp_path / "two")]
        )
        == 0
    )
    first, second = (stored(tmp_path / name) for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.layers.1.mlp.up_proj.qweight" in first
    assert "model.layers.0.mlp.up_proj.weight" in first
    assert "lm_head.weight" in first
    (stage,) = nybble.Recipe.load(tmp_path / "one" / "recipe.json").stages
    assert (stage.arguments["method"], stage.arguments["goal"]) == ("mse", "memory")


def test_a_sparse_scheme_prunes(tmp_path: Path, llama: Path, capsys: Any) -> None:
    words = ["quantize", str(llama), "--scheme", "sp24w8a8", "--method", "magnitude", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "stage 1 of 1: sparsify" in capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj.mask" in stored(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--scheme", "w5a8"], "argument --scheme: "),
        (["--scheme", "w8a8", "--recipe", "r.json"], "not allowed with argument --scheme"),
        ([], "one of the arguments --scheme --recipe is required"),
        (["--scheme", "w8a8", "--method", "none"], "argument --method: invalid choice"),
        (["--recipe", "r.json", "--method", "gptq"], "argument --method: not allowed with argument --recipe"),
        (["--recipe", "r.json", "--exclude", "*"], "argument --exclude: not allowed with argument --recipe"),
    ],
)
def test_wrong_usage_exits_2(tmp_path: Path, llama: Path, capsys: Any, words: list[str], why: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["quantize", str(llama), *words, "--out", str(tmp_path / "out")])
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: nybble quantize")
    assert why in err


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--method", "gptq"], "calibration"), (["--exclude", "none"], "none")],
)
def test_a_scheme_that_cannot_be_done_exits_1(
    tmp_path: Path, llama: Path, capsys: Any, words: list[str], why: str
) -> None:
    assert main(["quantize", str(llama), "--scheme", "w4a16g32", *words, "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert why in err
    assert not (tmp_path / "out").exists()


# --- nybble report


def test_report_shows_what_was_said_then(tmp_path: Path, llama: Path, capsys: Any) -> None:
    assert main(["quantize", str(llama), "--scheme", "w8a8", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == said
    ((words),) = shown_help("report", capsys)
    assert main([str(tmp_path / "out") if word == "DIR" else word for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "nybble.optimized/1"


def test_report_without_one_shows_what_is_there(tmp_path: Path, capsys: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "format nybble" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "nybble.inspect/1"


def test_report_of_another_directory_exits_1(tmp_path: Path, llama: Path, capsys: Any) -> None:
    assert main(["report", str(llama)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "has no nybble.json" in err


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
        (_config(quantization_config={"quant_method": "gptq"}), None, (), "`nybble import`"),
        (lambda model: (model / "config.json").unlink(), None, (), "must be beside the weights"),
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

    monkeypatch.setattr("nybble.commands.output.save", full)
    assert main(arguments(tmp_path, llama)) == 1
    assert "no space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "r.json"]
