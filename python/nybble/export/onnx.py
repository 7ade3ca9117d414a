"""A model with quantized layers as an ONNX file, for ONNX Runtime."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

from .onnx_forms import form_of
from .swap import forms_of, in_place_of, report_of


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
    found = forms_of(model, form_of, dense, "ONNX")
    with in_place_of(model, found):
        torch.onnx.export(model, args, path, dynamo=True, **options)
    return report_of(found)
