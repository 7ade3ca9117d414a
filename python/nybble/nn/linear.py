"""nn.Linear with integer weights."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled

from .. import ops
from ..dispatch.explanation import Explanation
from ..dispatch.registry import Problem
from ..dispatch.selection import explain
from ..layouts.portable import from_portable, spec_of, to_portable
from ..weights.activations import ActScale, scale_of, split
from ..weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight
from ..weights.scheme import Scheme
from .weight import WeightView, portable_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

# Guards the exchange of portable tensors for the packed one, which any thread's first call may make.
_PACKING = threading.RLock()


def _renew_lock() -> None:
    """A forked child may inherit the lock held by a thread that it does not have."""
    global _PACKING
    _PACKING = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Linear(nn.Module):
    """y = x w^T + bias with w as integers: a drop-in for torch.nn.Linear.

    `state_dict` holds the portable layout (`qweight`, `scale`, `zero_point` if asymmetric, `act_scale` and
    `act_zero_point` if static, `bias`; see portable.py). In memory the weight lies packed for this machine, in the buffer `packed`; it is packed at
    the first call, and the portable tensors are then derived from it whenever someone asks. A new layer's weight is 0
    until it is loaded.

    Args:
        in_features, out_features: as in nn.Linear, at least 1.
        bias: whether there is one.
        scheme: name or Scheme, such as "w8a8" or "w4a16g128".
            Static activations have the scale 1 until they are loaded.
        device, dtype: of the bias; the output takes the dtype of the input (float32, bfloat16 or float16).

    Raises:
        ValueError: an unknown scheme, or a shape that it cannot hold.
    """

    _sparse = False
    _wants = "a sparse scheme is for nybble.nn.SparseLinear"

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype
    packed: Tensor | None
    layout: str | None
    bias: nn.Parameter | None
    qweight = portable_tensor("qweight")
    scale = portable_tensor("scale")
    zero_point = portable_tensor("zero_point")
    act_scale = portable_tensor("act_scale")
    act_zero_point = portable_tensor("act_zero_point")

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
        super().__init__()
        self.scheme = Scheme.parse(scheme)
        self._scheme_name = str(self.scheme)
        self.scheme.check_shape(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        if (self.scheme.sparsity is not None) is not self._sparse:
            raise ValueError(f"scheme={str(self.scheme)!r}: {self._wants}")
        spec = spec_of(self.scheme, out_features, in_features)
        new = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in spec.items()}
        if self.scheme.static:
            new["act_scale"] = torch.ones_like(new["act_scale"])
        self._hold(new)
        held = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", held)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear,
        scheme: str | Scheme,
        method: str = "rtn",
        act_range: tuple[float, float] | None = None,
    ) -> Self:
        """A layer with the rounded weight of a dense one, which is left as it is; the bias Parameter is shared.

        Args:
            dense: an nn.Linear with finite weights.
            scheme: name or Scheme.
            method: "rtn", "mse" or "hqq", see rounding.quantize_weight.
            act_range: of a static scheme, the lowest and the highest input that has a code of its own.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: an unknown scheme or method, a weight that cannot be rounded, or a static scheme without a range
                (or another with one).
        """
        if not isinstance(dense, nn.Linear):
            raise TypeError(f"dense: must be a torch.nn.Linear, got {type(dense).__name__}")
        layer = cls.from_weight(dense.weight, dense.bias, scheme, method, act_range=act_range)
        return layer.train(dense.training)

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
        """As from_dense, from a weight (N, K) and a bias (N,) or None; dtype is the weight's by default."""
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
        """A layer with the codes of a weight (N, in_features); the zeros of a sparse one have the code of 0.

        act: of a static scheme, how activations are rounded.
        """
        out_features = quantized.qweight.shape[0]
        layer = cls(in_features, out_features, bias=False, scheme=scheme, device="meta", dtype=dtype)
        layer._hold(to_portable(quantized, layer.scheme, in_features, act))
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        layer.pack()
        return layer

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
        bias = self._parameters["bias"]
        return ops.linear(x, packed, bias, self._scheme_name, layout, self.out_features, self.in_features)

    def quantized(self) -> QuantizedWeight:
        """The portable tensors: the layer's own, or derived from the packed weight."""
        with _PACKING:
            if self.packed is None:
                return from_portable(self._held(), self.scheme, self.out_features, self.in_features)
            packed, layout = self._pack()
            return ops.unpack(packed, layout, self.scheme, self.out_features, self.in_features)

    def act(self) -> ActScale | None:
        """How static activations are rounded; None of others."""
        if not self.scheme.static:
            return None
        with _PACKING:
            return ActScale.of_tensors(self._held()) if self.packed is None else split(self.packed, self.scheme)[0]

    def portable(self) -> dict[str, Tensor]:
        """The tensors of the state_dict without the bias, see portable.py."""
        with _PACKING:
            if self.packed is None:
                return self._held()
            return to_portable(self.quantized(), self.scheme, self.in_features, self.act())

    def _held(self) -> dict[str, Tensor]:
        names = spec_of(self.scheme, self.out_features, self.in_features)
        return {name: tensor.detach() for name in names if (tensor := self._parameters.get(name)) is not None}

    def pack(self) -> None:
        """Exchanges the portable tensors for the packed one. Nothing to do on the meta device, or twice."""
        if self.device.type != "meta":
            self._pack()

    def _pack(self) -> tuple[Tensor, str]:
        with _PACKING:
            if self.packed is None or self.layout is None:
                if self.device.type == "meta":
                    raise ValueError("layer: its weight is on the meta device; load it first")
                # A caller in inference mode must not leave a tensor that autograd can never use.
                with torch.inference_mode(False):
                    self._hold_packed(*ops.pack(self.quantized(), self.scheme, self.in_features, self.act()))
            assert self.packed is not None and self.layout is not None, "packed above"  # noqa: S101, PT018
            return self.packed, self.layout

    def unpack(self) -> None:
        """Exchanges the packed tensor for the portable ones, for code that edits or shards them."""
        with _PACKING:
            if self.packed is not None:
                self._hold(self.portable())

    def tie_to(self, other: Linear) -> None:
        """Shares the packed weight of another layer of the same scheme and shape, and how static activations are rounded.

        Raises:
            ValueError: scheme or shape differ, or the other is on the meta device.
        """
        mine, theirs = (f"{layer.scheme} of ({layer.out_features}, {layer.in_features})" for layer in (self, other))
        if mine != theirs:
            raise ValueError(f"other: is {theirs}, this layer {mine}")
        if other.device.type == "meta":
            raise ValueError("other: has no weight to share (meta device)")
        self._hold_packed(*other._pack())

    @property
    def weight_id(self) -> int:
        """Equal for layers that share their packed weight."""
        return id(self.packed) if self.packed is not None else id(self._parameters.get("scale"))

    @property
    def weight(self) -> WeightView:
        """Stands for the dense weight (N, K) in code that looks at it; any torch function dequantizes it first."""
        return WeightView(self)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        held = self.packed if self.packed is not None else self._parameters["scale"]
        assert held is not None, "one of the two forms is always there"  # noqa: S101
        return held.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and bias as they lie in memory now."""
        weight = self.packed.nbytes if self.packed is not None else sum(t.nbytes for t in self._held().values())
        return weight + (self.bias.nbytes if self.bias is not None else 0)

    def dequantized_weight(self) -> Tensor:
        """The weight (N, K) that the codes stand for, in the layer's dtype."""
        return dequantize_weight(self.quantized(), self.scheme, self.in_features).to(self.dtype)

    def dequantize(self) -> nn.Linear:
        """A dense nn.Linear with the rounded weight and a copy of the bias."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        dense.weight = nn.Parameter(self.dequantized_weight(), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def explain(self, m: int = 1, verbose: bool = False) -> Explanation:
        """Which kernel runs for m tokens, and why each other does not; ``verbose`` prints kernels of other schemes too."""
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        n, k, device = self.out_features, self.in_features, self.device.type
        return replace(explain(Problem(self.scheme, m, n, k, dtype, device, layout=self.layout)), verbose=verbose)

    def extra_repr(self) -> str:
        kernel = "none (meta)" if self.device.type == "meta" else self.explain().kernel
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, kernel={kernel}"
        )

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name in spec_of(self.scheme, self.out_features, self.in_features):
            self._parameters[name] = nn.Parameter(tensors[name], requires_grad=False)
        self.register_buffer("packed", None, persistent=False)
        self.layout = None

    def _hold_packed(self, packed: Tensor, layout: str) -> None:
        # In this order another thread's forward sees a packed weight together with its layout.
        self.layout = layout
        self.packed = packed
        for name in spec_of(self.scheme, self.out_features, self.in_features):
            self._parameters[name] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        # What fn does to devices and dtypes shows on an empty tensor. Codes and scales move, but keep their dtype.
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if fn(torch.empty(0, dtype=torch.uint8, device=self.device)).dtype != torch.uint8:
            raise TypeError("dtype: Module.type() would turn the codes into numbers; use .to(dtype)")
        if moved.device != self.device:
            self.unpack()
        scales: dict[str, nn.Parameter | None] = {
            name: self._parameters[name] for name in ("scale", "act_scale") if name in self._parameters
        }
        self._parameters.update(dict.fromkeys(scales))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(scales)
        for name, scale in scales.items():
            if scale is not None:
                bits = torch.int16 if scale.dtype.itemsize == 2 else torch.int32
                moved_scale = fn(scale.data.view(bits)).view(scale.dtype)
                self._parameters[name] = nn.Parameter(moved_scale, requires_grad=False)
        self.dtype = moved.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with _PACKING:
            if self.packed is not None:
                destination.update({prefix + name: tensor for name, tensor in self.portable().items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        names = spec_of(self.scheme, self.out_features, self.in_features)
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if found:
            try:
                if found.keys() != names.keys():
                    raise ValueError(f"has {sorted(found)} without {sorted(names.keys() - found.keys())}")
                if not any(tensor.is_meta for tensor in found.values()):
                    from_portable(found, self.scheme, self.out_features, self.in_features)
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
        before, layout = self.packed, self.layout
        self.unpack()
        for name, tensor in found.items():  # what a sparse weight keeps has its own size
            held = self._parameters[name]
            if held is not None and held.shape != tensor.shape:
                resized = torch.empty(tensor.shape, dtype=held.dtype, device=held.device)
                self._parameters[name] = nn.Parameter(resized, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()
        if before is not None and layout is not None and layout == self.layout and self.packed is not None:
            # In place, as for any parameter: layers that share the weight, and processes, see the new one.
            with torch.no_grad():
                if before.shape == self.packed.shape:
                    before.copy_(self.packed)
                else:  # memory that processes share cannot grow
                    before.set_(self.packed)  # type: ignore[call-overload]
                self._hold_packed(before, layout)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed is not None:
            portable = {name: nn.Parameter(t, requires_grad=False) for name, t in self.portable().items()}
            state["_parameters"] = {**self._parameters, **portable}
            state["_buffers"] = {**self._buffers, "packed": None}
            state["layout"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Linear:
        # Not through __getstate__: layers that share a packed weight still do in the copy.
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _restore(cls: type[Linear], state: dict[str, Any]) -> Linear:
    layer = cls.__new__(cls)
    layer.__setstate__(state)  # type: ignore[no-untyped-call]
    return layer


def send(layer: Linear) -> tuple[Any, ...]:
    """For worker processes of this machine: the packed weight itself, through shared memory."""
    layer.pack()
    return _restore, (type(layer), layer.__dict__.copy())


ForkingPickler.register(Linear, send)
