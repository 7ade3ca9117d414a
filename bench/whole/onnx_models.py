"""onnxruntime on the CPU, with graphs fused by its own optimizer of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...demo import onnx_runtime
from ..peers.onnxruntime import shared_pool
from .contestant import Contestant, Ready
from .subject import Subject


def _prepare(subject: Subject, folder: Path, int8: bool) -> None:
    onnx_runtime.write(subject.build(), subject.example(), subject.axes, subject.fusion, folder)
    if int8:
        onnx_runtime.quantize(folder)
        (folder / onnx_runtime.FP32).unlink()


def _load(subject: Subject, folder: Path) -> Ready:
    (path,) = folder.glob("*.onnx")
    return partial(subject.ready, onnx_runtime.Session(path, shared_pool()))


def _contestant(name: str, int8: bool, least_cosine: float) -> Contestant:
    return Contestant(
        name, _load, least_cosine, partial(_prepare, int8=int8), pool="onnxruntime", needs=onnx_runtime.NEEDS
    )


CONTESTANTS = (
    _contestant("onnxruntime fp32", False, 0.9999),
    _contestant("onnxruntime int8", True, 0.95),
)
