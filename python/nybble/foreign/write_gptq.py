"""Writes GPTQ, v1 and v2, as gptqmodel, transformers and vLLM read it. See gptq."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bits import as_words, pack_stream
from .held import Held, NotHeldError
from .writer import Encoded, ForeignWriter, Layers, in_words


def _encode(layer: Held, round_scales: bool, v1: bool) -> Encoded:
    bits, size, (n, k) = layer.bits, layer.scheme.group_size, layer.shape
    codes, zero = layer.unsigned(), layer.unsigned_zeros()
    for what, count in (("outputs", n), ("inputs", k)):
        if count * bits % 32:
            raise NotHeldError(f"{count} {what} of {bits} bits do not fill whole words of 32 bits")
    if size and k % size:
        raise NotHeldError(f"{k} inputs are no multiple of the group size {size}")
    scale, sqnr_db = layer.scales((torch.float16,), round_scales)
    zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8) if zero is None else zero
    tensors = {
        "qweight": _words(codes, bits).T,
        "qzeros": _zeros(zeros.T, bits, v1),
        "scales": scale.T,
        "g_idx": layer.column_groups(),
    }
    setting = {"bits": bits, "group_size": size or -1, "sym": zero is None, "desc_act": layer.scheme.ordered}
    act = layer.scheme.act_bits
    notes = (f"activations of {act} bits are not told",) if layer.scheme.act_type.quantized else ()
    return Encoded(tensors, setting, in_words(layer), sqnr_db, notes)


def _words(codes: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(as_words(pack_stream(np.ascontiguousarray(codes.numpy()), bits)))


def _zeros(zeros: Tensor, bits: int, v1: bool) -> Tensor:
    """Rows of zero points as words; v1 subtracts one from each, in whole words: a zero point of 0 borrows."""
    words = _words(zeros, bits).numpy().view(np.uint32)
    ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
    return torch.from_numpy((words - ones if v1 else words).view(np.int32))


def _config(layers: Layers, v1: bool) -> dict[str, Any]:
    groups = layers.groups()
    (first, _), *others = groups
    form = "gptq" if v1 else "gptq_v2"
    told = {"quant_method": "gptq", **first, "checkpoint_format": form, "format": form, "method": "gptq"}
    told |= {"pack_dtype": "int32", "lm_head": "lm_head" in layers.settings}
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in layers.dense if not _left(name)}
    rules |= {f"+:^{re.escape(name)}$": dict(setting) for setting, names in others for name in names}
    if rules:
        told["dynamic"] = rules  # of gptqmodel and vLLM
    if any(not _left(name) for name in layers.dense):
        told["modules_in_block_to_quantize"] = [list(layers.settings)]  # of transformers
    return told


def _left(name: str) -> bool:
    """Whether readers leave a layer dense without being told: the head."""
    return name.rpartition(".")[2] == "lm_head"


def _notes(layers: Layers) -> list[str]:
    found, groups = [], layers.groups()
    if len(groups) > 1:
        found.append(
            f"{len(groups)} settings: told as `dynamic`, which gptqmodel and vLLM read, and transformers does not"
        )
    if any(not setting["sym"] for setting, _ in groups):
        found.append("asymmetric layers: vLLM refuses them")
    if any(setting["desc_act"] and setting["group_size"] != -1 for setting, _ in groups):
        found.append("columns in activation order with groups: vLLM refuses them")
    return found


def _writer(name: str, what: str, v1: bool) -> ForeignWriter:
    return ForeignWriter(name, what, partial(_encode, v1=v1), partial(_config, v1=v1), _notes)


GPTQ = _writer("gptq", "GPTQ, whose zero points are stored less one", True)
GPTQ_V2 = _writer("gptq-v2", "GPTQ, with zero points as they are", False)
