"""How a quantized module shows its weight: the portable tensors by name, and ``module.weight`` as a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..weights.scheme import Scheme


class PortableWeight(Protocol):
    """A module that holds its weight either as portable tensors or packed."""

    packed: Tensor | None
    _parameters: dict[str, nn.Parameter | None]

    def portable(self) -> dict[str, Tensor]:
        """The portable tensors by name."""


class DenseWeight(Protocol):
    """A module that can compute its dense weight (N, K)."""

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""

    def dequantized_weight(self) -> Tensor:
        """The dense weight (N, K) in the module's dtype."""


def portable_tensor(name: str) -> property:
    """A property that reads a portable tensor: the Parameter, or, if the weight is packed, a tensor derived from it."""

    def read(module: PortableWeight) -> Tensor | None:
        if module.packed is None:
            return module._parameters.get(name)
        return module.portable().get(name)

    return property(read)


class WeightView:
    """Shape, dtype and device of a module's dense weight. Any torch function dequantizes it first.

    It is not a tensor. If it were, torch's fused paths, such as the one of nn.TransformerEncoderLayer, would use the
    weight directly and never call the module.
    """

    requires_grad = False

    def __init__(self, module: DenseWeight) -> None:
        self._module = module

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._module.out_features, self._module.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self._module.dtype

    @property
    def device(self) -> torch.device:
        return self._module.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dequantize(self) -> Tensor:
        """The dense weight (N, K)."""
        return self._module.dequantized_weight()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"WeightView(shape={tuple(self.shape)}, dtype={self.dtype}, scheme={self._module.scheme})"
