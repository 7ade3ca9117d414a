"""The rows that the package adds. Each is the value of an entry point; nothing is registered."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nybble import layouts
from nybble.dispatch import KernelSpec, Target
from nybble.layouts import Layout
from nybble.weights import QuantizedWeight, Scheme, WeightType
from nybble.weights.sparsity import NofM

# Codes 0 to 3, four in a byte; a bfloat16 scale for each 32 inputs.
SCHEME = WeightType(
    2,
    lowest=0,
    highest=3,
    middle=2,
    largest_step=3,
    stored=torch.uint8,
    per_byte=4,
    scale=torch.bfloat16,
    zero_point=torch.uint8,
    group_sizes=(32,),
    patterns=(NofM,),
)

TARGET = Target("toy", why_not=lambda: os.environ.get("NO_TOY"))


def _sections(scheme, out_features, in_features):
    groups = (scheme.groups(in_features), out_features)
    spec = {"codes": ((in_features, out_features), torch.uint8), "scale": (groups, torch.bfloat16)}
    return spec if scheme.symmetric else {**spec, "zero_point": (groups, torch.uint8)}


def _fill(quantized, scheme, in_features):
    parts = {name: tensor.t() for name, tensor in quantized.tensors().items() if name != "qweight"}
    return {"codes": scheme.weight_type.unpack(quantized.qweight, in_features).t(), **parts}


def _collect(parts, scheme, out_features, in_features):
    rest = {name: tensor.t().contiguous() for name, tensor in parts.items() if name != "codes"}
    return QuantizedWeight(scheme.weight_type.pack(parts["codes"].t().contiguous()), **rest)


# A code in a byte, inputs by outputs.
LAYOUT = Layout("columns", _sections, _fill, _collect)

RAN: list[tuple[str, int]] = []


class Plan:
    """y = x w^T + bias, as its calls are counted in RAN."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        self._shape = (scheme, out_features, in_features)

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        scheme, _, k = self._shape
        parts = layouts.views(packed, LAYOUT.name, *self._shape)
        zero = parts.get("zero_point", torch.full((1, 1), 2))
        size = scheme.group_size or k
        steps = parts["codes"].float() - (zero.float().repeat_interleave(size, 0)[:k] if len(zero) > 1 else zero)
        weight = steps * parts["scale"].float().repeat_interleave(size, 0)[:k]
        rows = x.reshape(-1, k).float() @ weight
        out.view(rows.shape).copy_(rows if bias is None else rows + bias.float())
        RAN.append((str(scheme), len(rows)))


KERNEL = KernelSpec("w2a16_toy", "w2a16", TARGET.name, LAYOUT.name, Plan)
