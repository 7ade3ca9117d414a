"""onnxruntime on the CPU: MatMulNBits with int8 activations (accuracy_level 4), and dynamic int8.

Graphs are built node by node, without a file or a converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .peer import Layer, Peer
from .torch_int import int8_rows


def _sessions(
    nodes: Sequence[Any], initializers: dict[str, Tensor], shape: tuple[int, int], copies: int
) -> list[Layer]:
    """Layers that run a graph x -> y of the nodes; each session has its own copy of the weight."""
    onnx: Any = import_module("onnx")
    runtime: Any = import_module("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    n, k = shape
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = shared_pool()
    sessions = [runtime.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(copies)]
    return [partial(_run, session) for session in sessions]


def shared_pool() -> Any:
    """Session options for torch's number of threads, with one pool for all sessions, as in a model.

    By default each session has a pool, and the threads of the previous copies still spin. Measured on 2 cores, 64 copies
    of 2048x2048, M=16, 4 bits: 209 us with one pool, 382 us with spinning pools, 232 us with pools that do not spin.
    """
    runtime: Any = import_module("onnxruntime")
    threads = torch.get_num_threads()
    if threads != _pool_threads():
        raise ValueError(
            f"its thread pool is fixed at {_pool_threads()}; run --threads {threads} in a separate process"
        )
    options = runtime.SessionOptions()
    options.use_per_session_threads = False
    return options


@lru_cache
def _pool_threads() -> int:
    """Creates the pool at the first call, with torch's number of threads; returns that number."""
    runtime: Any = import_module("onnxruntime")
    runtime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return torch.get_num_threads()


def _run(session: Any, x: Tensor) -> object:
    return session.run(None, {"x": x.numpy()})[0]


def _nbits(weight: Tensor, dtype: torch.dtype, copies: int, bits: int, block: int) -> list[Layer]:
    onnx: Any = import_module("onnx")
    n, k = weight.shape
    half = 1 << (bits - 1)  # MatMulNBits' default zero point
    padded = torch.nn.functional.pad(weight, (0, -k % block)).view(n, -1, block)
    extreme = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme == 0, 1, extreme / -half)  # the largest weight of a block gets the code 0
    codes = ((padded / scale).round() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    return _sessions([node], {"codes": codes, "scale": scale.view(n, -1)}, (n, k), copies)


def _dynamic(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    """The nodes that onnxruntime's quantize_dynamic creates, which it fuses; one scale per output channel."""
    onnx: Any = import_module("onnx")
    node = onnx.helper.make_node
    codes, scale = int8_rows(weight)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["rows", "row_scale", "row_zero"]),
        node("MatMulInteger", ["rows", "codes", "row_zero", "zero"], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["row_scale", "scale"], ["scales"]),
        node("Mul", ["floats", "scales"], ["y"]),
    ]
    zero = torch.zeros(weight.shape[0], dtype=torch.int8)
    n, k = weight.shape
    return _sessions(nodes, {"codes": codes.t(), "scale": scale.flatten(), "zero": zero}, (n, k), copies)


def _peer(name: str, weight_bits: int, make: Any) -> Peer:
    return Peer(name, weight_bits, "int8", (torch.float32,), make, pool="onnxruntime", needs=("onnx", "onnxruntime"))


PEERS = (
    _peer("onnxruntime dynamic int8", 8, _dynamic),
    _peer("onnxruntime q8 b128 al4", 8, partial(_nbits, bits=8, block=128)),
    _peer("onnxruntime q4 b128 al4", 4, partial(_nbits, bits=4, block=128)),
    _peer("onnxruntime q4 b32 al4", 4, partial(_nbits, bits=4, block=32)),
)
