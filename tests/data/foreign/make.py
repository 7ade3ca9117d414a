"""Makes checkpoints of kinds that no whole checkpoint was cut for: needs the library that each function imports.

`python make.py NAME ...` makes those of some functions, `python make.py` all. Each has its `oracle.safetensors`, the library's own
dequantization, float32. The versions are in its metadata.
"""

import json
import sys
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


def bitsandbytes_flat(k=80):
    """Blocks of 64 that cross rows of k inputs, which version 0.50.2's own CPU kernel takes for blocks of each row."""
    for kind in ("nf4", "fp4"):
        bitsandbytes_kind(kind, k)


def bitsandbytes_kind(kind, k):
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
    halves |= {"Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()}
    tensors = {}
    names = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
    for name in [*names, "TQ1_0", "TQ2_0", "MXFP4"]:
        kind = gguf.GGMLQuantizationType[name]
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (6, nbytes), dtype=np.uint8)
        for place in halves.get(name, (0,)):
            raw[:, place + 1] &= 0xBF
        if name == "MXFP4":
            raw[:, 0] &= 0x8F  # of a block: 2 to the power of it, less 128
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


def compressed(name, group_size=None, block=None, **weights):
    """One layer in the format that compressed-tensors chooses, with scales of the largest weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    weight = torch.randn(24, 96).to(torch.bfloat16)
    args = QuantizationArgs(group_size=group_size, block_structure=block, **weights)
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True) if block else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    groups = weight.float()[None, None]
    if block:
        groups = weight.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2).flatten(2)
    elif group_size:
        groups = weight.float().unflatten(1, (-1, group_size))
    low, high = (end(groups, dim=-1 if group_size or block else (2, 3)) for end in (torch.amin, torch.amax))
    state = {"weight": weight}
    if group_size == 16:
        state["weight_global_scale"] = 448 * 6 / weight.abs().max().float().reshape(1)
    more = {"global_scale": state["weight_global_scale"]} if group_size == 16 else {}
    scale, zero = calculate_qparams(low.reshape(-1) if low.numel() == 1 else low, high.reshape(low.shape), args, **more)
    state["weight_scale"] = scale.reshape(-1) if scale.numel() == 1 else scale
    if not args.symmetric:
        state["weight_zero_point"] = zero.reshape(-1).to(torch.int8)
    format = infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    oracle = compressor.decompress(stored, scheme)["weight"]
    told = {"quant_method": "compressed-tensors", "format": format, "version": version("compressed-tensors")}
    told["config_groups"] = {"group_0": json.loads(scheme.model_dump_json())}
    tensors = {f"fc.{key}": value.data for key, value in stored.items() if value is not None}
    write(name, tensors, told, oracle, "compressed-tensors")


def compressed_floats():
    floats = {"type": "float", "symmetric": True}
    compressed("ct-nvfp4", num_bits=4, strategy="tensor_group", group_size=16, **floats)
    compressed("ct-mxfp4", num_bits=4, strategy="group", group_size=32, scale_dtype=torch.uint8, **floats)
    compressed("ct-mxfp8", num_bits=8, strategy="group", group_size=32, scale_dtype=torch.uint8, **floats)
    compressed("ct-fp8-block", num_bits=8, strategy="block", block=[8, 32], **floats)


def compressed_whole():
    """One scale and one zero point for all weights, which are not packed."""
    compressed("ct-w4a16-tensor-asym", num_bits=4, type="int", symmetric=False, strategy="tensor")


def quanto_float8():
    from optimum.quanto import freeze, qfloat8, quantize

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(96, 24, bias=False).to(torch.bfloat16)})
    quantize(model, weights=qfloat8)
    freeze(model)
    tensors = {
        key: value.detach().clone() for key, value in model.state_dict().items() if "scale" not in key or "_s" in key
    }
    write("quanto-qfloat8", tensors, {}, model["fc"].weight.dequantize(), "optimum-quanto")
    (HERE / "quanto-qfloat8" / "config.json").unlink()
    told = {"fc": {"weights": "qfloat8_e4m3fn", "activations": "none"}}
    (HERE / "quanto-qfloat8" / "quanto_qmap.json").write_text(json.dumps(told, indent=1) + "\n")


def awq_other_layouts():
    """The layouts for small batches, packed by gptqmodel, which unpacks them on a GPU only: the oracle is from the codes."""
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear

    for word, kind, size in (("gemv", AwqGEMVLinear, 64), ("gemv_fast", AwqGEMVFastLinear, 32)):
        torch.manual_seed(0)
        codes = torch.randint(0, 16, (64, 192))
        zeros = torch.randint(0, 16, (64, 192 // size))
        scales = (torch.rand(64, 192 // size) / 16 + 0.01).half()
        spread = [one.float().repeat_interleave(size, dim=1) for one in (zeros, scales)]
        linear = torch.nn.Linear(192, 64, bias=False)
        linear.weight.data = (codes - spread[0]) * spread[1]
        layer = kind(4, size, False, False, 192, 64)
        layer.pack(linear, scales.float(), zeros.float())
        oracle = codes * spread[1] - (spread[0] * spread[1]).half().float() if "fast" in word else linear.weight.data
        tensors = {f"fc.{key}": value for key, value in layer.named_buffers()}
        told = {"quant_method": "awq", "bits": 4, "group_size": size, "version": word, "zero_point": True}
        write(f"awq-{word.replace('_', '-')}", tensors, told, oracle.detach(), "gptqmodel")


def gptq_planes():
    """Codes of 7 bits in planes of 4, 2 and 1, packed by gptqmodel; its kernels compute (code - zero) * scale."""
    from gptqmodel.utils.planar_packing import planar_pack_cols, planar_pack_rows

    torch.manual_seed(0)
    codes, zeros = torch.randint(0, 128, (96, 32)), torch.randint(0, 128, (3, 32))
    scales = (torch.rand(3, 32) / 64 + 0.01).half()
    spread = [one.float().repeat_interleave(32, dim=0) for one in (zeros, scales)]
    tensors = {"qweight": planar_pack_rows(codes, 7), "qzeros": planar_pack_cols(zeros, 7), "scales": scales}
    told = {"quant_method": "gptq", "bits": 7, "group_size": 32, "sym": False, "checkpoint_format": "gptq_p"}
    oracle = ((codes - spread[0]) * spread[1]).T.half()
    write("gptq-w7-planes", {f"fc.{key}": value for key, value in tensors.items()}, told, oracle, "gptqmodel")


def fp8():
    """As transformers dequantizes it to float32: blocks of 128 do not divide the shape."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    torch.manual_seed(0)
    weight = torch.randn(40, 160).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.1
    oracle = _dequantize_fp8_weight(weight, scale, [32, 128], torch.float32)
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 128]}
    write("fp8-block", {"fc.weight": weight, "fc.weight_scale_inv": scale}, told, oracle, "transformers")


MADE = (
    torchao_intx, bitsandbytes_flat, gguf_blocks, hqq_saved, hqq_tensors, compressed_floats, compressed_whole, quanto_float8,
    awq_other_layouts, gptq_planes, fp8,
)  # fmt: skip

if __name__ == "__main__":
    for function in MADE:
        if not sys.argv[1:] or function.__name__ in sys.argv[1:]:
            function()
