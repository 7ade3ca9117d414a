"""Networks of images: nybble's fused programs against ONNX Runtime and OpenVINO in int8 with calibrated activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..peers.onnxruntime import shared_pool
from ..peers.openvino import latency_options
from ..whole import lines
from ..whole.contestant import Contestant, Ready
from ..whole.goals import Goal, everywhere
from ..whole.models import Model
from ..whole.nybble_models import by_scheme, contestant
from ..whole.subject import Call, Inputs, Subject
from ..whole.torch_models import REFERENCE
from .image_nets import image, mobilenet, resnet

# Random weights: logits lie close together.
_LEAST = 0.9
_BATCHES = (1, 8)
_CALIBRATION, _HELD = 16, 64


def _ready(model: nn.Module, inputs: Inputs) -> Call:
    @torch.inference_mode()
    def call() -> object:
        return model(inputs["x"])

    return call


def _rows(output: Any, _: Inputs) -> Tensor:
    return torch.as_tensor(output).float()


def _calibration() -> Sequence[Inputs]:
    return [image(1, 100 + seed) for seed in range(_CALIBRATION)]


def _subject(name: str, build: Callable[[], nn.Module]) -> Subject:
    cases = {f"batch {batch}": partial(image, batch, 7) for batch in _BATCHES}
    return Subject(name, build, cases, _rows, classes=True, held=_held, calibration=_calibration, ready=_ready)


def _held() -> Sequence[Inputs]:
    return [image(1, 1000 + seed) for seed in range(_HELD)]


def _write_onnx(subject: Subject, folder: Path) -> None:
    quantization: Any = import_module("onnxruntime.quantization")
    prepare: Any = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    plain, folded = folder / "plain.onnx", folder / "folded.onnx"
    torch.onnx.export(
        subject.build(),
        (subject.example()["x"],),
        str(plain),
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )
    prepare(str(plain), str(folded))
    quantization.quantize_static(
        str(folded),
        str(folder / "int8.onnx"),
        _Reader(subject.calibration()),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    plain.unlink()
    folded.unlink()


class _Reader:
    """Calibration data as onnxruntime asks for it."""

    def __init__(self, data: Sequence[Inputs]) -> None:
        self._left = iter([{"x": one["x"].numpy()} for one in data])

    def get_next(self) -> Any:
        """The next inputs, or None."""
        return next(self._left, None)


def _load_onnx(subject: Subject, folder: Path) -> Ready:
    runtime: Any = import_module("onnxruntime")
    session = runtime.InferenceSession(str(folder / "int8.onnx"), shared_pool(), ["CPUExecutionProvider"])
    return partial(_onnx_call, session)


def _onnx_call(session: Any, inputs: Inputs) -> Call:
    given = {"x": inputs["x"].numpy()}
    return lambda: session.run(None, given)[0]


def _write_openvino(subject: Subject, folder: Path) -> None:
    ov: Any = import_module("openvino")
    nncf: Any = import_module("nncf")
    converted = ov.convert_model(subject.build(), example_input=subject.example()["x"])
    data = nncf.Dataset(list(subject.calibration()), lambda inputs: inputs["x"].numpy())
    quantized = nncf.quantize(converted, data, subset_size=_CALIBRATION)
    ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


def _load_openvino(subject: Subject, folder: Path) -> Ready:
    ov: Any = import_module("openvino")
    model = ov.Core().compile_model(folder / "model.xml", "CPU", latency_options())
    return partial(_openvino_call, model.create_infer_request())


def _openvino_call(request: Any, inputs: Inputs) -> Call:
    given = [inputs["x"].numpy()]
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)[0]


def _last(subject: Subject, _: Path) -> Ready:
    model: Any = subject.build()
    return partial(_last_call, model.to(memory_format=torch.channels_last))


def _last_call(model: nn.Module, inputs: Inputs) -> Call:
    return _ready(model, {"x": inputs["x"].contiguous(memory_format=torch.channels_last)})


_ORT, _OV = "onnxruntime int8", "openvino int8"
_TORCH_LAST = Contestant("torch fp32 channels_last", _last, 0.9999)
_CONTESTANTS = (
    REFERENCE,
    _TORCH_LAST,
    contestant("w8a8", by_scheme("w8a8"), least_cosine=_LEAST),
    contestant("w8a8static", by_scheme("w8a8static", calibrated=True), least_cosine=_LEAST),
    Contestant(_ORT, _load_onnx, _LEAST, _write_onnx, pool="onnxruntime", needs=("onnx", "onnxruntime")),
    Contestant(_OV, _load_openvino, _LEAST, _write_openvino, pool="openvino", needs=("openvino", "nncf")),
)
RESNET, MOBILENET = _subject("ResNet-50", resnet), _subject("MobileNetV2", mobilenet)
MODELS = tuple(Model(subject, _CONTESTANTS, (lines.COSINE,)) for subject in (RESNET, MOBILENET))
GOALS = (
    *(Goal(RESNET.name, f"batch {batch}", everywhere(1.1), (_ORT, _OV)) for batch in _BATCHES),
    *(Goal(MOBILENET.name, f"batch {batch}", everywhere(1), (REFERENCE.name, _TORCH_LAST.name)) for batch in _BATCHES),
)
