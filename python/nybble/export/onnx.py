"""A model with quantized layers as an ONNX file, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..nn import CompositeModule, QuantizedModule
from .onnx_forms import form_of


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str],
    *,
    dense: bool = False,
    **options: Any,
) -> dict[str, str]:
    """Writes a model as an ONNX file by torch.onnx.export, its quantized layers as integers. The model does not change.

    Linear layers become MatMulNBits, or with 8-bit activations and no groups a chain round MatMulInteger, and tables of
    embeddings rows of codes: see docs/export.md. Weights that no operator takes are stored as codes and multiplied as
    floats.

    Args:
        model: in evaluation mode.
        args: example inputs, as for torch.onnx.export.
        path: the file.
        dense: write other quantized modules, such as convolutions, with the dense weight that their codes stand for.
        **options: for torch.onnx.export, such as kwargs, dynamic_shapes, input_names.

    Returns:
        For each quantized module the operator that it became.

    Raises:
        ImportError: onnx or onnxscript is not installed: pip install 'nybble[onnx]'.
        ValueError: the model has no quantized modules, or some that have no form in ONNX.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("writing ONNX files needs onnx and onnxscript: pip install 'nybble[onnx]'") from error
    found = _forms(model, dense)
    with _in_place_of(model, found):
        torch.onnx.export(model, args, path, dynamo=True, **options)
    return {name: getattr(form, "op", "dense") for name, form in found.items()}


def _forms(model: nn.Module, dense: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, CompositeModule):
            left.append(f"{name} ({type(module).__name__})")
        if not isinstance(module, QuantizedModule):
            continue
        form = form_of(module) or (module.dequantize() if dense else None)
        if form is None:
            left.append(f"{name} ({type(module).__name__})")
        else:
            found[name] = form.eval()
    if left:
        rule = "have no form in ONNX; leave them dense" + (
            "" if dense else ", or pass dense=True where they have one weight"
        )
        raise ValueError(f"model: {', '.join(left)}: {rule}")
    if not found:
        raise ValueError("model: has no quantized modules; use torch.onnx.export")
    if "" in found:
        raise ValueError("model: is a quantized module itself; put it into an nn.Sequential")
    return found


@contextmanager
def _in_place_of(model: nn.Module, forms: dict[str, nn.Module]) -> Iterator[None]:
    """The forms in the places of the modules, for a while."""
    before = {name: model.get_submodule(name) for name in forms}
    try:
        _put(model, forms)
        yield
    finally:
        _put(model, before)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
