"""What stands for a quantized module in an ONNX file: modules whose forward torch's exporter knows.

Sources: the operators MatMulNBits of the domain com.microsoft (ONNX Runtime, docs/ContribOperators.md) and MatMulInteger
of ONNX. The numbers are those of ``weights.rounding.QuantizedWeight`` and ``dispatch.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dispatch.reference import quantize
from ..nn import Embedding, Linear
from ..weights.activations import ActScale
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme

# Block sizes that ONNX Runtime's kernels of MatMulNBits have.
_BLOCKS = (128, 64, 32, 16)
_INT8_PRODUCTS = 4  # accuracy_level: activations are rounded to int8, block by block


def form_of(module: nn.Module) -> nn.Module | None:
    """The module that stands for a quantized one, or None if there is none."""
    if type(module) is Embedding:
        return Table(module)
    if type(module) is not Linear:
        return None
    quantized, scheme = module.quantized(), module.scheme
    if _fits_integers(quantized, scheme):
        return Integers(module, quantized)
    return Blocks(module, quantized) if _fits_blocks(quantized, scheme) else Floats(module, quantized)


def _fits_integers(quantized: QuantizedWeight, scheme: Scheme) -> bool:
    plain = quantized.zero_point is None and quantized.minimum is None and quantized.book is None
    return plain and scheme.weight_bits == 8 and scheme.act_type.quantized and scheme.group_size is None


def _fits_blocks(quantized: QuantizedWeight, scheme: Scheme) -> bool:
    whole = scheme.group_size is None or scheme.group_size % _BLOCKS[-1] == 0
    numbers = quantized.minimum is None and quantized.book is None and not scheme.static
    return numbers and whole and scheme.weight_bits in (4, 8)


def _zero_points(quantized: QuantizedWeight, scheme: Scheme) -> Tensor:
    """(N, groups), as numbers of the codes."""
    if quantized.zero_point is None:
        return torch.full(quantized.scale.shape, scheme.weight_type.middle)
    return quantized.zero_point.int()


class _Layer(nn.Module):
    """y = x w^T + bias. op: the name of what multiplies."""

    op: str
    bias: Tensor | None
    order: Tensor | None

    def __init__(self, layer: Linear, quantized: QuantizedWeight) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)
        self.register_buffer("order", None if quantized.order is None else quantized.order.long())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the same dtype."""
        dtype = x.dtype
        y = self.product(x if self.order is None else x[..., self.order])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (..., K), its columns in the order of the codes, times the weight."""
        raise NotImplementedError


class Integers(_Layer):
    """Activations rounded row by row as nybble does it, and MatMulInteger: nybble's numbers, but for the last rounding."""

    op = "MatMulInteger"
    codes: Tensor
    sums: Tensor
    scale: Tensor
    act_scale: Tensor | None
    act_zero: Tensor | None

    def __init__(self, layer: Linear, quantized: QuantizedWeight) -> None:
        super().__init__(layer, quantized)
        codes = layer.scheme.weight_type.unpack(quantized.qweight, layer.in_features).to(torch.int8)
        self.act_type, act = layer.scheme.act_type, layer.act()
        self.register_buffer("codes", codes.t().contiguous())
        self.register_buffer("sums", codes.sum(1, dtype=torch.int32))
        self.register_buffer("scale", quantized.scale.float().flatten())
        self.register_buffer("act_scale", None if act is None else act.scale)
        self.register_buffer("act_zero", None if act is None else act.zero_point)

    def product(self, x: Tensor) -> Tensor:
        """As _Layer.product, float32."""
        act = None if self.act_scale is None or self.act_zero is None else ActScale(self.act_scale, self.act_zero)
        codes, scale, zero = quantize(x.reshape(-1, self.in_features), act, self.act_type)
        shape = (codes.shape[0], self.out_features)
        sums = torch.onnx.ops.symbolic("MatMulInteger", (codes, self.codes), dtype=torch.int32, shape=shape)
        y = (sums - zero[:, None] * self.sums).float() * self.scale * scale[:, None]
        return y.reshape(*x.shape[:-1], self.out_features)


