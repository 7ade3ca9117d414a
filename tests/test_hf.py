"""transformers' from_pretrained and save_pretrained with nybble: models of the usual kinds, small and random."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.fusion.block import fused_modules

transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from .hf_models import MODELS


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def reloaded(model: Any, directory: Path) -> Any:
    """The model of a directory; nothing may be missing or unexpected in it."""
    found, told = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(told.values()), told
    return found


@pytest.fixture
def dense(tmp_path: Path) -> Callable[[str], tuple[Any, dict[str, Tensor], Path]]:
    """A model by its name, an input of it, and a directory that it was saved in."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor], Path]:
        model, inputs = (one() for one in MODELS[name])
        model.to(dtype).save_pretrained(tmp_path / name)
        cast = {key: one.to(dtype) if one.is_floating_point() else one for key, one in inputs.items()}
        return model, cast, tmp_path / name

    return make


def linears(model: nn.Module) -> dict[str, str]:
    """Each layer of nybble, and its scheme."""
    return {name: str(one.scheme) for name, one in model.named_modules() if isinstance(one, nybble.nn.QuantizedModule)}


# --- each kind of model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_loads_rounded_is_the_one_that_was_quantized(name, dense, tmp_path) -> None:
    model, inputs, directory = dense(name)
    rounded = type(model).from_pretrained(directory, quantization_config=nybble.HfConfig("w4a8g32"))
    nybble.quantize(model, "w4a8g32", goal="memory")
    expected = logits(model, inputs)
    assert torch.equal(logits(rounded, inputs), expected)
    assert linears(rounded) == linears(model)
    assert not any(isinstance(one, nn.Linear) for one in rounded.modules())
    for i, one in enumerate((model, rounded)):
        one.save_pretrained(tmp_path / str(i), max_shard_size="40KB")
        assert len(list((tmp_path / str(i)).glob("*.safetensors"))) > 1
        assert torch.equal(logits(reloaded(model, tmp_path / str(i)), inputs), expected)


@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.sampled(every=2)
def test_other_dtypes(name, dtype, dense, tmp_path) -> None:
    model, inputs, directory = dense(name, dtype)
    config = nybble.HfConfig("w8a8")
    rounded = type(model).from_pretrained(directory, quantization_config=config)
    assert rounded.dtype == dtype
    nybble.quantize(again := type(model).from_pretrained(directory), "w8a8", goal="memory")
    assert torch.equal(logits(rounded, inputs), logits(again, inputs))
    rounded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded(model, tmp_path / "saved"), inputs), logits(rounded, inputs))
    wide = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert wide.dtype == torch.float32
    inputs = {key: one.float() if one.is_floating_point() else one for key, one in inputs.items()}
    assert logits(wide, inputs).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe", "gpt2-tied", "t5-tied", "whisper-tied"])
@pytest.mark.parametrize(
    "how",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}],
    ids=["greedy", "static", "beams", "sampled"],
)
@pytest.mark.sampled(every=3)
def test_generate(name, how, dense, tmp_path) -> None:
    model, inputs, _directory = dense(name)
    nybble.quantize(model, "w8a8", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    again = reloaded(model, tmp_path / "saved")
    given = {key: one for key, one in inputs.items() if key != "decoder_input_ids"}
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    found = []
    for one in (model, again):
        torch.manual_seed(3)
        found.append(one.generate(**given, min_new_tokens=5, max_new_tokens=5, pad_token_id=2, **how))
    assert torch.equal(*found)
    assert found[0].shape[1] >= 5


# --- what is chosen


def test_layers_are_chosen_as_by_quantize(dense, tmp_path) -> None:
    model, inputs, directory = dense("llama")
    config = nybble.HfConfig(
        "w4a16g32", exclude=["lm_head", "*embed*"], per_layer={"*down_proj": "w8a8", "*layers.1.*o_proj": None}
    )
    rounded = type(model).from_pretrained(directory, quantization_config=config)
    nybble.quantize(model, "w8a8", goal="memory", include="*down_proj")
    nybble.quantize(model, "w4a16g32", goal="memory", exclude=["lm_head", "*embed*", "*down_proj", "*layers.1.*o_proj"])
    assert linears(rounded) == linears(model)
    assert torch.equal(logits(rounded, inputs), logits(model, inputs))
    assert rounded.hf_quantizer.left == {
        "model.embed_tokens": "excluded by '*embed*'",
        "model.layers.1.self_attn.o_proj": "per_layer['*layers.1.*o_proj'] is None",
        "lm_head": "excluded by 'lm_head'",
    }
    rounded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded(model, tmp_path / "saved"), inputs), logits(model, inputs))


