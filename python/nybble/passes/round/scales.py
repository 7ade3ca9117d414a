"""Scales that the inputs of layers are divided by and their weights multiplied: AWQ's and SmoothQuant's.

AWQ (Lin et al., arXiv:2306.00978) protects the weights of large inputs: s = a^alpha for mean magnitudes a. SmoothQuant
(Xiao et al., arXiv:2211.10438) moves large inputs into the weights, so that one scale a token serves: s = max|X|^alpha /
max|W|^(1 - alpha). Both look for alpha in a grid, by the loss at the outputs of the layers that share the inputs; no
scale at all is in it, and has to be beaten on inputs held out too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...model.eligible import dense_weight
from ...model.inputs import Inputs
from ...nn import Linear
from ...weights.rounding import dequantize_weight, quantize_weight
from ...weights.scheme import Scheme
from ..layerwise.judge import weight_loss
from ..plan import Layer

AWQ_ALPHAS = tuple(k / 20 for k in range(1, 20))
SMOOTH_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
# The least scale, as a share of the largest: an input that was never seen does not take all from its weights.
_FLOOR = 1e-4


class Taker(NamedTuple):
    """A layer's weight (N, K), float32, and its inputs."""

    weight: Tensor
    inputs: Inputs


@dataclass(frozen=True)
class Awq:
    """Losses are those of rounding the weights to nearest: by the Hessian, or on inputs held out."""

    alphas: tuple[float, ...] = AWQ_ALPHAS

    def scale(self, takers: Sequence[Taker], alpha: float) -> Tensor:
        """s (K,) of layers with the same inputs."""
        return _floored(takers[0].inputs.mean_magnitudes) ** alpha

    def loss(self, taker: Taker, scale: Tensor, scheme: Scheme, held: bool) -> float:
        """What a layer with scaled inputs loses."""
        weight, inputs = taker
        new = dequantize_weight(quantize_weight(weight * scale, scheme), scheme, weight.shape[1]) / scale
        if held:
            return weight_loss(weight, new, inputs.held_out)
        assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
        return float((((new - weight) @ inputs.hessian) * (new - weight)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Smooth:
    """Losses are those of the layer as it will run, its inputs rounded too, on rows that are held out or not.
    Static activations have the range of the rows that are not.
    """

    alphas: tuple[float, ...] = SMOOTH_ALPHAS

    def scale(self, takers: Sequence[Taker], alpha: float) -> Tensor:
        """s (K,) of layers with the same inputs."""
        weights = torch.stack([taker.weight.abs().amax(0) for taker in takers]).amax(0)
        return _floored(takers[0].inputs.largest) ** alpha / _floored(weights) ** (1 - alpha)

    def loss(self, taker: Taker, scale: Tensor, scheme: Scheme, held: bool) -> float:
        """What a layer with scaled inputs loses."""
        weight, inputs = taker
        x = inputs.held_out if held else inputs.sample
        ends = torch.aminmax(inputs.sample / scale) if scheme.static else None
        act_range = None if ends is None else (ends.min.item(), ends.max.item())
        layer = Linear.from_weight(weight * scale, None, scheme, act_range=act_range)
        return float((layer(x / scale) - x @ weight.T).double().square().sum())


def choose(
    scaling: Awq | Smooth,
    layers: Sequence[Layer],
    inputs: Mapping[int, Inputs],
    scheme: Scheme,
    tie: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The scale (K,), float32, of inputs that layers share, tied as their maker needs it; None where 1 is best."""
    takers = [Taker(dense_weight(one.site.module).detach().float(), inputs[id(one.site.module)]) for one in layers]
    if not all(taker.inputs.is_usable for taker in takers):
        return None
    plain = torch.ones(takers[0].weight.shape[1])

    def total(scale: Tensor, held: bool) -> float:
        return sum(scaling.loss(taker, scale, scheme, held) for taker in takers)

    best, found = total(plain, False), plain
    for tried in scaling.alphas:
        scale = tie(_centred(scaling.scale(takers, tried)))
        if (loss := total(scale, False)) < best:
            best, found = loss, scale
    return found if found is not plain and total(found, True) < total(plain, True) else None


def _floored(values: Tensor) -> Tensor:
    """Values (K,), the smallest raised to a share of the largest; 1 where all are 0."""
    largest = values.max()
    return values.clamp_min(_FLOOR * largest) if largest > 0 else torch.ones_like(values)


def _centred(scale: Tensor) -> Tensor:
    """The scale around 1, so that neither weights nor inputs change their size."""
    scale = scale.double()
    return (scale / (scale.max() * scale.min()).sqrt()).float()
