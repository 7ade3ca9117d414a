"""OpenVINO's compressed weights with dynamic quantization of activations per group."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .peer import Layer, Peer
from .torch_int import int8_rows

_GROUP = 128


def _int8(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    op: Any = import_module("openvino.opset13")
    codes, scale = int8_rows(weight)
    return _compile(op.multiply(op.convert(op.constant(codes.numpy()), "f32"), op.constant(scale.numpy())), copies)


def _int4(weight: Tensor, dtype: torch.dtype, copies: int) -> list[Layer]:
    op: Any = import_module("openvino.opset13")
    ov: Any = import_module("openvino")
    n, k = weight.shape
    if k % _GROUP:
        raise ValueError(f"K={k}: must be a multiple of the group size {_GROUP}")
    groups = weight.view(n, -1, _GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 7
    codes = ((groups / scale).round() + 8).to(torch.uint8)
    # Copied, because a tensor made from an array shares its memory.
    held = ov.Tensor(ov.Type.u4, ov.Shape(groups.shape))
    held.data[:] = (codes[..., ::2] | (codes[..., 1::2] << 4)).numpy().reshape(held.data.shape)
    centred = op.subtract(op.convert(op.constant(held), "f32"), op.constant(torch.full((1, 1, 1), 8.0).numpy()))
    scaled = op.multiply(centred, op.constant(scale.numpy()))
    return _compile(op.reshape(scaled, op.constant([n, k]), special_zero=False), copies)


def _compile(weight: Any, copies: int) -> list[Layer]:
    """Layers that compute x w^T; each compiled model packs its own weight."""
    ov: Any = import_module("openvino")
    op: Any = import_module("openvino.opset13")
    x = op.parameter([-1, weight.output(0).shape[1]], ov.Type.f32)
    model = ov.Model([op.matmul(x, weight, transpose_a=False, transpose_b=True)], [x])
    options = {**latency_options(), "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP}
    core = ov.Core()
    requests = [core.compile_model(model, "CPU", options).create_infer_request() for _ in range(copies)]
    return [partial(_run, request) for request in requests]


def latency_options() -> dict[str, Any]:
    """Of a compiled model: torch's number of threads for one request."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # would pin the calling thread, and so affect all other contestants
    }


def _run(request: Any, x: Tensor) -> object:
    return request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0]


PEERS = (
    Peer("openvino int8", 8, "int8", (torch.float32,), _int8, "openvino", ("openvino",)),
    Peer("openvino int4 g128", 4, "int8", (torch.float32,), _int4, "openvino", ("openvino",)),
)
