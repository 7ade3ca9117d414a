"""torch.nn.Linear with an integer weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled

from .. import ops
from ..weights.scheme import Scheme
from .module import QuantizedModule

if TYPE_CHECKING:
    from typing_extensions import Self


class Linear(QuantizedModule):
    """y = x w^T + bias with w as integers: a drop-in for torch.nn.Linear.

    ``state_dict`` holds the portable layout: ``qweight``, ``scale``, ``zero_point`` if asymmetric, ``order`` if the
    scheme is ordered, ``book`` if codes index a table, ``act_scale`` and ``act_zero_point`` if static, and ``bias``; see ``layouts.portable``. In memory the weight is packed for this
    machine at the first call. The weight of a new layer is 0 until it is loaded.

    Args:
        in_features, out_features: as in nn.Linear, at least 1.
        bias: whether the layer has a bias.
        scheme: name or Scheme, such as "w8a8" or "w4a16g128".
            Static activations have the scale 1 until it is loaded.
        device: of the weight and the bias.
        dtype: of the bias. The output has the dtype of the input: float32, bfloat16 or float16.

    Raises:
        ValueError: an unknown scheme, or a shape that the scheme cannot hold.
    """

    takes_order = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str | Scheme = "w8a8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bias, scheme, device, dtype)
        self._scheme_name = str(self.scheme)

    @classmethod
    def on_meta(cls, out_features: int, in_features: int, scheme: str | Scheme, dtype: torch.dtype) -> Self:
        """As QuantizedModule.on_meta."""
        return cls(in_features, out_features, bias=False, scheme=scheme, device="meta", dtype=dtype)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear,
        scheme: str | Scheme,
        method: str = "rtn",
        act_range: tuple[float, float] | None = None,
    ) -> Self:
        """A layer with the rounded weight of a dense one, which does not change. Both share the bias Parameter.

        Args:
            dense: an nn.Linear with finite weights.
            scheme: name or Scheme.
            method, act_range: as in ``from_weight``.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: as ``from_weight``.
        """
        if not isinstance(dense, nn.Linear):
            raise TypeError(f"dense: must be a torch.nn.Linear, got {type(dense).__name__}")
        layer = cls.from_weight(dense.weight, dense.bias, scheme, method, act_range=act_range)
        return layer.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features), float32, bfloat16 or float16 -> (..., out_features) in the same dtype.

        Under autocast, in autocast's dtype. See ops.linear for gradients and errors.
        """
        if _is_any_autocast_enabled():
            x = _autocast(x)
        # Straight from the dictionaries: nn.Module's attribute lookup costs as much as a small layer.
        packed, layout = self._buffers["packed"], self.layout
        if packed is None or layout is None:
            if x.device.type == self.device.type == "meta":
                return x.new_empty((*x.shape[:-1], self.out_features))
            packed, layout = self._pack()
        bias = self._parameters["bias"] if self.adds_bias else None
        return ops.linear(x, packed, bias, self._scheme_name, layout, self.out_features, self.in_features)

    def part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """The outputs [begin, end) of forward(x); see ops.linear_part for what is computed."""
        if _is_any_autocast_enabled():
            x = _autocast(x)
        packed, layout = self._buffers["packed"], self.layout
        if packed is None or layout is None:
            if x.device.type == self.device.type == "meta":
                return x.new_empty((*x.shape[:-1], end - begin))
            packed, layout = self._pack()
        size = self.out_features, self.in_features
        return ops.linear_part(x, packed, self.bias, self._scheme_name, layout, *size, begin, end)

    def dequantize(self) -> nn.Linear:
        """A dense nn.Linear with the rounded weight and a copy of the bias."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        dense.weight = nn.Parameter(self.dequantized_weight(), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        kernel = "none (meta)" if self.device.type == "meta" else self.explain().kernel
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, kernel={kernel}"
        )


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
