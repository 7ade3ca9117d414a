"""A layer whose codes, scales and bias can be learned, standing where the layer stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...model.eligible import bias_of, dense_weight
from ...nn.kinds import kind_of
from ...nn.module import QuantizedModule
from ...weights.rounding import QuantizedWeight, Ranges
from ...weights.weight_type import FloatType

_LEAST_GAIN = 0.05


def round_through(x: Tensor) -> Tensor:
    """x to the nearest integer; the gradient is that of x."""
    return x + (x.round() - x).detach()


def store_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x as a dtype stores it; the gradient is that of x."""
    return x + (x.to(dtype).float() - x).detach()


class Shadow(nn.Module):
    """Learns a layer: ``make`` gives what stands for it by now, which at first is the layer, code by code.

    latent (N, K): weights before they are rounded, relative to their zero point, in units of a code (for a pruned float
    layer, of its weights). A weight that is not stored stays 0. gain (N, groups): the scales are those of the layer
    times 1 + gain.

    Args:
        layer: a quantized layer, or a dense one with zeros.
        dense: the weight (N, K) that the layer was made of; what its rounding left over is where learning starts.
    """

    def __init__(self, layer: nn.Module, dense: Tensor) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, not to be a module of this one
        values, self._scale, self._zero = _parts(layer)
        self._size = layer.scheme.group_size if isinstance(layer, QuantizedModule) else None
        left_over = (
            dense.detach().float() / self._spread(self._scale).clamp_min(torch.finfo(torch.float32).tiny) - values
        )
        rounds = isinstance(layer, QuantizedModule) and not isinstance(layer.scheme.weight_type, FloatType)
        # Short of the half, so that the codes are those of the layer.
        self.latent = nn.Parameter(values + left_over.clamp(-0.49, 0.49) if rounds else values)
        # A group whose scale is 0 has no codes either.
        usable = (self._spread(self._scale) > 0).expand_as(values)
        keep = values != 0 if _is_sparse(layer) else None if bool(usable.all()) else usable
        self._keep = None if keep is None else keep.float()  # a product of floats is faster than one with booleans
        self.gain = nn.Parameter(torch.zeros_like(self._scale))
        bias = bias_of(layer)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self._range = _code_range(layer) if isinstance(layer, QuantizedModule) and rounds else None
        if self._keep is not None:
            self.latent.data.mul_(self._keep)

    def rates(self, rate: float) -> list[dict[str, object]]:
        """Groups for an optimizer whose steps are as large as its rate: relative to what they change."""
        groups: list[dict[str, object]] = [
            {"params": [self.latent], "lr": rate * self.latent.detach().square().mean().sqrt().item()},
            {"params": [self.gain], "lr": rate},
        ]
        if self.bias is not None:
            size = self.bias.detach().square().mean().sqrt().item()
            groups.append({"params": [self.bias], "lr": rate * (size or 1.0)})
        return groups

    def codes(self) -> Tensor:
        """Codes less their zero point (N, K), as floats."""
        values = self.latent
        if self._range is not None:
            low, high = (bound - self._zero for bound in self._range)
            return self._kept(round_through(torch.minimum(torch.maximum(values, low), high)))
        return self._kept(values)

    def _kept(self, values: Tensor) -> Tensor:
        return values if self._keep is None else values * self._keep

    def scale(self) -> Tensor:
        """Scales (N, groups) in float32, as they will be stored."""
        return store_through(self._scale * (1 + self.gain).clamp_min(_LEAST_GAIN), self._stored)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, with activations in float."""
        weight = self.codes() * self._spread(self.scale())
        return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def make(self) -> nn.Module:
        """The layer with what was learned: a new one in eval mode, its bias a new Parameter."""
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
        return type(layer).from_quantized(quantized, layer.in_features, bias, scheme, dtype, layer.act()).eval()

    @property
    def _stored(self) -> torch.dtype:
        layer = self._layer[0]
        return layer.scheme.weight_type.scale if isinstance(layer, QuantizedModule) else torch.float32

    def _spread(self, per_group: Tensor) -> Tensor:
        """(N, groups) as it multiplies (N, K)."""
        if self._size is None:
            return per_group
        n, k = dense_weight(self._layer[0]).shape
        return per_group[..., None].expand(-1, -1, self._size).reshape(n, -1)[:, :k]


def _is_sparse(layer: nn.Module) -> bool:
    return not isinstance(layer, QuantizedModule) or layer.is_sparse


def _code_range(layer: QuantizedModule) -> tuple[int, int]:
    return layer.scheme.weight_type.lowest, layer.scheme.weight_type.highest


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less their zero points (N, K), scales (N, groups), zero points that broadcast to (N, K); float32."""
    if not isinstance(layer, QuantizedModule):
        weight = dense_weight(layer).detach().float()
        return weight.clone(), torch.ones(len(weight), 1), torch.zeros(1)
    quantized, k, kind = layer.quantized(), layer.in_features, layer.scheme.weight_type
    zero = torch.full((1,), float(kind.middle))
    if quantized.zero_point is not None:
        zero = Ranges.of(quantized, layer.scheme).spread_zeros(layer.scheme.group_size or k, k)
    return kind.unpack(quantized.qweight, k).float() - zero, quantized.scale.float(), zero