class Blocks(_Layer):
    """MatMulNBits. For schemes with 8-bit activations ONNX Runtime rounds these block by block, where nybble does it by row."""

    op = "MatMulNBits"
    codes: Tensor
    scale: Tensor
    zeros: Tensor

    def __init__(self, layer: Linear, quantized: QuantizedWeight) -> None:
        super().__init__(layer, quantized)
        scheme, k, n = layer.scheme, layer.in_features, layer.out_features
        size = next((one for one in _BLOCKS if (scheme.group_size or one) % one == 0 and one <= max(k, 16)), 16)
        blocks, each = -(-k // size), (scheme.group_size or -(-k // size) * size) // size
        codes = scheme.weight_type.unpack(quantized.qweight, k).int()
        zeros, shift = _zero_points(quantized, scheme), 128 if scheme.weight_bits == 8 else 0

        def spread(groups: Tensor) -> Tensor:
            return groups.repeat_interleave(each, 1)[:, :blocks].contiguous()

        zeros = spread(zeros)
        whole = zeros.repeat_interleave(size, 1)  # what pads a row is 0
        whole[:, :k] = codes
        self.register_buffer("codes", _stream(whole + shift, scheme.weight_bits).view(n, blocks, -1))
        self.register_buffer("scale", spread(quantized.scale.float()))
        self.register_buffer("zeros", _stream(zeros + shift, scheme.weight_bits))
        self.settings: dict[str, Any] = {"K": k, "N": n, "bits": scheme.weight_bits, "block_size": size}
        if scheme.act_type.quantized:
            self.settings["accuracy_level"] = _INT8_PRODUCTS

    def product(self, x: Tensor) -> Tensor:
        """As _Layer.product, in x's dtype."""
        inputs = (x, self.codes, self.scale.to(x.dtype), self.zeros)
        shape, name = (*x.shape[:-1], self.out_features), "com.microsoft::MatMulNBits"
        found: Tensor = torch.onnx.ops.symbolic(name, inputs, self.settings, dtype=x.dtype, shape=shape, version=1)
        return found


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) to bytes, the first of two in the low half; an odd row ends with 0."""
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


class _Values(nn.Module):
    """Rows of a weight as codes, and their values, float32, exactly as nybble reads them."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    minimum: Tensor | None
    book: Tensor | None

    def __init__(self, quantized: QuantizedWeight, scheme: Scheme, k: int) -> None:
        super().__init__()
        self.k, self.size = k, scheme.group_size or k
        codes = scheme.weight_type.unpack(quantized.qweight, k)
        self.halves = scheme.weight_bits == 4
        scale, minimum = quantized.steps
        zeros = None if minimum is not None or quantized.book is not None else _zero_points(quantized, scheme).float()
        self.register_buffer("codes", _stream(codes, 4) if self.halves else codes.contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("zeros", zeros if zeros is not None and zeros.any() else None)
        self.register_buffer("minimum", None if minimum is None else minimum.float())
        self.register_buffer("book", quantized.book)

    def forward(self, rows: Any) -> Tensor:
        """The rows (R, K) of some numbers, or of slice(None)."""
        codes = self.codes[rows]
        if self.halves:  # in floats, since torch's exporter makes a shift of uint8 one of int8
            low = (codes & 15).float()
            codes = torch.stack([low, (codes.float() - low) / 16], -1).flatten(-2)[..., : self.k]
        values = codes.float() if self.book is None else self.book[codes.long()]
        if self.zeros is not None:
            values = values - self._spread(self.zeros[rows])
        values = values * self._spread(self.scale[rows])
        return values if self.minimum is None else values + self._spread(self.minimum[rows])

    def _spread(self, groups: Tensor) -> Tensor:
        """What groups (R, groups) share, for each column."""
        if groups.shape[1] == 1:
            return groups
        return groups[..., None].expand(-1, -1, self.size).flatten(1)[:, : self.k]


class Floats(_Layer):
    """Codes in the file, multiplied as float32: for weights that no operator of ONNX Runtime takes. Activations are floats."""

    op = "MatMul of dequantized codes"

    def __init__(self, layer: Linear, quantized: QuantizedWeight) -> None:
        super().__init__(layer, quantized)
        self.values = _Values(quantized, layer.scheme, layer.in_features)

    def product(self, x: Tensor) -> Tensor:
        """As _Layer.product, float32."""
        return F.linear(x.float(), self.values(slice(None)))


class Table(nn.Module):
    """Rows of codes, of which only those that are asked for are dequantized."""

    op = "Gather of codes"

    def __init__(self, table: Embedding) -> None:
        super().__init__()
        self.values, self.dtype, self.width = (
            _Values(table.quantized(), table.scheme, table.in_features),
            table.dtype,
            table.in_features,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> rows (..., K) in the dtype of the module."""
        rows: Tensor = self.values(ids.reshape(-1))
        return rows.reshape(*ids.shape, self.width).to(self.dtype)
