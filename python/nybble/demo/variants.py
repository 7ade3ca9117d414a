"""The contestants of the demo, and how each is made from a copy of the fp32 model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..passes.quantize import quantize
from . import onnx_runtime

FP32, BF16, DYNAMIC = "torch fp32", "torch bf16", "torch quantize_dynamic"
ONNX_RUNTIME = "ONNX Runtime int8"
DEFAULT, W8A8, BF16_W8A8 = "nybble default", "nybble w8a8", "nybble bf16 w8a8"


class NotHere(RuntimeError):
    """This torch build cannot make the contestant; the message is torch's."""


@dataclass(frozen=True)
class Built:
    """A contestant ready to run; `report` is nybble's own, or None for others. `megabytes`: None: what the modules hold."""

    model: nn.Module
    report: Any = None
    megabytes: float | None = None


@dataclass(frozen=True)
class Variant:
    """A contestant. `build` may change the model that it is given."""

    name: str
    build: Callable[[nn.Module], Built]


def _quantize_dynamic(model: nn.Module) -> Built:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at every call that this path is deprecated
        try:
            convert: Any = import_module("torch.ao.quantization").quantize_dynamic
        except (ImportError, AttributeError) as error:
            raise NotHere(str(error)) from error
        try:
            return Built(convert(model, {nn.Linear, nn.LSTM, nn.GRU}, torch.qint8))
        except RuntimeError as error:  # no quantized engine on this processor
            raise NotHere(str(error).splitlines()[0]) from error


def _onnx_runtime(model: nn.Module) -> Built:
    if reason := onnx_runtime.why_not():
        raise NotHere(reason)
    ones = torch.ones(2, 8, dtype=torch.int64)
    with TemporaryDirectory() as name:
        folder = Path(name)
        onnx_runtime.write(
            model, dict.fromkeys(onnx_runtime.AXES, ones), onnx_runtime.AXES, onnx_runtime.FUSION, folder
        )
        onnx_runtime.quantize(folder)
        path = folder / onnx_runtime.INT8
        return Built(onnx_runtime.Session(path), megabytes=path.stat().st_size / 1e6)


def _nybble(*scheme: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[nn.Module], Built]:
    def build(model: nn.Module) -> Built:
        model = model.to(dtype)
        return Built(model, quantize(model, *scheme, **options))

    return build


# "default" is a plain call of nybble.quantize; the others replace every Linear, whether or not that is faster
# here. All run fused: the chains are found in the first calls.
VARIANTS = (
    Variant(FP32, Built),
    Variant(BF16, lambda model: Built(model.to(torch.bfloat16))),
    Variant(DYNAMIC, _quantize_dynamic),
    Variant(ONNX_RUNTIME, _onnx_runtime),
    Variant(DEFAULT, _nybble()),
    Variant(W8A8, _nybble("w8a8", goal="memory", fuse=True)),
    Variant("nybble w8a7", _nybble("w8a7", goal="memory", fuse=True)),
    Variant(BF16_W8A8, _nybble("w8a8", dtype=torch.bfloat16, goal="memory", fuse=True)),
    Variant("nybble w4a8g128", _nybble("w4a8g128", goal="memory", fuse=True)),
    Variant("nybble w4a16g128", _nybble("w4a16g128", goal="memory", fuse=True)),
)