def test_what_shares_a_dense_weight_stays_dense(dense) -> None:
    model, inputs, directory = dense("llama-tied")
    rounded = type(model).from_pretrained(directory, quantization_config=nybble.HfConfig("w8a8", exclude="lm_head"))
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    nybble.quantize(model, "w8a8", goal="memory", exclude="lm_head")
    assert torch.equal(logits(rounded, inputs), logits(model, inputs))
    assert "lm_head.weight, which stays dense" in rounded.hf_quantizer.left["model.embed_tokens"]


def test_experts_of_which_some_stay_dense(dense) -> None:
    model, inputs, directory = dense("qwen3-moe")
    config = nybble.HfConfig("w8a8", exclude="*layers.0.mlp.experts*")
    rounded = type(model).from_pretrained(directory, quantization_config=config)
    kinds = [type(layer.mlp.experts).__name__ for layer in rounded.model.layers]
    assert kinds == ["Qwen3MoeExperts", "Experts"]
    nybble.quantize(model, "w8a8", goal="memory", exclude="*layers.0.mlp.experts*")
    assert torch.equal(logits(rounded, inputs), logits(model, inputs))


def test_a_weight_with_nan_stays_dense(dense) -> None:
    model, _, directory = dense("llama")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    rounded = type(model).from_pretrained(directory, quantization_config=nybble.HfConfig("w8a8"))
    assert type(rounded.lm_head) is nn.Linear
    assert rounded.hf_quantizer.left == {"lm_head": "its weight has NaN or Inf"}


