"""Cuts one layer out of whole checkpoints that other libraries wrote: `python cut.py CHECKPOINTS`.

CHECKPOINTS has a folder for each: `ckpt/` or `model.gguf`, and `oracle.safetensors`: weights that the library computed.
Kept are the layer's tensors, byte for byte, what the configuration says of quantization, and every third row of the
oracle, in the dtype in which the library dequantizes. Settings of the machine that made the file are left out.
"""

import json
import struct
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
LAYER = "model.layers.1.self_attn.k_proj"
OTHER = {
    "ct-old-marlin24-w4-g128": "model.layers.0.mlp.down_proj",
    "gptq-w4-g64-gpt2": "transformer.h.1.mlp.c_proj",
    "gptq-w4-g64-moe": "model.layers.1.mlp.experts.3.down_proj",
    "ct-w4a16-g64-moe": "model.layers.1.mlp.experts.3.down_proj",
}
ORACLE_DTYPES = {
    "bnb-int8": "float32",
    "ct-old-marlin24": "float16",
    "onnx": "float32",
    "gguf": "float32",
    "gptq": "float16",
    "autoround": "float16",
    "awq": "float16",
    "ct": "bfloat16",
    "bnb": "bfloat16",
    "torchao": "bfloat16",
    "quanto": "bfloat16",
}
LEFT_OUT = {"meta", "offload_to_disk_path"}


def cut_oracle(source, target, name, layer):
    with safe_open(source / "oracle.safetensors", "pt") as file:
        weight = file.get_tensor(layer)
        library = (file.metadata() or {}).get("library", "")
    kind = getattr(torch, next(kind for start, kind in ORACLE_DTYPES.items() if name.startswith(start)))
    exact = weight.to(kind)
    assert torch.equal(exact.float(), weight)
    save_file({layer: exact[::3].contiguous()}, target / "oracle.safetensors", {"library": library})


def cut_safetensors(source, target, layer):
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{layer}.")}  # noqa: SIM118
    described = {key: value for key, value in metadata.items() if key in ("format", f"{layer}.weight")}
    save_file(tensors, target / "model.safetensors", described)


def cut_config(source, target, layer):
    config = json.loads((source / "config.json").read_text())
    kept = {key: config[key] for key in ("architectures", "model_type", "quantization_config") if key in config}
    told = kept.get("quantization_config", {})
    kept["quantization_config"] = {key: value for key, value in told.items() if key not in LEFT_OUT}
    if not told:
        del kept["quantization_config"]
    (target / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
    qmap = source / "quanto_qmap.json"
    if qmap.exists():
        entry = json.loads(qmap.read_text())[layer]
        (target / qmap.name).write_text(json.dumps({layer: entry}, indent=1) + "\n")


def cut_gguf(source, target, name):
    from nybble.foreign.gguf_header import read_header

    header = read_header(source / "model.gguf")
    tensor = header.tensors[name]
    data = header.file.read(tensor.begin, tensor.end)
    number = struct.unpack("<I", header.file.read(*type_place(header, name, tensor)))[0]

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    kept = {"general.architecture": "llama"}
    kept |= {key: header.fields[key] for key in ("llama.attention.head_count", "llama.attention.head_count_kv")}
    out = b"GGUF" + struct.pack("<IQQ", 3, 1, len(kept))
    for key, value in kept.items():
        stored = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        out += text(key) + stored
    out += text(name) + struct.pack("<IQQIQ", 2, *tensor.shape[::-1], number, 0)
    (target / "model.gguf").write_bytes(out + bytes(-len(out) % 32) + data)


def type_place(header, name, tensor):
    """Where the number of a tensor's type is: after its name, the number of dimensions and two sizes."""
    whole = header.file.read(0, tensor.begin)
    at = whole.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 8 * len(tensor.shape)
    return at, at + 4


def cut_onnx(source, target, layer):
    import onnx

    model = onnx.load(source / "model.onnx")
    graph = model.graph
    nodes = [node for node in graph.node if node.input[1].startswith(f"{layer}.")]
    values = [value for value in graph.initializer if value.name in nodes[0].input]
    kept = onnx.helper.make_graph(nodes, "cut", [], [], values)
    (target / "model.onnx").write_bytes(onnx.helper.make_model(kept).SerializeToString())


def main(checkpoints):
    for source in sorted(checkpoints.iterdir()):
        name = source.name
        if name.startswith("hqq") or not (source / "oracle.safetensors").exists():
            continue
        layer = OTHER.get(name, LAYER)
        target = HERE / name
        target.mkdir(exist_ok=True)
        if name.startswith("gguf"):
            layer = "blk.1.attn_k.weight"
            cut_gguf(source, target, layer)
        elif name.startswith("onnx"):
            cut_onnx(source / "ckpt", target, layer)
        else:
            cut_safetensors(source / "ckpt", target, layer)
            cut_config(source / "ckpt", target, layer)
        cut_oracle(source, target, name, layer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
