"""torch.nn.Conv1d, Conv2d and ConvTranspose1d with an integer weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.nn import functional

from ..conv import Geometry, conv
from ..weights.scheme import Scheme
from .linear import _autocast
from .module import QuantizedModule

if TYPE_CHECKING:
    from typing_extensions import Self

_Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d


def patch_matrix(weight: Tensor) -> Tensor:
    """The weight (N, C / groups, ...) of a convolution as a matrix (N, K): K = kernel positions, each with channels."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def patch_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of patch_matrix."""
    n, channels, *kernel_size = shape
    return matrix.reshape(n, *kernel_size, channels).movedim(-1, 1).contiguous()


def transposed_matrix(weight: Tensor) -> Tensor:
    """The weight (C, O, L) of a transposed convolution without groups as a matrix (O L, C)."""
    return weight.movedim(0, -1).reshape(-1, weight.shape[0])


def transposed_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of transposed_matrix."""
    return matrix.reshape(*shape[1:], shape[0]).movedim(-1, 0).contiguous()


def patch_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The patches (T, K) of x that the matrix of a dense or quantized convolution without groups multiplies."""
    layer = cast("nn.Conv1d | nn.Conv2d | ConvModule", module)
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    size, dilation, stride = (
        (1,) * (2 - dims) + tuple(one) for one in (layer.kernel_size, layer.dilation, layer.stride)
    )
    patches = functional.unfold(x if dims == 2 else x.unsqueeze(2), size, dilation, 0, stride)
    channels = patches.unflatten(1, (x.shape[1], -1))  # (B, C, positions of the kernel, positions of the output)
    rows: Tensor = channels.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return rows


def why_no_patch_rows(module: nn.Module) -> str | None:
    """Why a convolution has no patch_rows, or None."""
    groups = cast(nn.Conv2d, module).groups
    return None if groups == 1 else f"its {groups} groups multiply different rows"


def why_no_transposed_rows(module: nn.Module) -> str | None:
    """Why a transposed convolution has no rows."""
    return "its outputs are sums of products of several rows"


