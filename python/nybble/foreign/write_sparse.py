"""Writes 2:4 layers of compressed-tensors as sparse-24-bitmask, which its versions up to 0.14 read. See compressed_sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..weights.sparsity import NofM
from ..weights.weight_type import FloatType
from . import write_compressed as dense
from .held import Held, NotHeldError
from .writer import Encoded, Layers

_SPARSE = "sparse-24-bitmask"


def encode(layer: Held, round_scales: bool) -> Encoded:
    scheme, kind = layer.scheme, layer.scheme.weight_type
    floats = isinstance(kind, FloatType)
    if scheme.sparsity != NofM(2, 4) or not (floats or kind.bits == 8):
        return dense.encode(layer, round_scales)
    if layer.dense != "Linear" or layer.shape[1] % 4:
        raise NotHeldError(
            f"is a {layer.dense} of {layer.shape[1]} inputs: must be a Linear, its inputs a multiple of 4"
        )
    if floats:
        return Encoded(_compressed(layer.quantized.qweight), {"sparse": True}, f"{_SPARSE}, floats")
    plain = dense.encode(layer, round_scales)
    codes = layer.quantized.qweight
    tensors = {name: value for name, value in plain.tensors.items() if name.startswith(("weight_scale", "input"))}
    setting = {**plain.setting, "format": "int-quantized", "sparse": True}
    return Encoded({**_compressed(codes), **tensors}, setting, f"{_SPARSE}, 8 bits", plain.sqnr_db, plain.notes)


def _compressed(weight: Tensor) -> dict[str, Tensor]:
    """Two of each four values: those that are not 0, and zeros where there are fewer."""
    n, k = weight.shape
    kept = (weight.reshape(n, k // 4, 4) != 0).byte().topk(2).indices
    mask = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, kept, True).reshape(n, k)
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    shape = torch.tensor([[n], [k]])
    return {"compressed": weight[mask].reshape(n, k // 2), "bitmask": torch.from_numpy(bits), "shape": shape}


def config(layers: Layers) -> dict[str, Any]:
    told = dense.config(_without(layers))
    names = [name for name, setting in layers.settings.items() if "sparse" in setting]
    if names:
        told["sparsity_config"] = {
            "format": _SPARSE,
            "targets": names,
            "ignore": [],
            "global_sparsity": 0.5,
            "sparsity_structure": "2:4",
            "registry_requires_subclass": False,
        }
    return told


def notes(layers: Layers) -> list[str]:
    return [f"{_SPARSE}: compressed-tensors 0.15 and later do not read it", *dense.notes(_without(layers))]


def _without(layers: Layers) -> Layers:
    """Without what says that layers are sparse, and those that have float weights among the dense ones."""
    plain = {
        name: {key: setting[key] for key in setting if key != "sparse"} for name, setting in layers.settings.items()
    }
    floats = [name for name, setting in plain.items() if not setting]
    return Layers({name: setting for name, setting in plain.items() if setting}, [*layers.dense, *floats])