def test_heads_that_the_checkpoint_has_not(dense) -> None:
    """A new head for another task is random, as ever, and dense: it is to be trained."""
    model, inputs, directory = dense("bert-tied")
    other = transformers.BertForSequenceClassification
    rounded, told = other.from_pretrained(
        directory, quantization_config=nybble.HfConfig("w8a8"), output_loading_info=True
    )
    assert "classifier.weight" in told["missing_keys"]
    assert type(rounded.classifier) is nn.Linear
    assert rounded.hf_quantizer.left["classifier"] == "is not in the checkpoint"
    nybble.quantize(model, "w8a8", goal="memory")
    with torch.no_grad():
        hidden = [one.bert(**inputs)[0] for one in (rounded, model)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"scheme": "w9a8"}, ValueError, "w9a8"),
        ({"scheme": "sp24w8a8"}, ValueError, "scheme='sp24w8a8': sparse weights are chosen by nybble.sparsify"),
        ({"scheme": "w8a8static"}, ValueError, "scheme='w8a8static': the scale of static activations"),
        ({"scheme": "w8a8", "per_layer": {"*": "sp24w8a8"}}, ValueError, r"per_layer\['\*'\]='sp24w8a8'"),
        ({"scheme": "w8a8", "per_layer": "w4a8"}, TypeError, "per_layer='w4a8': must be a mapping"),
        ({"scheme": "w8a8", "method": "gptq"}, ValueError, "method='gptq': must be one of 'rtn', 'mse', 'hqq'"),
        ({"scheme": "w8a8", "exclude": [1]}, TypeError, r"exclude=\[1\]: must be a glob"),
        ({"exclude": "lm_head"}, ValueError, "scheme=None: include, exclude and per_layer choose layers"),
        ({"act_bits": 4}, ValueError, "act_bits=4: must be one of"),
        ({"quant_method": "gptq"}, ValueError, "quant_method='gptq': must be 'nybble'"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, said) -> None:
    with pytest.raises(error, match=said):
        nybble.HfConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scheme": "w8a8", "exclude": "nothing"}, "exclude=.*matches no layer"),
        ({"scheme": "w8a8", "per_layer": {"nothing": None}}, "per_layer=.*matches no layer"),
        ({}, "scheme=None: the checkpoint is not quantized; name the scheme"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_the_model(arguments, said, dense) -> None:
    model, _, directory = dense("llama")
    with pytest.raises(ValueError, match=said):
        type(model).from_pretrained(directory, quantization_config=nybble.HfConfig(**arguments))


# --- saving


def test_save_pretrained_after_other_passes(dense, tmp_path) -> None:
    """Sparse layers, static activations and a layer that was put there by hand."""
    model, inputs, _ = dense("llama")
    batches = [inputs] * 2
    nybble.sparsify(model, "2:4", scheme="w8a8", include="*mlp*", method="magnitude", goal="memory")
    nybble.quantize(model, "w8a8static", include="*self_attn*", calibration=batches, goal="memory")
    model.lm_head = nybble.nn.Linear.from_dense(model.lm_head, "w4a16g32asym")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    again = reloaded(model, tmp_path / "saved")
    assert linears(again) == linears(model)
    assert len(set(linears(again).values())) == 3
    assert torch.equal(logits(again, inputs), expected)


def test_a_static_head_that_shares_codes(dense, tmp_path) -> None:
    model, inputs, _ = dense("llama-tied")
    head = nybble.nn.Linear.from_weight(model.lm_head.weight, None, "w8a8static", act_range=(-3.0, 4.0))
    table = nybble.nn.Embedding.on_meta(96, 64, "w8a16", torch.float32).adopt(model.model.embed_tokens)
    table.tie_to(head)
    model.lm_head, model.model.embed_tokens = head, table
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    again = reloaded(model, tmp_path / "saved")
    assert torch.equal(again.lm_head.act_scale, head.act_scale)
    assert torch.equal(logits(again, inputs), expected)


def test_codes_that_are_shared_are_there_once(dense, tmp_path) -> None:
    model, _, _ = dense("llama-tied")
    nybble.quantize(model, "w8a8", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "model.embed_tokens.qweight" in names
    assert "lm_head.qweight" not in names
    again = reloaded(model, tmp_path / "saved")
    assert again.lm_head.weight_id == again.model.embed_tokens.weight_id


@pytest.mark.parametrize("name", ["llama-tied", "llama", "bert", "t5-tied"])
def test_the_inner_model_alone(name, dense, tmp_path) -> None:
    model, inputs, _ = dense(name)
    nybble.quantize(model, "w8a8", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    inside = model.encoder if name == "t5-tied" else model.base_model
    kind = transformers.T5EncoderModel if name == "t5-tied" else transformers.AutoModel
    inner = kind.from_pretrained(tmp_path / "saved")
    inner.save_pretrained(tmp_path / "inner")
    again = kind.from_pretrained(tmp_path / "inner")
    ids = inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(inner(ids)[0], inside(ids)[0])
        assert torch.equal(again(ids)[0], inside(ids)[0])


@pytest.mark.parametrize("name", ["llama-tied", "bert", "t5"])
def test_fused_models_run_fused_again(name, dense, tmp_path) -> None:
    model, inputs, _ = dense(name)
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.fuse(model, [inputs])
    fused = [key for key, one in fused_modules(model).items() if one.first is not None]
    assert fused
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    again = reloaded(model, tmp_path / "saved")
    assert list(fused_modules(again)) == fused
    logits(again, inputs)  # proves
    assert all(one.first is not None for one in fused_modules(again).values())
    assert torch.equal(logits(again, inputs), expected)


def test_saved_twice_and_changed_between(dense, tmp_path) -> None:
    model, inputs, directory = dense("llama")
    rounded = type(model).from_pretrained(directory, quantization_config=nybble.HfConfig("w8a8", exclude="lm_head"))
    rounded.save_pretrained(tmp_path / "1")
    once = reloaded(model, tmp_path / "1")
    nybble.quantize(once, "w4a16g32", goal="memory")
    once.save_pretrained(tmp_path / "2")
    twice = reloaded(model, tmp_path / "2")
    assert linears(twice)["lm_head"] == "w4a16g32"
    assert torch.equal(logits(twice, inputs), logits(once, inputs))


def test_a_model_that_became_dense_again_says_so(dense, tmp_path) -> None:
    model, inputs, _ = dense("llama")
    nybble.quantize(model, "w8a8", include="lm_head", goal="memory")
    model.save_pretrained(tmp_path / "1")
    model.lm_head = model.lm_head.dequantize()
    model.save_pretrained(tmp_path / "2")
    assert "quantization_config" not in json.loads((tmp_path / "2" / "config.json").read_text())
    assert torch.equal(logits(reloaded(model, tmp_path / "2"), inputs), logits(model, inputs))


def test_dense_models_are_saved_as_ever(dense) -> None:
    _, _, directory = dense("qwen3-moe")
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in load_file(directory / "model.safetensors")


def test_a_model_with_layers_of_two_libraries_is_refused(dense, tmp_path) -> None:
    model, _, _ = dense("llama")
    nybble.quantize(model, "w8a8", goal="memory")
    config = transformers.BitsAndBytesConfig.__new__(transformers.BitsAndBytesConfig)
    config.quant_method = "bitsandbytes"
    model.hf_quantizer = type("Other", (), {"quantization_config": config})()
    with pytest.raises(ValueError, match=r"layers of nybble and of bitsandbytes; call nybble\.save"):
        model.save_pretrained(tmp_path / "saved")


def test_a_transformers_that_cannot_load_it_refuses_to_save(dense, tmp_path, monkeypatch) -> None:
    from nybble.hf import register

    class Old:
        def __init__(self, model: nn.Module) -> None:
            self.modules = model.modules

        def save_pretrained(self, directory: Path) -> None:
            raise AssertionError("written")

    model, _, _ = dense("llama")
    register._guard(Old, usable=False)
    monkeypatch.setattr(register, "why_too_old", lambda: "transformers 4.57 has no way")
    with pytest.raises(AssertionError, match="written"):
        Old(model).save_pretrained(tmp_path)
    nybble.quantize(model, "w8a8", goal="memory")
    with pytest.raises(NotImplementedError, match=r"transformers 4\.57 has no way.*random weights; call nybble\.save"):
        Old(model).save_pretrained(tmp_path)


# --- damaged directories


def damaged(change: Callable[[dict[str, Any]], object], directory: Path) -> None:
    path = directory / "config.json"
    told = json.loads(path.read_text())
    change(told["quantization_config"]["stored"])
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(version=2), "version: '2'.*update nybble"),
        (lambda told: told.update(other=1), "stored: \"\\['other'\\]\": has other keys"),
        (lambda told: told.update(layers=[]), "layers: '\\[\\]': must be a list of groups"),
        (lambda told: told["layers"].append(told["layers"][0]), "layers: .*is there twice"),
        (lambda told: told["layers"][0].update(kind="Evil"), r"layers\[0\].kind: 'Evil': must be one of"),
        (lambda told: told["layers"][0].update(scheme="w9"), r"layers\[0\]: .*w9"),
        (lambda told: told["layers"][0].update(form="f9"), r"layers\[0\]: .*f9"),
        (lambda told: told["layers"][0].update(dtype="int8"), r"layers\[0\].dtype: 'int8': must be"),
        (lambda told: told["layers"][0].update(stored=-1), r"layers\[0\].stored: '-1': must be"),
        (lambda told: told["layers"][0].update(names=["a/b"]), r"layers\[0\].names: 'a/b': must be"),
        (lambda told: told.update(ties={"lm_head": "other"}), "ties: .*must name layers"),
        (lambda told: told.update(fused="x"), "fused: 'x': must be a list"),
        (lambda told: told["layers"][1]["names"].append("model.norm"), "model.norm: .*no such layer"),
        (lambda told: told["layers"][0].update(kind="Conv1d"), "a Conv1d in the checkpoint cannot replace"),
        (lambda told: told["layers"][1].update(scheme="w4a8g48"), "g48|48"),
    ],
)
def test_a_damaged_description_is_refused(change, said, dense, tmp_path) -> None:
    model, _, _ = dense("llama")
    nybble.quantize(model, "w8a8", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    damaged(change, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=said):
        type(model).from_pretrained(tmp_path / "saved")


def test_damaged_tensors_are_refused(dense, tmp_path) -> None:
    model, _, _ = dense("llama")
    nybble.quantize(model, "w8a8", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    path, name = tmp_path / "saved" / "model.safetensors", "model.layers.1.mlp.up_proj"
    whole = load_file(path)
    save_file({key: one for key, one in whole.items() if key != f"{name}.scale"}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.scale: is missing in the checkpoint"):
        type(model).from_pretrained(tmp_path / "saved")
    save_file({**whole, f"{name}.scale": torch.full_like(whole[f"{name}.scale"], float("nan"))}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.scale"):
        type(model).from_pretrained(tmp_path / "saved")
    save_file({**whole, f"{name}.scale": whole[f"{name}.scale"][:-1].clone()}, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "saved")


# --- processes of their own


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def saved(dense, tmp_path) -> Path:
    model, inputs, _ = dense("llama-tied")
    nybble.quantize(model, "w4a8g32", goal="memory")
    model.save_pretrained(tmp_path / "saved")
    save_file({"ids": inputs["input_ids"], "logits": logits(model, inputs)}, tmp_path / "expected.safetensors")
    return tmp_path / "saved"


_LOAD = """
import sys
{imports}
from pathlib import Path
import torch
from safetensors.torch import load_file
told = load_file(Path(sys.argv[1]).parent / "expected.safetensors")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    assert torch.equal(model(told["ids"]).logits, told["logits"])
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import nybble; assert 'transformers' not in sys.modules; import transformers",
        pytest.param("import transformers; transformers.PreTrainedModel; import nybble", marks=pytest.mark.full),
    ],
    ids=["nybble first", "transformers first"],
)
def test_it_loads_in_whichever_order_things_are_imported(imports, saved) -> None:
    done = run(_LOAD.format(imports=imports), saved)
    assert done.returncode == 0, done.stderr


def test_without_nybble_it_does_not_load(saved) -> None:
    """transformers would leave the layers random with a warning, were there not a weight of another shape for each."""
    done = run(_LOAD.format(imports="import transformers"), saved)
    assert done.returncode == 1
    assert "got nybble" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr


def test_device_maps(saved) -> None:
    pytest.importorskip("accelerate")
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = transformers.AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
        told = load_file(saved.parent / "expected.safetensors")
        with torch.no_grad():
            assert torch.equal(model(told["ids"]).logits, told["logits"])
    with pytest.raises(ValueError, match=r"device_map=.*cannot be offloaded to disk"):
        transformers.AutoModelForCausalLM.from_pretrained(
            saved, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=saved.parent / "off"
        )
