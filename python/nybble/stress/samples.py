"""Small files of each format that nybble reads, made byte by byte: what headers are mutated from, and fuzzers begin with."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from ..checkpoint.index import Index, LayerEntry, TensorEntry

_N, _K = 8, 64


def index() -> bytes:
    """An index of two layers that share a weight."""
    scheme = "w4a16g32"
    layers = (
        LayerEntry("a", "Linear", scheme, _K, _N, True, "float32", 0, None),
        LayerEntry("b", "Linear", scheme, _K, _N, False, "float32", 0, "a"),
    )
    begin, tensors = 512, {}
    for name, size in (("a.bias", 4 * _N), ("a.scale", 4 * _N), ("a.qweight", _N * _K // 2)):
        tensors[name], begin = TensorEntry(begin, begin + size, 7), begin + size
    aliases = {"b.scale": "a.scale", "b.qweight": "a.qweight"}
    file = (f"model-{'0' * 16}.safetensors", begin, "0" * 64)
    return Index("0.1.0", *file, layers, tensors, aliases, ("", "a"), ("a",)).to_json()


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]] | None = None) -> bytes:
    """A file of tensors: dtype, shape and bytes by name."""
    if tensors is None:
        tensors = {
            "a.qweight": ("I32", [_K // 8, _N], bytes(range(256))),
            "a.scales": ("F16", [2, _N], b"\x00\x3c" * 2 * _N),
            "a.g_idx": ("I32", [_K], struct.pack(f"<{_K}i", *(i // 32 for i in range(_K)))),
            "b.weight": ("BF16", [3, 5], b"\x80\x3f" * 15),
        }
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf() -> bytes:
    """A file with fields of several types, and two tensors: 8 by 64 of Q4_0, and 5 floats."""
    fields = (
        _string("general.architecture") + struct.pack("<I", 8) + _string("llama"),
        _string("llama.block_count") + struct.pack("<II", 4, 1),
        _string("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        _string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("bc"),
        _string("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5),
        _string("general.alignment") + struct.pack("<II", 4, 32),
    )
    codes, floats = b"\x00\x3c" + bytes(range(16)), struct.pack("<5f", *range(5))
    tensors = (
        _string("blk.0.ffn_up.weight") + struct.pack("<IQQIQ", 2, _K, _N, 2, 0),
        _string("output_norm.weight") + struct.pack("<IQIQ", 1, 5, 0, 18 * 2 * _N),
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + codes * (2 * _N) + floats


def onnx() -> bytes:
    """A graph with one MatMulNBits node, and its weight."""
    import onnx as library

    helper, kinds = library.helper, library.TensorProto
    node = helper.make_node(
        "MatMulNBits",
        ["x", "a.weight_Q4", "a.scales"],
        ["y"],
        "a",
        domain="com.microsoft",
        N=_N,
        K=_K,
        bits=4,
        block_size=32,
    )
    values = [
        helper.make_tensor("a.weight_Q4", kinds.UINT8, (_N, 2, 16), bytes(range(256)), raw=True),
        helper.make_tensor("a.scales", kinds.FLOAT, (_N * 2,), struct.pack("<16f", *range(1, 17)), raw=True),
    ]
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, [1, size]) for name, size in (("x", _K), ("y", _N))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], values)
    made: bytes = helper.make_model(graph).SerializeToString()
    return made


# What builds a dict of one tensor, 2 by 3, written by hand in the operations of plain_values.
PROGRAM = (
    b"\x80\x02}X\x08\x00\x00\x00a.weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRs."
)


def torch_file(program: bytes = PROGRAM) -> bytes:
    """A file of torch.save with a program for its values."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in (("data.pkl", program), ("byteorder", b"little"), ("data/0", bytes(24)), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), data)
    return made.getvalue()


_RECIPE: dict[str, Any] = {
    "schema": "nybble.recipe/1",
    "seed": 3,
    "stages": [
        {
            "pass": "sparsify",
            "pattern": "2:4",
            "method": "sparsegpt",
            "scheme": "w8a8",
            "exclude": ["head*"],
            "goal": "memory",
        },
        {
            "pass": "quantize",
            "goal": "memory",
            "method": "gptq",
            "m": [1, 16],
            "layers": {"a.*": "w4a16g32", "b": "w8a8"},
        },
        {"pass": "recover", "epochs": 1, "learning_rate": 0.01},
    ],
}


def recipe_json() -> bytes:
    """A recipe as JSON."""
    return json.dumps(_RECIPE, indent=1).encode()


def recipe_yaml() -> bytes:
    """A recipe as YAML."""
    lines = [f"schema: {_RECIPE['schema']}", f"seed: {_RECIPE['seed']}  # of random choices", "stages:"]
    for stage in _RECIPE["stages"]:
        lines += [f"  {' ' if i else '-'} {key}: {json.dumps(value)}" for i, (key, value) in enumerate(stage.items())]
    return "\n".join(lines).encode() + b"\n"


def config_json() -> bytes:
    """A config.json that says how a model was quantized."""
    told = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "dynamic": {"+:a": {"bits": 8}}}
    return json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq", **told}}).encode()