class ConvModule(QuantizedModule):
    """What the convolutions share: the settings of torch's, and one integer weight (N, K)."""

    settings: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
        *("transposed", "output_padding"),
    )
    takes_rows: ClassVar[bool] = False
    dense_class: ClassVar[type[_Conv]]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def on_meta(cls, out_features: int, in_features: int, scheme: str | Scheme, dtype: torch.dtype) -> Self:
        """As QuantizedModule.on_meta: with a kernel of one position, until it adopts other settings."""
        module = cls.__new__(cls)
        QuantizedModule.__init__(module, out_features, in_features, False, scheme, "meta", dtype)
        size = (1,) * (2 if issubclass(cls.dense_class, nn.Conv2d) else 1)
        dense: Any = cls.dense_class
        return module.adopt(dense(in_features, out_features, size, bias=False, device="meta"))

    def adopt(self, source: nn.Module) -> Self:
        """As QuantizedModule.adopt."""
        super().adopt(source)
        size = self.padding if isinstance(self.padding, tuple) else None
        before_after = cast(list[int], source._reversed_padding_repeated_twice)
        # Paddings that differ before and after, or that are no zeros, are added to x first.
        needs = self.padding_mode != "zeros" or before_after[::2] != before_after[1::2]
        self._reversed_padding_repeated_twice = list(before_after)
        self._padded_first = needs and not self.transposed
        padding = (0,) * len(self.kernel_size) if self._padded_first else size or tuple(before_after[-1::-2])
        self._geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation, self.groups)
        self._scheme_name = str(self.scheme)
        return self

    @classmethod
    def from_dense(
        cls, dense: _Conv, scheme: str | Scheme, method: str = "rtn", act_range: tuple[float, float] | None = None
    ) -> Self:
        """A layer with the rounded weight of a dense one, which does not change. Both share the bias Parameter.

        Args:
            dense: of the class that this replaces, with a finite weight.
            scheme: name or Scheme.
            method, act_range: as in ``from_weight``.

        Raises:
            TypeError: of another class.
            ValueError: as ``from_weight``, or the layer has something that this class lacks.
        """
        if not isinstance(dense, cls.dense_class):
            raise TypeError(f"dense: must be a torch.nn.{cls.dense_class.__name__}, got {type(dense).__name__}")
        reason = cls.why_not(dense)
        if reason is not None:
            raise ValueError(f"dense: {reason}")
        layer = cls.from_weight(cls.matrix_of(dense.weight), dense.bias, scheme, method, act_range=act_range)
        return layer.adopt(dense).train(dense.training)

    @staticmethod
    def matrix_of(weight: Tensor) -> Tensor:
        """The dense weight as a matrix (N, K)."""
        return patch_matrix(weight)

    @staticmethod
    def weight_of(matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of matrix_of."""
        return patch_weight(matrix, shape)

    @staticmethod
    def why_not(dense: nn.Module) -> str | None:
        """Why this class cannot replace a dense layer, or None."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) or (C, ...), float32, bfloat16 or float16 -> y as of the dense layer, in the same dtype.

        Under autocast, in autocast's dtype. See ``nybble.conv.conv`` for gradients and errors.
        """
        if _is_any_autocast_enabled():
            x = _autocast(x)
        dims = len(self.kernel_size)
        if x.dim() == dims + 1:
            return self._batched(x.unsqueeze(0)).squeeze(0)
        return self._batched(x)

    def _batched(self, x: Tensor) -> Tensor:
        if self._padded_first:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        return self._product(x, self._parameters["bias"], self._geometry)

    def _product(self, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        packed, layout = self._buffers["packed"], self.layout
        if packed is None or layout is None:
            if x.device.type == self.device.type == "meta":
                return x.new_empty((x.shape[0], self.out_features, *geometry.out_size(tuple(x.shape[2:]))))
            packed, layout = self._pack()
        if x.dim() == len(geometry.kernel_size) + 2 and x.shape[1] != self.in_channels:
            raise ValueError(f"x: {x.shape[1]} channels, must be in_channels={self.in_channels}")
        return conv(x, packed, bias, self._scheme_name, layout, self.out_features, geometry)

    def example(self, m: int) -> Tensor:
        """As QuantizedModule.example: an image, or a sequence, with about m positions of the output."""
        dims = len(self.kernel_size)
        side = max(round(m ** (1 / dims)), 1)
        parts = zip(self.kernel_size, self.stride, self.dilation, self._geometry.padding, strict=True)
        size = [max((side - 1) * s + d * (k - 1) + 1 - 2 * p, 1) for k, s, d, p in parts]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, self.in_channels, *size, generator=generator).to(self.dtype)

    def dequantize(self) -> nn.Module:
        """A dense layer with the rounded weight and a copy of the bias."""
        bias = self.bias
        options = {name: getattr(self, name) for name in self.settings if name not in ("transposed", "output_padding")}
        if self.transposed:
            options["output_padding"] = self.output_padding
        dense = self.dense_class(**options, bias=bias is not None, device="meta", dtype=self.dtype)
        matrix = self.dequantized_weight()
        dense.weight = nn.Parameter(self.weight_of(matrix, dense.weight.shape), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        kernel = "none (meta)" if self.device.type == "meta" else self.explain().kernel
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        ones = (1,) * len(self.kernel_size)
        usual = {"padding": (0,) * len(ones), "dilation": ones, "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join([*parts, f"bias={self.bias is not None}", f"scheme={self.scheme}", f"kernel={kernel}"])


class Conv1d(ConvModule):
    """A drop-in for torch.nn.Conv1d whose weight is integers, see ``ConvModule``."""

    dense_class: ClassVar[type[_Conv]] = nn.Conv1d


class Conv2d(ConvModule):
    """A drop-in for torch.nn.Conv2d whose weight is integers, see ``ConvModule``."""

    dense_class: ClassVar[type[_Conv]] = nn.Conv2d


class ConvTranspose1d(ConvModule):
    """A drop-in for torch.nn.ConvTranspose1d without groups: the product of each position, then sums where they overlap."""

    dense_class: ClassVar[type[_Conv]] = nn.ConvTranspose1d

    @staticmethod
    def matrix_of(weight: Tensor) -> Tensor:
        """As ConvModule.matrix_of."""
        return transposed_matrix(weight)

    @staticmethod
    def weight_of(matrix: Tensor, shape: torch.Size) -> Tensor:
        """As ConvModule.weight_of."""
        return transposed_weight(matrix, shape)

    @staticmethod
    def why_not(dense: nn.Module) -> str | None:
        """As ConvModule.why_not."""
        groups = cast(nn.ConvTranspose1d, dense).groups
        return None if groups == 1 else f"groups={groups}: nybble has transposed convolutions without groups only"

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ConvModule.forward; output_size as in nn.ConvTranspose1d."""
        if _is_any_autocast_enabled():
            x = _autocast(x)
        batched = x if x.dim() == 3 else x.unsqueeze(0)
        y = self._overlapped(batched, self._extra(x, output_size))
        return y if x.dim() == 3 else y.squeeze(0)

    def _extra(self, x: Tensor, output_size: list[int] | None) -> int:
        if output_size is None:
            return self.output_padding[0]
        extra = output_size[-1] - self._length(x.shape[-1])
        if not 0 <= extra < max(self.stride[0], self.dilation[0]):
            raise ValueError(
                f"output_size={output_size}: must be at most a stride longer than {self._length(x.shape[-1])}"
            )
        return extra

    def _length(self, length: int) -> int:
        padding = cast("tuple[int, ...]", self.padding)[0]
        return (length - 1) * self.stride[0] - 2 * padding + self.dilation[0] * (self.kernel_size[0] - 1) + 1

    def _overlapped(self, x: Tensor, extra: int) -> Tensor:
        bias, padding = self._parameters["bias"], cast("tuple[int, ...]", self.padding)[0]
        columns = self._product(x, None, Geometry((1,), (1,), (0,), (1,), 1))
        steps, taps = self.stride[0], self.kernel_size[0]
        whole = (x.shape[-1] - 1) * steps + self.dilation[0] * (taps - 1) + 1
        # Without padding, so that no position is refused; what padding cuts off is left out after.
        y = functional.fold(columns, (1, whole), (1, taps), (1, self.dilation[0]), 0, (1, steps)).squeeze(2)
        y = functional.pad(y, (-padding, extra - padding)) if padding or extra else y
        return y if bias is None else y + bias.to(y.dtype).unsqueeze(-1)
