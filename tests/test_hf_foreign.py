"""from_pretrained of other libraries' checkpoints on nybble's kernels."""

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

transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from .hf_models import MODELS

TOKENS = torch.arange(3, 17).reshape(2, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(inputs or {"input_ids": TOKENS})).logits
    return found


def exported(format: str, scheme: str, name: str = "llama") -> Callable[[Path], Any]:
    """Writes a model as another library's checkpoint with nybble.save_pretrained; returns it."""

    def write(directory: Path) -> Any:
        model = MODELS[name][0]()
        exclude = [one for one in ("lm_head", "*embed*", "*gate.weight", "wte", "*wpe") if fits(model, one)]
        nybble.quantize(model, scheme, goal="memory", exclude=exclude)
        nybble.save_pretrained(model, directory, format=format, round_scales=True)
        return model

    return write


def fits(model: nn.Module, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for name, _ in model.named_modules())


def by_hand(pack: Callable[[nn.Linear], dict[str, Tensor]], told: dict[str, Any]) -> Callable[[Path], Any]:
    """Writes a Llama whose projections are packed by a function, which also gives the layer its rounded weight."""

    def write(directory: Path) -> Any:
        model = MODELS["llama"][0]()
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                tensors |= {f"{name}.{key}": one.contiguous() for key, one in pack(module).items()}
            elif getattr(module, "weight", None) is not None:
                tensors[f"{name}.weight"] = module.weight.detach()
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        named = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "quantization_config": told}
        (directory / "config.json").write_text(json.dumps(model.config.to_dict() | named))
        return model

    return write


