"""A foreign checkpoint as a model: dense tensors as they are, quantized layers as nybble's modules."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..checkpoint.skeleton import skeleton
from ..compiled.rounding import quantize_weight, sqnr_db
from ..model.bar import bar
from ..model.options import check_progress
from ..nn.linear import Linear
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .fit import fit, keep_codes
from .formats import open_foreign
from .opened import Opened
from .report import ImportedLayer, ImportReport
from .weight import ForeignWeight

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model, and what became of each of its quantized layers."""

    model: nn.Module
    report: ImportReport


class _Chosen(NamedTuple):
    """A weight in a scheme of nybble. ``why``: it is not the foreign one bit for bit."""

    scheme: Scheme
    quantized: QuantizedWeight
    sqnr_db: float
    why: str | None


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    act_bits: int = 16,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Loaded:
    """A transformers model from another library's quantized checkpoint, whose quantized layers are nybble's modules.

    A layer that a scheme of nybble holds exactly is kept bit for bit. Any other is rounded again, to the nearest scheme: its
    codes are kept where only scales do not fit; else it is rounded to 4 bits in groups of 32, or to 8 bits if it has
    more than 4. The report says which, why, and what it cost. There is never a dense copy of more than one layer.

    Args:
        path: a directory with config.json and safetensors files, see docs/foreign.md.
        act_bits: 16: float activations; 8: quantized ones, for each token.
        dtype: of the activations and of what is not quantized; None: what the configuration says.
        progress: whether to show a bar of the layers on stderr; None: on a terminal, for work that takes long.

    Returns:
        The model, in eval mode, and the report.

    Raises:
        CheckpointError: (a ValueError) the checkpoint is damaged, of no known format, or does not fit its model.
        ImportError: transformers is not installed.
    """
    check_progress(progress)
    row, opened = open_foreign(path)
    model = empty_model(opened.config)
    dtype = dtype or _dtype(opened.config)
    layers = []
    with bar(len(opened.layers), progress) as advance:
        for name in opened.layers:
            layers.append(_replace(model, name, opened, act_bits, dtype))
            advance(name)
    _fill(model, opened, dtype)
    return Loaded(model.eval(), ImportReport(row.name, tuple(layers)))


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that config.json tells, without memory for its parameters. Code beside the checkpoint is ignored."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("nybble.load_pretrained needs transformers: pip install 'nybble[hf]'") from error
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    kind: Any = getattr(transformers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json: architectures {names!r}: must name a model of transformers")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    try:
        with skeleton():
            made: Any = cast(Any, kind).config_class.from_dict(plain)
            model: nn.Module = kind(made)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"config.json: {name} cannot be made from it: {error}") from error
    return model


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    told = config.get("dtype", config.get("torch_dtype", "float32"))
    if told not in tuple(_DTYPES):
        raise CheckpointError(f"config.json: dtype {told!r}: must be one of {', '.join(_DTYPES)}")
    return _DTYPES[told]


def _replace(model: nn.Module, name: str, opened: Opened, act_bits: int, dtype: torch.dtype) -> ImportedLayer:
    """Put nybble's module in the place of a layer."""
    try:
        old: Any = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"{name}: the model has no such module; experts in one tensor are not read yet"
        ) from error
    matrix = getattr(old, "weight", None)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or type(old).__name__ not in ("Linear", "Conv1D"):
        raise CheckpointError(f"{name}: is a {type(old).__name__}, must be a Linear or a Conv1D")
    shape = tuple(matrix.shape) if isinstance(old, nn.Linear) else tuple(matrix.shape)[::-1]
    weight = _shaped(opened.layers[name].read(), shape, name)
    chosen = _choose(weight, act_bits)
    bias = _bias(opened, f"{name}.bias", old, shape[0], dtype)
    new = Linear.from_quantized(chosen.quantized, shape[1], bias, chosen.scheme, dtype)
    model.set_submodule(name, new)
    opened.release()
    sizes = opened.layers[name].nbytes, chosen.quantized.nbytes
    return ImportedLayer(name, weight.shape, weight.describe(), str(chosen.scheme), *sizes, chosen.sqnr_db, chosen.why)


def _bias(opened: Opened, name: str, old: Any, rows: int, dtype: torch.dtype) -> Tensor | None:
    if getattr(old, "bias", None) is not None:
        return _part(opened, name, (rows,), dtype)
    if name in opened.parts and opened.parts[name].read().any():  # some writers give every layer a bias of zeros
        raise CheckpointError(f"{name}: is not 0, and the model has no such parameter")
    return None


def _shaped(weight: ForeignWeight, shape: tuple[int, ...], name: str) -> ForeignWeight:
    """The weight, with the shape of the model where the file does not have it."""
    n, k = shape
    if weight.shape == (1, n * k) and n > 1 and k % weight.group_size == 0:
        minimum = None if weight.minimum is None else weight.minimum.reshape(n, -1)
        codes, scale = weight.codes.reshape(n, -1), weight.scale.reshape(n, -1)
        return replace(weight, codes=codes, scale=scale, minimum=minimum)
    if weight.shape != (n, k):
        raise CheckpointError(f"{name}: is {weight.shape} in the checkpoint, and {(n, k)} in the model")
    return weight


def _choose(weight: ForeignWeight, act_bits: int) -> _Chosen:
    found = fit(weight, act_bits)
    if found.scheme is not None and found.quantized is not None:
        return _Chosen(found.scheme, found.quantized, math.inf, None)
    dense, kept = weight.dequantize(), keep_codes(weight, act_bits)
    scheme, quantized = kept.scheme, kept.quantized
    if scheme is None or quantized is None:
        eight = weight.bits > 4 or weight.shape[1] % 32 != 0
        scheme = Scheme(8, act_bits) if eight else Scheme(4, act_bits, 32, symmetric=False)
        quantized = quantize_weight(dense, scheme)
    return _Chosen(scheme, quantized, sqnr_db(dense, quantized, scheme), found.why)


def _part(opened: Opened, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy of a tensor that is not quantized."""
    if name not in opened.parts:
        raise CheckpointError(f"{name}: is missing in the checkpoint")
    found = opened.parts[name].read()
    if tuple(found.shape) != shape or not found.is_floating_point():
        raise CheckpointError(f"{name}: is {tuple(found.shape)} {found.dtype}, must be {shape} and a float")
    return found.to(dtype, copy=True)


def _fill(model: nn.Module, opened: Opened, dtype: torch.dtype) -> None:
    """Give every parameter and saved buffer that is not a quantized layer's its value, then tie those that are tied."""
    theirs = {f"{name}.bias" for name in opened.layers}
    old = {name: value for name, value in model.named_parameters() if name not in theirs}
    saved = {name: value for name, value in model.named_buffers() if name in opened.parts}
    if extra := sorted(opened.parts.keys() - theirs - old.keys() - saved.keys()):
        raise CheckpointError(f"{extra[0]}: the model has no such parameter")
    for name in old.keys() & opened.parts.keys():
        module, _, last = name.rpartition(".")
        tensor = _part(opened, name, tuple(old[name].shape), dtype)
        setattr(model.get_submodule(module), last, nn.Parameter(tensor, requires_grad=False))
        opened.release()
    for name, buffer in saved.items():
        buffer.copy_(_part(opened, name, tuple(buffer.shape), buffer.dtype))
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    untouched = {id(value) for value in old.values()}
    for name, value in model.named_parameters():
        if id(value) in untouched:
            raise CheckpointError(f"{name}: is missing in the checkpoint")
