"""Makes checkpoints of kinds that no whole checkpoint was cut for: needs torchao, bitsandbytes, gguf and hqq.

Each has its `oracle.safetensors`, the library's own dequantization, float32. The versions are in its metadata.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def write(name, tensors, config, oracle, library, metadata=None):
    target = HERE / name
    target.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target / "model.safetensors", metadata)
    (target / "config.json").write_text(json.dumps({"quantization_config": config}, indent=1) + "\n")
    save_file({"fc": oracle.contiguous()}, target / "oracle.safetensors", {"library": f"{library} {version(library)}"})


def torchao_intx():
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(96, 24, bias=False).to(torch.bfloat16)})
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    oracle = model["fc"].weight.dequantize()
    write("torchao-intx-g32", tensors, {"quant_method": "torchao"}, oracle, "torchao", metadata)


def bitsandbytes_flat(kind, k):
    """Blocks of 64 that cross rows of k inputs, which version 0.50.2's own CPU kernel takes for blocks of each row."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    torch.manual_seed(0)
    weight = torch.randn(20, k).to(torch.float16)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    tensors = {"fc.weight": packed} | {f"fc.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    oracle = _dequantize_4bit_compute(packed.reshape(-1), state.absmax, state.code, 64, weight.shape, weight.dtype)
    if k % 64 == 0:
        assert torch.equal(oracle, functional.dequantize_4bit(packed, state))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write(f"bnb-{kind}-flat", tensors, config, oracle, "bitsandbytes")


def gguf_blocks():
    """Blocks of random bytes, whose float16 scales are finite, of every type, by the gguf package."""
    import gguf

    rng = np.random.default_rng(0)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}
    halves |= {"Q5_1": (0, 2)}
    tensors = {}
    for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]:
        kind = gguf.GGMLQuantizationType[name]
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (6, nbytes), dtype=np.uint8)
        for place in halves.get(name, (0,)):
            raw[:, place + 1] &= 0xBF
        tensors[f"{name}.raw"] = torch.from_numpy(raw)
        tensors[f"{name}.weight"] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
    save_file(tensors, HERE / "gguf-blocks.safetensors", {"library": f"gguf {version('gguf')}"})


def hqq_layer(of_scales=None, **settings):
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    torch.manual_seed(0)
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    dense = torch.nn.Linear(80, 24).to(torch.float16)
    weight, config = dense.weight.data.clone(), BaseQuantizeConfig(**settings)
    layer = HQQLinear(dense, config, compute_dtype=torch.float16, device="cpu")
    if of_scales is not None:  # its constructor no longer does it
        del layer.W_q
        layer.quantize(weight, config["weight_quant_params"], of_scales, of_scales)
    return layer


def hqq_saved():
    """What save_quantized writes: qmodel.pt, with scales that are quantized, as version 0.1 did."""
    of_scales = {"nbits": 8, "channel_wise": True, "group_size": 8, "optimize": False}
    layer, target = hqq_layer(of_scales, nbits=4, group_size=16), HERE / "hqq-w4-g16-saved"
    target.mkdir(exist_ok=True)
    layer.encoded_state_dict = False
    torch.save({"fc": dict(layer.state_dict()), "norm": {"weight": torch.ones(80)}}, target / "qmodel.pt")
    (target / "config.json").write_text("{}\n")
    save_file({"fc": layer.dequantize()}, target / "oracle.safetensors", {"library": f"hqq {version('hqq')}"})


def hqq_tensors():
    """What save_to_safetensors writes: groups of 32 cross rows of 80 inputs."""
    layer, target = hqq_layer(nbits=3, group_size=32), HERE / "hqq-w3-g32-tensors"
    target.mkdir(exist_ok=True)
    tensors = {f"fc.{key}": value.contiguous() for key, value in layer.state_dict().items()}
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text("{}\n")
    save_file({"fc": layer.dequantize()}, target / "oracle.safetensors", {"library": f"hqq {version('hqq')}"})


if __name__ == "__main__":
    torchao_intx()
    bitsandbytes_flat("nf4", 80)
    bitsandbytes_flat("fp4", 80)
    gguf_blocks()
    hqq_saved()
    hqq_tensors()
