"""A layer's tensors: the portable ones by name, and what `layer.weight` is for code that was written for nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..weights.scheme import Scheme


class PortableWeight(Protocol):
    """A layer that holds its weight either as portable tensors or packed."""

    packed: Tensor | None
    _parameters: dict[str, nn.Parameter | None]

    def portable(self) -> dict[str, Tensor]:
        """The portable tensors by name."""


class DenseWeight(Protocol):
    """A layer that can compute its dense weight (N, K)."""

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""

    def dequantized_weight(self) -> Tensor:
        """The dense weight (N, K) in the layer's dtype."""


def portable_tensor(name: str) -> property:
    """A property that reads one portable tensor: the Parameter while unpacked, else derived from the packed weight."""

    def read(layer: PortableWeight) -> Tensor | None:
        if layer.packed is None:
            return layer._parameters.get(name)
        return layer.portable().get(name)

    return property(read)


class WeightView:
    """Shape, dtype and device of a layer's dense weight; any torch function gets the dequantized weight.

    Not a tensor: torch's fused paths (nn.TransformerEncoderLayer's, for one) would otherwise take the weight and pass
    by the layer.
    """

    requires_grad = False

    def __init__(self, layer: DenseWeight) -> None:
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._layer.out_features, self._layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self._layer.dtype

    @property
    def device(self) -> torch.device:
        return self._layer.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dequantize(self) -> Tensor:
        """The dense weight (N, K)."""
        return self._layer.dequantized_weight()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"WeightView(shape={tuple(self.shape)}, dtype={self.dtype}, scheme={self._layer.scheme})"
