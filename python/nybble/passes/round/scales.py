"""Per-channel scales s that layer inputs are divided by and weights multiplied by: AWQ and SmoothQuant.

AWQ (Lin et al., arXiv:2306.00978) protects the weights of large inputs: s = a^alpha, for mean input magnitudes a.
SmoothQuant (Xiao et al., arXiv:2211.10438) moves outliers from activations to weights, so that one scale per token is
enough: s = max|X|^alpha / max|W|^(1 - alpha). Both search alpha in a grid by the output error of the layers that share
the inputs. A scale is used only if it also beats no scale on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...compiled.rounding import quantize_weight
from ...model.eligible import dense_weight
from ...model.inputs import Inputs
from ...nn import Linear
from ...parallel.ranks import Ranks
from ...weights.rounding import dequantize_weight
from ...weights.scheme import Scheme
from ..layerwise.errors import weight_loss
from ..layerwise.shared import shared_numbers
from ..plan import Layer

AWQ_ALPHAS = tuple(k / 20 for k in range(1, 20))
SMOOTH_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
# Lower bound of the statistics relative to their maximum, so that an input that was always 0 does not get a scale of 0.
_FLOOR = 1e-4


class Consumer(NamedTuple):
    """A layer's weight (N, K), float32, and the statistics of its inputs."""

    weight: Tensor
    inputs: Inputs


@dataclass(frozen=True)
class Awq:
    """AWQ's scales; the loss is that of rounding the weights to nearest, by the Hessian or on held-out data."""

    alphas: tuple[float, ...] = AWQ_ALPHAS

    def scale(self, consumers: Sequence[Consumer], alpha: float) -> Tensor:
        """The scale s (K,) of layers that share their inputs."""
        return _floored(consumers[0].inputs.mean_magnitudes) ** alpha

    def loss(self, consumer: Consumer, scale: Tensor, scheme: Scheme, held: bool) -> float:
        """The output error of a layer with scaled inputs, on held-out data or on the data of the search."""
        weight, inputs = consumer
        new = dequantize_weight(quantize_weight(weight * scale, scheme), scheme, weight.shape[1]) / scale
        if held:
            return weight_loss(weight, new, inputs.held_out)
        assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
        return float((((new - weight) @ inputs.hessian) * (new - weight)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant's scales; the loss is that of the real layer, with rounded inputs.

    Static activations take their range from the rows that are not held out.
    """

    alphas: tuple[float, ...] = SMOOTH_ALPHAS

    def scale(self, consumers: Sequence[Consumer], alpha: float) -> Tensor:
        """The scale s (K,) of layers that share their inputs."""
        weights = torch.stack([consumer.weight.abs().amax(0) for consumer in consumers]).amax(0)
        return _floored(consumers[0].inputs.largest) ** alpha / _floored(weights) ** (1 - alpha)

    def loss(self, consumer: Consumer, scale: Tensor, scheme: Scheme, held: bool) -> float:
        """The output error of a layer with scaled inputs, on held-out data or on the data of the search."""
        weight, inputs = consumer
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
    ranks: Ranks | None = None,
) -> Tensor | None:
    """The best scale (K,), float32, of inputs that ``layers`` share; None if no scale is better than 1.

    tie: see ``Fold.tie``. ranks: those that have the same layers and inputs and share the search, or None.
    """
    consumers = [
        Consumer(dense_weight(one.site.module).detach().float(), inputs[id(one.site.module)]) for one in layers
    ]
    if not all(consumer.inputs.is_usable for consumer in consumers):
        return None
    plain = torch.ones(consumers[0].weight.shape[1])

    def total(scale: Tensor, held: bool) -> float:
        return sum(scaling.loss(consumer, scale, scheme, held) for consumer in consumers)

    scales = [plain, *(tie(_centred(scaling.scale(consumers, tried))) for tried in scaling.alphas)]
    losses = shared_numbers(ranks, [partial(total, scale, False) for scale in scales])
    best = scales[losses.index(min(losses))]
    if best is plain:
        return None
    ours, theirs = shared_numbers(ranks, [partial(total, scale, True) for scale in (best, plain)])
    return best if ours < theirs else None


def _floored(values: Tensor) -> Tensor:
    """Values (K,), raised to at least _FLOOR times their maximum; all 1 if the maximum is 0."""
    largest = values.max()
    return values.clamp_min(_FLOOR * largest) if largest > 0 else torch.ones_like(values)


def _centred(scale: Tensor) -> Tensor:
    """The scale divided by the geometric mean of its extremes, so that overall magnitudes do not change."""
    scale = scale.double()
    return (scale / (scale.max() * scale.min()).sqrt()).float()
