"""ONNX: the weights of MatMulNBits nodes, of the domain com.microsoft; needs the package onnx.

B, uint8 (N, blocks, block_size * bits / 8): each block is a stream of codes. scales: one a block. zero_points, uint8: a
stream of codes for each row; or floats, one a block; or absent: 2 ** (bits - 1). Large tensors may be in other files.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import unpack_stream
from .mapped import MappedFile
from .onnx_values import Values
from .opened import Layer, Opened, Part
from .source import Source
from .weight import ForeignWeight, checked

_LARGEST = 1 << 31  # bytes that protobuf allows
_BITS = (2, 4, 8)
_CODES = {2: torch.uint8}
_FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
_INPUTS = ("A", "B", "scales", "zero_points", "g_idx", "bias")


def detect(source: Source) -> bool:
    return source.single(".onnx") is not None


def read_file(source: Source) -> Opened:
    path = source.single(".onnx")
    if path is None:
        raise CheckpointError(f"{source.path}: has no .onnx file")
    graph = _graph(path)
    values = Values(path, graph.initializer)
    layers: dict[str, Layer] = {}
    parts: dict[str, Part] = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs = {part: name for part, name in zip(_INPUTS, node.input, strict=False) if name}
        if not all(isinstance(name, str) for name in (*inputs.values(), node.name)):  # bytes, where they are not UTF-8
            raise CheckpointError(f"{path}: node {node.name}: its name and its inputs: must be names")
        if "B" not in inputs or "scales" not in inputs or "g_idx" in inputs:
            raise CheckpointError(
                f"{path}: node {node.name}: must have B and scales, and no g_idx, which is not read yet"
            )
        name = _layer_name(inputs["B"], node.name)
        if name in layers:
            raise CheckpointError(f"{path}: {name}: two nodes have this weight")
        read = functools.partial(_read, name, node, inputs, values)
        layers[name] = Layer(read, sum(map(values.nbytes, inputs.values())))
        if "bias" in inputs:
            bias = inputs["bias"]
            parts[f"{name}.bias"] = Part(functools.partial(_read_bias, name, node, bias, values), values.nbytes(bias))
    if not layers:
        raise CheckpointError(f"{path}: has no node MatMulNBits")
    return Opened(layers, parts, _no_config, values.files)


def _layer_name(weight: str, node: str) -> str:
    """The name of a layer: that of its weight, without what quantizing has added; or, where an exporter has numbered the
    weights, the path of the node, /model/layers.0/fc/MatMul."""
    stem, _, ending = weight.rpartition("_")
    name = (stem if ending.startswith("Q") else weight).removesuffix(".weight")
    scopes = [scope for scope in node.split("/")[:-1] if scope]
    if not name.startswith("onnx::") or not scopes:
        return name
    # A child of a Sequential or ModuleList repeats the name of that: /layers/layers.0.
    last = zip(scopes, [*scopes[1:], ""], strict=True)
    return ".".join(scope for scope, after in last if not after.startswith(f"{scope}."))


def _no_config() -> dict[str, Any]:
    raise CheckpointError(
        "an ONNX file says no configuration of transformers: load_pretrained needs model=, to put its layers into"
    )


def _graph(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading ONNX files needs onnx: pip install 'nybble[onnx]'") from error
    from google.protobuf.message import DecodeError

    file = MappedFile(path)
    if file.size > _LARGEST:
        raise CheckpointError(f"{path}: {file.size} bytes: must be at most {_LARGEST}")
    try:
        return onnx.ModelProto.FromString(file.read(0, file.size)).graph
    except DecodeError as error:
        raise CheckpointError(f"{path}: not an ONNX model: {error}") from error


def _numbers(node: Any, name: str) -> tuple[int, int, int, int]:
    """N, K, bits and block_size of a node."""
    found = {attribute.name: attribute.i for attribute in node.attribute}
    for key in ("N", "K", "bits", "block_size"):
        if not 1 <= found.get(key, 0) < 1 << 31:
            raise CheckpointError(f"{name}: {key} {found.get(key)}: must be a number above 0")
    if found["bits"] not in _BITS:
        raise CheckpointError(f"{name}: bits {found['bits']}: must be one of {_BITS}")
    if found["block_size"] < 16 or found["block_size"] & (found["block_size"] - 1):
        raise CheckpointError(f"{name}: block_size {found['block_size']}: must be a power of 2 from 16 on")
    return found["N"], found["K"], found["bits"], found["block_size"]


def _read_bias(name: str, node: Any, bias: str, values: Values) -> Tensor:
    return values.array(bias, _FLOATS, ((_numbers(node, name)[0],),))


def _read(name: str, node: Any, inputs: dict[str, str], values: Values) -> ForeignWeight:
    n, k, bits, size = _numbers(node, name)
    blocks = -(-k // size)
    packed = values.array(inputs["B"], _CODES, ((n, blocks, size * bits // 8),))
    scale = values.array(inputs["scales"], _FLOATS, ((n, blocks), (n * blocks,)))
    zero = _zeros(inputs["zero_points"], values, n, blocks, bits) if "zero_points" in inputs else 1 << (bits - 1)
    rows = packed.reshape(n, -1)
    pairs = bits == 4 and k % 2 == 0
    codes = rows[:, : k // 2] if pairs else torch.from_numpy(unpack_stream(rows.numpy(), bits, k))
    weight = ForeignWeight(codes, bits, scale, zero, size, per_byte=2 if pairs else 1)
    return checked(weight, name, "scales")


def _zeros(name: str, values: Values, n: int, blocks: int, bits: int) -> Tensor:
    """The zero point of each block, int16, or floats."""
    if values.kind(name) in _FLOATS:
        return values.array(name, _FLOATS, ((n, blocks), (n * blocks,)))
    width = -(-blocks * bits // 8)
    stored = values.array(name, _CODES, ((n, width), (n * width,)))
    return torch.from_numpy(unpack_stream(stored.numpy(), bits, blocks)).to(torch.int16)
