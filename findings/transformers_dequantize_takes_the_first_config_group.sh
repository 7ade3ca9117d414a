#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.0: CompressedTensorsConfig(dequantize=True) reads every layer of a
# checkpoint with several config_groups by the settings of the first one.
#
# Expected: a layer is dequantized by the group whose targets name it, as without dequantize=True; or an error.
# Seen: attention in 4 bits and MLPs in 8 bits, one scale a row, both pack-quantized, as mixed-precision plans make them:
# without dequantize=True all weights are right. With it nothing is raised and nothing is reported missing, but the MLPs'
# words are taken for 4-bit codes: their weights are wrong by as much as they are large. Where shapes do not happen to fit
# (other group sizes, zero points), loading fails with a message about tensor sizes instead.
# Why it matters: dequantize=True is the one way to load asymmetric pack-quantized checkpoints, to fine-tune, and to keep
# float32 scales as they are; who writes mixed checkpoints must warn of it, and who evaluates them must compare weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  compressed-tensors==0.20.0 numpy==2.4.6
cat > "$work/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
tensors, expected = dict(model.state_dict()), {}
for name, layer in model.named_modules():
    if isinstance(layer, torch.nn.Linear) and name != "lm_head":
        bits = 4 if "self_attn" in name else 8
        most = 2 ** (bits - 1) - 1
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / most
        codes = (layer.weight.detach() / scale).round().clamp(-most, most).to(torch.int8)
        del tensors[f"{name}.weight"]
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes, bits)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)
        expected[name] = codes * scale
where = Path(sys.argv[1])
where.mkdir()
save_file({name: value.contiguous() for name, value in tensors.items()}, where / "model.safetensors", {"format": "pt"})


def group(bits, target):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {"targets": [target], "weights": weights, "format": "pack-quantized"}


told = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": group(4, "re:.*self_attn.*"), "group_1": group(8, "re:.*mlp.*")},
    "ignore": ["lm_head"],
}
config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": told}
(where / "config.json").write_text(json.dumps(config))


def wrong(options):
    loaded, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, dtype=torch.float32, **options)
    with torch.no_grad():
        loaded(torch.arange(5)[None])  # decompresses
    errors = {
        name: ((loaded.get_submodule(name).weight - weight).norm() / weight.norm()).item()
        for name, weight in expected.items()
    }
    bad = [error for error in errors.values() if error > 1e-6]
    kinds = {name.split(".")[3] for name, error in errors.items() if error > 1e-6}
    worst = f", errors of {min(bad):.1f} to {max(bad):.1f} of the weights' norm" if bad else ""
    lost = len(info["missing_keys"]) + len(info["unexpected_keys"]) + len(info["mismatched_keys"])
    return f"{len(bad)} of {len(errors)} layers wrong {sorted(kinds)}, {lost} keys reported{worst}"


print("default:", wrong({}))
print("dequantize=True:", wrong({"quantization_config": CompressedTensorsConfig(dequantize=True)}))
PY
got=$("$work/venv/bin/python" -W ignore "$work/run.py" "$work/model" 2> "$work/err" || { tail -1 "$work/err"; exit 1; })
echo "$got"
expected="default: 0 of 14 layers wrong [], 0 keys reported
dequantize=True: 6 of 14 layers wrong ['mlp'], 0 keys reported, errors of "
case "$got" in "$expected"*) echo "as described" ;; *) echo "changed"; exit 1 ;; esac
