"""A trainable stand-in for a quantized or pruned layer: fake-quantized weights with straight-through gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ...model.eligible import bias_of, dense_weight
from ...nn.kinds import kind_of
from ...nn.module import QuantizedModule
from ...weights.rounding import QuantizedWeight, Ranges
from ...weights.weight_type import FloatType

_LEAST_GAIN = 0.05


def round_through(x: Tensor) -> Tensor:
    """x rounded to the nearest integer; the gradient passes through."""
    return x + (x.round() - x).detach()


def store_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x rounded to the precision of a dtype; the gradient passes through."""
    return x + (x.to(dtype).float() - x).detach()


class Shadow(nn.Module):
    """A trainable stand-in for a layer; ``make`` builds the layer with the trained values.

    latent (N, K): the weight before rounding, less its zero point, in units of the scale (for a pruned float layer, the
    weight itself). Pruned weights stay 0. gain (N, groups): the scale is that of the layer times 1 + gain. At first it
    has the codes and scales of the layer; ``latent`` differs from the codes by the rounding error of the dense weight.

    Args:
        layer: a quantized layer, or a pruned dense one.
        dense: the original layer.
    """

    def __init__(self, layer: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        # In lists, so that they do not become submodules.
        self._layer, self._dense = [layer], [dense]
        values, self._scale, self._zero = _parts(layer)
        self._size = layer.scheme.group_size if isinstance(layer, QuantizedModule) else None
        residual = (
            dense_weight(dense).detach().float() / self._spread(self._scale).clamp_min(torch.finfo(torch.float32).tiny)
            - values
        )
        rounds = isinstance(layer, QuantizedModule) and not isinstance(layer.scheme.weight_type, FloatType)
        # Less than one half, so that rounding gives the codes of the layer.
        self.latent = nn.Parameter(values + residual.clamp(-0.49, 0.49) if rounds else values)
        # The weights of a group with scale 0 stay 0.
        usable = (self._spread(self._scale) > 0).expand_as(values)
        keep = values != 0 if _is_sparse(layer) else None if bool(usable.all()) else usable
        self._keep = None if keep is None else keep.float()  # multiplying by floats is faster than by booleans
        self.gain = nn.Parameter(torch.zeros_like(self._scale))
        bias = bias_of(layer)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self._range = _code_range(layer) if isinstance(layer, QuantizedModule) and rounds else None
        if self._keep is not None:
            self.latent.data.mul_(self._keep)

    def rates(self, rate: float) -> list[dict[str, object]]:
        """Parameter groups for Adam, whose steps have the size of the learning rate: ``rate`` times each tensor's size."""
        groups: list[dict[str, object]] = [
            {"params": [self.latent], "lr": rate * self.latent.detach().square().mean().sqrt().item()},
            {"params": [self.gain], "lr": rate},
        ]
        if self.bias is not None:
            size = self.bias.detach().square().mean().sqrt().item()
            groups.append({"params": [self.bias], "lr": rate * (size or 1.0)})
        return groups

    def codes(self) -> Tensor:
        """The rounded weight less its zero point, in units of the scale, float (N, K)."""
        values = self.latent
        if self._range is not None:
            low, high = (bound - self._zero for bound in self._range)
            return self._kept(round_through(torch.minimum(torch.maximum(values, low), high)))
        return self._kept(values)

    def _kept(self, values: Tensor) -> Tensor:
        return values if self._keep is None else values * self._keep

    def scale(self) -> Tensor:
        """Scales (N, groups), float32, rounded to the dtype in which they are stored."""
        return store_through(self._scale * (1 + self.gain).clamp_min(_LEAST_GAIN), self._stored)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with float activations."""
        weight = self.codes() * self._spread(self.scale())
        dense = self._dense[0]
        kind = kind_of(dense)
        if kind.takes_rows:
            return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        dtype = dense_weight(dense).dtype
        values = {kind.weight.key: kind.weight.from_matrix(weight.to(dtype), kind.parameter_of(dense).shape)}
        if self.bias is not None and kind.weight.bias is not None:
            values[kind.weight.bias] = self.bias.to(dtype)
        return cast(Tensor, functional_call(dense, values, (x,)))

    @property
    def takes_rows(self) -> bool:
        """Whether the layer maps rows (..., K) to (..., N)."""
        return kind_of(self._dense[0]).takes_rows

    @torch.no_grad()
    def make(self) -> nn.Module:
        """A new layer with the trained values, in eval mode; its bias is a new Parameter."""
        layer = self._layer[0]
        codes, scale = self.codes(), self.scale()
        bias = bias_of(layer)
        if bias is not None and self.bias is not None:
            bias = nn.Parameter(self.bias.detach().to(bias.dtype), requires_grad=bias.requires_grad)
        if not isinstance(layer, QuantizedModule):
            weight = (codes * self._spread(scale)).to(dense_weight(layer).dtype)
            return kind_of(layer).dense_like(layer, weight, bias).eval()
        whole = codes + self._zero
        if self._range is not None:
            whole = whole.round()
        packed = layer.scheme.weight_type.pack(whole)
        quantized = QuantizedWeight(packed, scale.to(self._stored), layer.quantized().zero_point)
        scheme, dtype = layer.scheme, layer.dtype
        new = type(layer).from_quantized(quantized, layer.in_features, bias, scheme, dtype, layer.act())
        return new.adopt(layer).eval()

    @property
    def _stored(self) -> torch.dtype:
        layer = self._layer[0]
        return (
            layer.form.scale or layer.scheme.weight_type.scale if isinstance(layer, QuantizedModule) else torch.float32
        )

    def _spread(self, per_group: Tensor) -> Tensor:
        """Expand values per group, (N, groups), to values per weight, (N, K)."""
        if self._size is None:
            return per_group
        n, k = dense_weight(self._layer[0]).shape
        return per_group[..., None].expand(-1, -1, self._size).reshape(n, -1)[:, :k]


def _is_sparse(layer: nn.Module) -> bool:
    return not isinstance(layer, QuantizedModule) or layer.is_sparse


def _code_range(layer: QuantizedModule) -> tuple[int, int]:
    return layer.scheme.weight_type.lowest, layer.scheme.weight_type.highest


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less their zero points (N, K), scales (N, groups), zero points broadcastable to (N, K); all float32."""
    if not isinstance(layer, QuantizedModule):
        weight = dense_weight(layer).detach().float()
        return weight.clone(), torch.ones(len(weight), 1), torch.zeros(1)
    quantized, k, kind = layer.quantized(), layer.in_features, layer.scheme.weight_type
    zero = torch.full((1,), float(kind.middle))
    if not layer.scheme.symmetric:
        zero = Ranges.of(quantized, layer.scheme).spread_zeros(layer.scheme.group_size or k, k)
    return kind.unpack(quantized.qweight, k).float() - zero, quantized.scale.float(), zero