def awq(layer: nn.Linear) -> dict[str, Tensor]:
    """4 bits in groups of 32 with zero points, eight outputs in a word in AWQ's order."""
    n, k = layer.weight.shape
    codes = torch.randint(0, 16, (n, k))
    zeros = torch.randint(0, 16, (n, k // 32))
    scales = (torch.rand(n, k // 32) / 64 + 0.001).half()
    layer.weight.data = ((codes - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)).float()

    def words(values: Tensor) -> Tensor:
        eight = values.t().reshape(values.shape[1], -1, 8)[..., list(AWQ_ORDER)]
        packed = (eight << (4 * torch.arange(8))).sum(-1)
        return (packed - ((packed >> 31) << 32)).to(torch.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.t()}


def int8(layer: nn.Linear) -> dict[str, Tensor]:
    """bitsandbytes' int8: a scale a row, w = code * SCB / 127."""
    scb = layer.weight.detach().abs().amax(1)
    codes = (layer.weight.detach() * 127 / scb[:, None]).round().to(torch.int8)
    layer.weight.data = codes * (scb[:, None] / 127)
    return {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}


FORMATS: dict[str, Callable[[Path], Any]] = {
    "gptq": exported("gptq", "w4a16g32asym"),
    "gptq-w8": exported("gptq", "w8a16"),
    "gptq-gpt2": exported("gptq", "w4a16g32", "gpt2"),
    "ct": exported("compressed-tensors", "w4a16g32"),
    "ct-w8a8": exported("compressed-tensors", "w8a8"),
    "ct-moe": exported("compressed-tensors", "w4a16g32", "qwen3-moe"),
    "awq": by_hand(awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "bnb": by_hand(int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path) -> tuple[Path, Any]:
    """A checkpoint of each format, and a model with its weights."""
    torch.manual_seed(0)
    return tmp_path / "other", FORMATS[request.param](tmp_path / "other")


def test_it_is_the_model_of_load_pretrained(checkpoint, tmp_path) -> None:
    """The codes of the file, on nybble's kernels; saved, it is nybble's."""
    directory, dense = checkpoint
    model, told = type(dense).from_pretrained(
        directory, quantization_config=nybble.HfConfig(), output_loading_info=True
    )
    assert not any(told.values()), told
    expected, report = nybble.load_pretrained(directory)
    assert torch.equal(logits(model), logits(expected))
    torch.testing.assert_close(logits(model), logits(dense), rtol=2e-2, atol=2e-2)
    layers = {name for name, one in model.named_modules() if isinstance(one, nybble.nn.QuantizedModule)}
    assert layers == {row.name for row in report.layers}
    assert model.hf_quantizer.report == report
    model.save_pretrained(tmp_path / "saved")
    again, told = type(dense).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(logits(again), logits(model))


def test_without_naming_a_configuration(tmp_path) -> None:
    dense = FORMATS["gptq"](tmp_path / "other")
    end = nybble.patch_transformers(act_bits=8)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        named = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
        same = transformers.GPTQConfig.from_dict(named)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other", quantization_config=same)
    finally:
        end()
    assert torch.equal(logits(again), logits(model))
    expected, _ = nybble.load_pretrained(tmp_path / "other", act_bits=8)
    assert type(model) is type(dense)
    assert model.model.layers[0].mlp.up_proj.scheme.act_bits == 8
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(ImportError, match=r"optimum|gptqmodel"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("act_bits", [4, None])
def test_wrong_activations(act_bits) -> None:
    with pytest.raises(ValueError, match=f"act_bits={act_bits}: must be one of"):
        nybble.patch_transformers(act_bits)


def test_static_activations_and_another_dtype(tmp_path) -> None:
    model, inputs = (one() for one in MODELS["llama"])
    nybble.quantize(model, "w8a8static", include="*mlp*", calibration=[inputs] * 2, goal="memory", observer="minmax")
    nybble.save_pretrained(model, tmp_path / "other", format="compressed-tensors", round_scales=True)
    config = nybble.HfConfig(act_bits=8)
    found = type(model).from_pretrained(tmp_path / "other", quantization_config=config, dtype=torch.bfloat16)
    expected, _ = nybble.load_pretrained(tmp_path / "other", act_bits=8, dtype=torch.bfloat16)
    assert any(one.scheme.static for one in found.modules() if isinstance(one, nybble.nn.Linear))
    assert torch.equal(logits(found), logits(expected))


def test_the_inner_model_alone(tmp_path) -> None:
    FORMATS["gptq"](tmp_path / "other")
    inner, told = transformers.AutoModel.from_pretrained(
        tmp_path / "other", quantization_config=nybble.HfConfig(), output_loading_info=True
    )
    assert not told["missing_keys"]
    assert told["unexpected_keys"] == {"lm_head.weight"}
    whole, _ = nybble.load_pretrained(tmp_path / "other")
    with torch.no_grad():
        assert torch.equal(inner(TOKENS)[0], whole.model(TOKENS)[0])


def test_weights_that_are_stored_without_their_zeros(tmp_path) -> None:
    """compressed-tensors' bitmask: nothing is quantized, and nybble computes the dense weights."""
    model = MODELS["llama"][0]()
    tensors = {name: one for name, one in model.state_dict().items() if not name.endswith("up_proj.weight")}
    for name, layer in model.named_modules():
        if name.endswith("up_proj"):
            layer.weight.data[:, ::3] = 0
            mask = layer.weight.detach() != 0
            bits = (mask.reshape(len(mask), -1, 8) * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
            counts = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)[:-1]))
            shape = torch.tensor(mask.shape)
            values = layer.weight.detach()[mask]
            parts = {"compressed": values, "bitmask": bits, "row_offsets": counts, "shape": shape}
            tensors |= {f"{name}.weight.{key}": one for key, one in parts.items()}
    told = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"]},
    }
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    named = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "quantization_config": told}
    (tmp_path / "other" / "config.json").write_text(json.dumps(model.config.to_dict() | named))
    found, info = type(model).from_pretrained(
        tmp_path / "other", quantization_config=nybble.HfConfig(), output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(found), logits(model))


def test_shards_and_symbolic_links(tmp_path) -> None:
    """As a cache of downloads has them."""
    FORMATS["ct"](tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    names = sorted(tensors)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "blobs").mkdir()
    files = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, cache / "blobs" / str(i), {"format": "pt"})
        file = f"model-0000{i + 1}-of-00002.safetensors"
        (cache / file).symlink_to(cache / "blobs" / str(i))
        files |= dict.fromkeys(part, file)
    (cache / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (cache / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    kind = transformers.AutoModelForCausalLM
    found = [kind.from_pretrained(one, quantization_config=nybble.HfConfig()) for one in (cache, tmp_path / "other")]
    assert torch.equal(*map(logits, found))


def test_one_configuration_for_several_models(tmp_path) -> None:
    config = nybble.HfConfig()
    for name in ("ct", "gptq-gpt2"):
        dense = FORMATS[name](tmp_path / name)
        found = type(dense).from_pretrained(tmp_path / name, quantization_config=config)
        assert found.config.quantization_config.stored["layers"]
    assert config.stored is None


def test_a_scheme_beside_codes_is_refused(tmp_path) -> None:
    FORMATS["gptq"](tmp_path / "other")
    with pytest.raises(ValueError, match=r"scheme='w8a8': the checkpoint in .* is quantized already \(gptq\)"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "other", quantization_config=nybble.HfConfig("w8a8")
        )


@pytest.mark.parametrize("key", ["qweight", "scales", "qzeros"])
def test_a_damaged_layer_is_refused(key, tmp_path) -> None:
    FORMATS["gptq"](tmp_path / "other")
    path, name = tmp_path / "other" / "model.safetensors", f"model.layers.1.mlp.up_proj.{key}"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other", quantization_config=nybble.HfConfig())


def test_layers_that_the_model_has_not_are_told(tmp_path) -> None:
    """As transformers does of any tensor that it does not use."""
    FORMATS["gptq"](tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"num_hidden_layers": 1}))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "other", quantization_config=nybble.HfConfig(), output_loading_info=True
    )
    assert "model.layers.1.mlp.up_proj.qweight" in info["unexpected_keys"]
    assert not any(name.startswith("model.layers.0.") for name in info["unexpected_keys"])
