"""The base class of nybble's modules: what the passes, the report and checkpoints need to know of each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..compiled.rounding import quantize_weight
from ..dispatch.explanation import Explanation
from ..dispatch.selection import explain
from ..dispatch.spec import Problem
from ..weights.activations import ActScale, scale_of
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .state import StatefulModule

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedModule(StatefulModule):
    """A module that replaces a dense one: an integer weight (N, K), and a bias (N,) or None.

    A subclass adds its own arguments, ``forward``, ``on_meta`` and ``dequantize``.

    Attributes:
        settings: names of the attributes that it takes over from the dense module, besides weight and bias, such as
            the stride of a convolution.
        takes_rows: whether it maps rows (..., K) to (..., N), as a Linear layer does.
        multiplies: whether it multiplies with its weight; a table of embeddings only reads rows of it.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    takes_rows: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True

    @classmethod
    def on_meta(cls, out_features: int, in_features: int, scheme: str | Scheme, dtype: torch.dtype) -> Self:
        """A module without a bias whose weight (N, K) is on the meta device."""
        raise NotImplementedError

    def dequantize(self) -> nn.Module:
        """A dense module with the rounded weight and a copy of the bias."""
        raise NotImplementedError

    def adopt(self, source: nn.Module) -> Self:
        """Take over the settings of the dense module that it replaces, or of a module of its own class; returns self."""
        for name in self.settings:
            setattr(self, name, getattr(source, name))
        return self

    def example(self, m: int) -> Tensor:
        """An input of about m rows, for measuring speed. The random state of the process does not change."""
        return torch.randn(m, self.in_features, generator=torch.Generator().manual_seed(0)).to(self.dtype)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scheme: str | Scheme,
        method: str = "rtn",
        dtype: torch.dtype | None = None,
        act_range: tuple[float, float] | None = None,
    ) -> Self:
        """A module with the rounded values of a dense weight.

        Args:
            weight: (N, K), finite.
            bias: (N,) or None. A Parameter is shared, not copied.
            scheme: name or Scheme.
            method: how weights are rounded: "rtn", "mse" or "hqq", see ``weights.rounding.quantize_weight``.
            dtype: of the module; None is that of the weight.
            act_range: for a static scheme, the lowest and the highest input that is not clipped.

        Raises:
            ValueError: an unknown scheme or method, a weight that cannot be rounded, a static scheme without act_range,
                or another scheme with it.
        """
        parsed = Scheme.parse(scheme)
        act = scale_of(parsed, act_range)
        quantized = quantize_weight(weight, parsed, method)
        return cls.from_quantized(quantized, weight.shape[1], bias, parsed, dtype or weight.dtype, act)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        in_features: int,
        bias: Tensor | None,
        scheme: str | Scheme,
        dtype: torch.dtype,
        act: ActScale | None = None,
    ) -> Self:
        """A module with an integer weight (N, in_features).

        act: for a static scheme, scale and zero point of the activations. A sparse weight has the value 0 where
        nothing is stored.
        """
        module = cls.on_meta(quantized.qweight.shape[0], in_features, scheme, dtype)
        module.hold(quantized, act)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return module

    def explain(self, m: int = 1, verbose: bool = False) -> Explanation:
        """Which kernel runs for m rows of activations, and why each other does not.

        ``verbose`` prints the kernels of all schemes. Raises ValueError if m is below 1.
        """
        if m < 1:
            raise ValueError(f"m={m!r}: must be at least 1")
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        n, k, device = self.out_features, self.in_features, self.device.type
        return replace(explain(Problem(self.scheme, m, n, k, dtype, device, layout=self.layout)), verbose=verbose)
