"""OpenVINO on the CPU, in fp32, and in int8 by NNCF's quantization after training with calibration data.

Where it is not told to compute in fp32 it takes bfloat16 for what is not int8, on CPUs that have it; so does the int8 model.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..peers.openvino import latency_options
from .contestant import Contestant, Ready
from .subject import Call, Inputs, Subject

_FILE = "model.xml"


def _prepare(subject: Subject, folder: Path, int8: bool) -> None:
    ov: Any = import_module("openvino")
    model, inputs = subject.build(), subject.example()
    with torch.no_grad():
        converted = ov.convert_model(model, example_input=dict(inputs))
    if int8:
        nncf: Any = import_module("nncf")
        names = [one.any_name for one in converted.inputs]
        data = nncf.Dataset(subject.calibration(), lambda batch: {name: batch[name].numpy() for name in names})
        converted = nncf.quantize(
            converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(subject.calibration())
        )
    ov.save_model(converted, folder / _FILE, compress_to_fp16=False)


def _load(subject: Subject, folder: Path, exact: bool) -> Ready:
    ov: Any = import_module("openvino")
    options = {**latency_options(), **({"INFERENCE_PRECISION_HINT": "f32"} if exact else {})}
    model = ov.Core().compile_model(folder / _FILE, "CPU", options)
    return partial(_ready, model.create_infer_request(), [one.any_name for one in model.inputs])


def _ready(request: Any, names: list[str], inputs: Inputs) -> Call:
    given = [inputs[name].numpy() for name in names]
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)[0]


def _contestant(name: str, int8: bool, least_cosine: float) -> Contestant:
    return Contestant(
        name,
        partial(_load, exact=not int8),
        least_cosine,
        partial(_prepare, int8=int8),
        pool="openvino",
        needs=("openvino", *(("nncf",) if int8 else ())),
    )


CONTESTANTS = (_contestant("openvino fp32", False, 0.9999), _contestant("openvino int8", True, 0.95))
