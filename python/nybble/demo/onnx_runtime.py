"""A model of transformers as a graph of ONNX Runtime: exported, fused by its optimizer of transformers, in int8 if asked.

The optimizer knows the patterns of the exporter that traces, and of attention written out. Of all-MiniLM-L6-v2 it makes
46 nodes, six of which are whole attentions; from torch's other exporter, or with `scaled_dot_product_attention`, none is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

NEEDS = ("onnx", "onnxruntime")
INSTALL = "'nybble[peers]'"
# Of all-MiniLM-L6-v2: its inputs, whose sizes change, and the arguments of the optimizer.
AXES = {key: {0: "rows", 1: "tokens"} for key in ("input_ids", "token_type_ids", "attention_mask")}
FUSION = {"model_type": "bert", "num_heads": 12, "hidden_size": 384}
FP32, INT8 = "fp32.onnx", "int8.onnx"
# What quantize_dynamic makes int8. Without convolutions: theirs have no fast kernel on CPUs.
_QUANTIZED = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")
_OPSET = 17


def why_not() -> str | None:
    """Why it cannot run here; None if it can."""
    absent = [name for name in NEEDS if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (pip install {INSTALL})" if absent else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and the quantizer warn about at every model, which no setting here changes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Hidden(nn.Module):
    """The last hidden states of a model, from inputs in the order of their names."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return found


def write(
    model: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Any], fusion: Mapping[str, Any], to: Path
) -> None:
    """Writes the fused graph FP32 into a folder. Switches the model to attention that is written out.

    inputs: an example. axes: input -> {axis: name} of the sizes that change. fusion: arguments of the optimizer.
    """
    optimizer: Any = import_module("onnxruntime.transformers.optimizer")
    switch: Any = model.set_attn_implementation
    switch("eager")
    with TemporaryDirectory() as room, _quiet(), torch.no_grad():
        plain = str(Path(room, "plain.onnx"))
        torch.onnx.export(
            _Hidden(model, list(inputs)),
            tuple(inputs.values()),
            plain,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=["hidden"],
            dynamic_axes={**axes, "hidden": next(iter(axes.values()))} if axes else None,
        )
        optimizer.optimize_model(plain, **fusion).save_model_to_file(str(to / FP32))


def quantize(folder: Path) -> None:
    """Writes the graph INT8 from FP32: int8 weights with a scale for each output, dynamic int8 activations."""
    quantization: Any = import_module("onnxruntime.quantization")
    float_type = import_module("onnx").TensorProto.FLOAT
    with _quiet():
        quantization.quantize_dynamic(
            folder / FP32,
            folder / INT8,
            op_types_to_quantize=list(_QUANTIZED),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": float_type},  # its own nodes have no known types
        )


class Session(nn.Module):
    """A graph of ONNX Runtime, called as a model of transformers is."""

    def __init__(self, path: Path, options: Any = None) -> None:
        super().__init__()
        runtime: Any = import_module("onnxruntime")
        if options is None:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
        self._session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        given = {name: inputs[name].numpy() for name in self._names}
        return SimpleNamespace(last_hidden_state=torch.from_numpy(self._session.run(None, given)[0]))
