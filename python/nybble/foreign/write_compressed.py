"""Writes compressed-tensors: pack-quantized without quantized activations, int-quantized with them. See compressed_dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bits import as_words, pack_stream
from .held import Held, NotHeldError
from .writer import Encoded, Layers, in_words

# Layers that vLLM runs as one, so that they must be quantized alike.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PACKED, _PLAIN = "pack-quantized", "int-quantized"


def encode(layer: Held, round_scales: bool) -> Encoded:
    _check(layer)
    codes, zero, (n, k) = layer.unsigned(), layer.unsigned_zeros(), layer.shape
    # The dtype of the model, as the library does, if it has them; else the layer's own.
    own = layer.quantized.scale.dtype
    scale, sqnr_db = layer.scales(
        (layer.module.dtype, own) if not round_scales else (layer.module.dtype,), round_scales
    )
    tensors = {"weight_scale": scale}
    if layer.scheme.act_type.quantized:
        tensors |= {"weight": _signed(codes, layer.bits), **_inputs(layer)}
        if zero is not None:
            tensors["weight_zero_point"] = _signed(zero, layer.bits)
    else:
        tensors |= {"weight_packed": _packed(codes, layer.bits), "weight_shape": torch.tensor([n, k])}
        if zero is not None:
            tensors["weight_zero_point"] = _packed(zero.T, layer.bits).T
    setting = setting_of(layer)
    how = f"{setting['format']}, {in_words(layer)}"
    return Encoded(tensors, setting, how, sqnr_db, tuple(_notes(layer, scale)))


def _check(layer: Held) -> None:
    size, inputs = layer.scheme.group_size, layer.shape[1]
    if layer.dense != "Linear":
        raise NotHeldError(f"is a {layer.dense}: compressed-tensors quantizes torch.nn.Linear only")
    if layer.scheme.ordered:
        raise NotHeldError(
            "its columns are in activation order: compressed-tensors 0.19 and later, and vLLM, have no weight_g_idx"
        )
    if size and inputs % size:
        raise NotHeldError(f"{inputs} inputs are no multiple of the group size {size}")


def _packed(codes: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(as_words(pack_stream(np.ascontiguousarray(codes.numpy()), bits)))


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _inputs(layer: Held) -> dict[str, Tensor]:
    """Scale and zero point of static activations."""
    act = layer.act
    if act is None:
        return {}
    scale = act.scale.to(layer.module.dtype)
    tensors = {"input_scale": scale if torch.equal(scale.float(), act.scale) else act.scale}
    return tensors if not act.zero_point.any() else {**tensors, "input_zero_point": act.zero_point}


def _notes(layer: Held, scale: Tensor) -> Iterator[str]:
    act, dtype = layer.scheme.act_bits, layer.module.dtype
    if layer.scheme.act_type.quantized and act != 8:
        yield f"activations of {act} bits are told as 8 bits"
    if scale.dtype != dtype:
        yield (
            f"scales are {_name(scale)}: transformers rounds them to {_name(torch.empty(0, dtype=dtype))} as it loads, "
            "but with CompressedTensorsConfig(dequantize=True)"
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def setting_of(layer: Held) -> dict[str, Any]:
    """A group of config_groups, but for its targets."""
    scheme = layer.scheme
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    act = layer.act
    inputs = None
    if scheme.act_type.quantized:
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": act is not None and not act.zero_point.any().item(),
            "strategy": "tensor" if scheme.static else "token",
            "dynamic": not scheme.static,
        }
    format = _PLAIN if scheme.act_type.quantized else _PACKED
    return {"format": format, "weights": weights, "input_activations": inputs, "output_activations": None}


def config(layers: Layers) -> dict[str, Any]:
    groups = layers.groups()
    formats = {setting["format"] for setting, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {**setting, "targets": ["Linear"] if len(groups) == 1 else names}
            for i, (setting, names) in enumerate(groups)
        },
        "ignore": list(layers.dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
    }


def notes(layers: Layers) -> list[str]:
    found = []
    groups = layers.groups()
    asymmetric = any(s["format"] == _PACKED and not s["weights"]["symmetric"] for s, _ in groups)
    if asymmetric and len(groups) == 1:
        found.append("asymmetric: transformers loads them with CompressedTensorsConfig(dequantize=True) only")
    elif asymmetric:
        found.append(f"{len(groups)} settings, and one is asymmetric: transformers does not load them")
    elif len(groups) > 1:
        found.append(
            f"{len(groups)} settings: load them in transformers without dequantize=True, which takes the first one for all"
        )
    return [*found, *_split(layers)]


def _split(layers: Layers) -> list[str]:
    """Which layers that vLLM runs as one are not quantized alike."""
    for name in layers.settings:
        parent, _, last = name.rpartition(".")
        for joined in _JOINED:
            if last in joined:
                names = [f"{parent}.{other}" for other in joined]
                if any(n in layers and layers.settings.get(n) != layers.settings[name] for n in names):
                    return [f"vLLM refuses it: {', '.join(joined)} of {parent} are not quantized alike"]
    return []
