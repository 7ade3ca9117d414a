"""A model with quantized layers as an AOTInductor package, which runs in processes that never import nybble."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as layers
from ..dispatch.written import libraries, plan_text
from .onnx_forms import Table
from .swap import forms_of, in_place_of, report_of

LIBRARY, KERNELS, PACKAGE = "libnybble_aot.so", "libnybble_kernels.so", "model.pt2"


def aot_package(
    model: nn.Module,
    args: tuple[Any, ...],
    folder: str | PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dense: bool = False,
    inductor_configs: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Compiles a model on the CPU by torch.export and AOTInductor. The model does not change.

    The folder gets model.pt2 and two libraries: libnybble_aot.so, which a process loads before the package, and
    libnybble_kernels.so, which that finds beside itself. A process that runs them needs torch, in Python or C++, but not
    nybble, and a CPU that has the instructions of some kernel that reads the weights as they are packed here.

    Args:
        model: in evaluation mode.
        args, kwargs, dynamic_shapes: as for torch.export.export.
        folder: is made if it is missing; its files of these names are replaced.
        dense: compile other quantized modules, such as convolutions, with the dense weight that their codes stand for.
        inductor_configs: as for torch._inductor.aoti_compile_and_package.

    Returns:
        For each quantized module what it became.

    Raises:
        ValueError: the model has no quantized modules, or some that have no form in a package.
        NoKernelError: no compiled kernel reads a packed weight.
        FileNotFoundError: nybble was built without libnybble_aot.so.
        RuntimeError: that cannot be loaded.
    """
    load_op()
    found = forms_of(model, _form_of, dense, "a package")
    to = Path(folder)
    to.mkdir(parents=True, exist_ok=True)
    with in_place_of(model, found), torch.no_grad():
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(to / PACKAGE), inductor_configs=inductor_configs)
    for source, name in zip(libraries(), (LIBRARY, KERNELS), strict=True):
        shutil.copyfile(source, to / name)
    return report_of(found)


@lru_cache(maxsize=1)
def load_op() -> None:
    """Loads the op nybble_aot::linear into this process. Raises as ``libraries``, or RuntimeError with what went wrong."""
    path = libraries()[0]
    torch.ops.load_library(str(path))
    problem = ctypes.CDLL(str(path)).nybble_aot_problem
    problem.restype = ctypes.c_char_p
    if problem():
        raise RuntimeError(f"{path}: {problem().decode()}")
    torch.library.register_fake("nybble_aot::linear", _fake)


def _fake(x: Tensor, packed: Tensor, bias: Tensor, plan: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


class _Linear(nn.Module):
    """A packed Linear that calls the op of packages."""

    op = "nybble_aot::linear"
    packed: Tensor
    bias: Tensor
    plan: Tensor

    def __init__(self, layer: layers.Linear) -> None:
        super().__init__()
        layer.pack()
        self.out_features, bias = layer.out_features, layer.bias
        text = plan_text(str(layer.scheme), str(layer.layout), layer.out_features, layer.in_features)
        self.register_buffer("packed", layer.packed)
        self.register_buffer("bias", torch.empty(0) if bias is None else bias.detach().contiguous())
        self.register_buffer("plan", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """As nybble.nn.Linear."""
        y: Tensor = torch.ops.nybble_aot.linear(x, self.packed, self.bias, self.plan, self.out_features)
        return y


def _form_of(module: nn.Module) -> nn.Module | None:
    if isinstance(module, layers.Linear):
        return _Linear(module)
    return Table(module) if type(module) is layers.Embedding else None
