"""A module's integer weight in memory: as portable tensors, or packed for this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch.selection import layout_for
from ..layouts.portable import check_act, check_quantized, from_portable, portable_names, spec_of, to_portable
from ..weights.activations import ActScale, split
from ..weights.form import Form, split_layout
from ..weights.rounding import QuantizedWeight, book_of, dequantize_weight, natural_order
from ..weights.scheme import Scheme
from .weight import WeightView, portable_tensor

_AT_ONCE = 1 << 22  # weights that are dequantized at a time

# One lock for all modules: the first call of a module, from any thread, exchanges its portable tensors for the packed
# weight.
_lock = threading.RLock()


def settle_all(modules: Iterable[PackedModule]) -> None:
    """Make reading the packed weights of modules fast where they lie in memory. Changes nothing but speed."""
    with lock():
        ops.settle(module.packed for module in modules if module.reads_all and module.packed is not None)


def lock() -> threading.RLock:
    """The lock to hold while the two forms of a weight are read or exchanged."""
    return _lock


def _renew_lock() -> None:
    """A thread that held the lock at a fork does not exist in the child, so the child needs a new one."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Sharding(Protocol):
    """How a weight is cut over ranks, each of which holds a share; see parallel.shards."""

    def show(self, module: PackedModule, state: dict[str, Any], prefix: str) -> None:
        """Put what stands for the whole layer in the place of this rank's share in a state_dict."""

    def take(self, module: PackedModule, state: dict[str, Any], prefix: str) -> None:
        """The inverse: put this rank's share in the place of the whole layer."""


class PackedModule(nn.Module):
    """A module with one integer weight (N, K) and a bias (N,) or None.

    The weight is held in one of two forms, never in both. The portable form is one Parameter for each tensor of the
    portable layout, see ``layouts.portable``. The packed form is the buffer ``packed``, in the layout that the kernels
    of this machine read. ``pack`` and ``unpack`` go from one to the other. The portable tensors can be read in either
    form.

    The weight of a new module is 0. Static activations have the scale 1.

    Args:
        out_features, in_features: N and K, at least 1.
        bias: whether the module has a bias.
        scheme: of the weight and the activations.
        device: of the weight and the bias.
        dtype: of the bias; None is torch's default dtype.

    Raises:
        ValueError: the scheme cannot hold the shape, or is sparse where the class is dense (or the other way round).
    """

    # Whether the scheme must be sparse, and what the error says if it is not as it must be.
    is_sparse: ClassVar[bool] = False
    # Whether the columns of its weight may be in an order of their own.
    takes_order: ClassVar[bool] = False
    # Whether a call reads all of the weight, which then gains from huge pages.
    reads_all: ClassVar[bool] = True
    sparsity_rule: ClassVar[str] = "a sparse scheme is for nybble.nn.SparseLinear"
    # Of a weight that stays a set of parameters, and is packed for each call alone: the dtype of its scales; see
    # parallel.keep_portable.
    keeps_portable: torch.dtype | None = None
    # How the weight is cut over ranks, if it is, and whether forward adds the bias.
    sharding: Sharding | None = None
    adds_bias = True

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
    minimum = portable_tensor("minimum")
    order = portable_tensor("order")
    book = portable_tensor("book")
    levels = portable_tensor("levels")
    act_scale = portable_tensor("act_scale")
    act_zero_point = portable_tensor("act_zero_point")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        scheme: str | Scheme,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.scheme = Scheme.parse(scheme)
        self.scheme.check_shape(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        if (self.scheme.sparsity is not None) is not self.is_sparse:
            raise ValueError(f"scheme={str(self.scheme)!r}: {self.sparsity_rule}")
        if self.scheme.ordered and not self.takes_order:
            raise ValueError(f"scheme={str(self.scheme)!r}: ordered columns are for nybble.nn.Linear")
        spec = self._spec()
        new = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in spec.items()}
        if self.scheme.static:
            new["act_scale"] = torch.ones_like(new["act_scale"])
        if self.scheme.ordered:
            new["order"] = natural_order(in_features, device)
        if (book := book_of(self.scheme, device)) is not None:
            new["book"] = book
        self._hold_portable(new)
        held = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", held)

    def _spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return spec_of(self.scheme, self.out_features, self.in_features, form=self.form)

    @property
    def form(self) -> Form:
        """What the tensors of the weight are where the scheme leaves that open."""
        with lock():
            if self._buffers.get("packed") is not None and self.layout is not None:
                return split_layout(self.layout)[1]
            held = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
            return Form.of(held, self.scheme)

    def quantized(self) -> QuantizedWeight:
        """The integer weight with its scales and zero points, in the portable layout of a dense weight."""
        with lock():
            if self.packed is None:
                return from_portable(self._portable_parameters(), self.scheme, self.out_features, self.in_features)
            packed, layout = self._pack()
            return ops.unpack(packed, layout, self.scheme, self.out_features, self.in_features)

    def act(self) -> ActScale | None:
        """Scale and zero point of static activations; None if activations are dynamic or floats."""
        if not self.scheme.static:
            return None
        with lock():
            if self.packed is None:
                return ActScale.of_tensors(self._portable_parameters(), self.scheme.act_type)
            return split(self.packed, self.scheme)[0]

    def portable(self) -> dict[str, Tensor]:
        """The portable tensors by name: the module's state_dict without the bias."""
        with lock():
            if self.packed is None:
                return self._portable_parameters()
            return to_portable(self.quantized(), self.scheme, self.in_features, self.act())

    def _portable_parameters(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name in self._spec() if (tensor := self._parameters.get(name)) is not None}

    def hold(self, quantized: QuantizedWeight, act: ActScale | None, *, settle: bool = True) -> None:
        """Hold an integer weight, packed; on the meta device in the portable form.

        act: for a static scheme, scale and zero point of the activations.
        settle: False: the caller calls `settle_all` for its modules.

        Raises:
            ValueError: the codes are not a weight of this scheme and shape, or the scheme is static and act is None (or
                the other way round).
        """
        if quantized.qweight.is_meta:
            self._hold_portable(to_portable(quantized, self.scheme, self.in_features, act))
            return
        check_quantized(quantized, self.scheme, self.out_features, self.in_features)
        check_act(self.scheme, act)
        # Tensors made in the caller's inference mode could never be used by autograd.
        with torch.inference_mode(False):
            self._hold_packed(*self._packed_form(quantized, act))
        if settle:
            settle_all([self])

    def hold_unpacked(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold portable tensors themselves. They are checked when the weight is asked for."""
        self._hold_portable(dict(tensors))

    def pack(self) -> None:
        """Replace the portable tensors by the packed weight. Does nothing on the meta device, if it is packed, or if the layer
        keeps them."""
        if self.device.type != "meta" and self.keeps_portable is None:
            self._pack()

    def _pack(self) -> tuple[Tensor, str]:
        """Pack if necessary; returns the packed weight and its layout. A layer that keeps its portable tensors does not hold it."""
        with lock():
            if self.packed is None or self.layout is None:
                if self.device.type == "meta":
                    raise ValueError("layer: its weight is on the meta device; load it first")
                # Tensors made in the caller's inference mode could never be used by autograd.
                with torch.inference_mode(False):
                    packed, layout = self._packed_form(self.quantized(), self.act())
                if self.keeps_portable is not None:
                    self._check_kept(self.keeps_portable)
                    return packed, layout
                self._hold_packed(packed, layout)
                settle_all([self])
            assert self.packed is not None and self.layout is not None, "packed above"  # noqa: S101, PT018
            return self.packed, self.layout

    def _check_kept(self, dtype: torch.dtype) -> None:
        """Raise ValueError where something has converted the scales, as FSDP's MixedPrecisionPolicy does."""
        scale = self._parameters["scale"]
        if scale is not None and scale.dtype != dtype:
            raise ValueError(
                f"scale: {scale.dtype}, was {dtype} when keep_portable was called; leave out param_dtype, or after loading "
                "another weight call it again"
            )

    def _packed_form(self, quantized: QuantizedWeight, act: ActScale | None) -> tuple[Tensor, str]:
        """A weight as it is packed for this module on its device, and the name of the layout."""
        return ops.pack(quantized, self.scheme, self.in_features, act)

    def _packed_as(self, layout: str) -> Tensor:
        """The weight packed in a layout."""
        with torch.inference_mode(False):
            packed = ops.pack_as(self.quantized(), layout, self.scheme, self.in_features)
            act = self.act()
            return packed if act is None else act.before(packed)

    def unpack(self) -> None:
        """Replace the packed weight by the portable tensors, for code that edits or shards them."""
        with lock():
            if self.packed is not None:
                self._hold_portable(self.portable())

    def reads(self, layout: str, device: str) -> bool:
        """Whether the module can use a weight in a layout on a type of device."""
        base, form = split_layout(layout)
        return form.of_layout(base) == layout_for(self.scheme, self.out_features, self.in_features, device, form)

    def tie_to(self, other: PackedModule) -> None:
        """Share the packed weight of a module whose weight has the same codes and shape.

        With the same scheme, the static activation scale is shared too. A table of embeddings can share the weight of a
        Linear; not the other way round, since a Linear cannot multiply with rows as tables hold them.

        Raises:
            ValueError: weights of the schemes, or shapes, differ; the other module is on the meta device; or it holds the
                weight in a layout that this one does not read.
        """
        mine, theirs = (f"{layer.scheme} of ({layer.out_features}, {layer.in_features})" for layer in (self, other))
        if not self.scheme.shares_codes_of(other.scheme) or (self.out_features, self.in_features) != (
            other.out_features,
            other.in_features,
        ):
            raise ValueError(f"other: is {theirs}, this layer is {mine}")
        if other.device.type == "meta":
            raise ValueError("other: its weight is on the meta device and cannot be shared; load it first")
        packed, layout = other._pack()
        if type(self) is not type(other) and not self.reads(layout, other.device.type):
            raise ValueError(
                f"other: holds its weight in the layout {layout!r}, which a {type(self).__name__} does not read; "
                "tie that module to this one"
            )
        self._hold_packed(packed if self.scheme == other.scheme else split(packed, other.scheme)[1], layout)

    @property
    def weight_id(self) -> int:
        """Equal for modules that share their weight."""
        if self.packed is not None:
            return self.packed.untyped_storage().data_ptr()
        scale = self._parameters["scale"]
        return id(scale) if scale is None or scale.is_meta else scale.data_ptr()

    @property
    def weight(self) -> WeightView:
        """Shape, dtype and device of the dense weight (N, K). Any torch function dequantizes it first."""
        return WeightView(self)

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        held = self.packed if self.packed is not None else self._parameters["scale"]
        assert held is not None, "one of the two forms is always there"  # noqa: S101
        return held.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and zero points, and the bias, in the form in which they are held now."""
        held = [self.packed] if self.packed is not None else list(self._portable_parameters().values())
        return sum(tensor.nbytes for tensor in (*held, self.bias) if tensor is not None)

    def dequantized_weight(self) -> Tensor:
        """The dense weight (N, K) in the module's dtype."""
        quantized, k = self.quantized(), self.in_features
        rows, dense = max(_AT_ONCE // k, 1), torch.empty(self.out_features, k, dtype=self.dtype, device=self.device)
        for at in range(0, self.out_features, rows):
            part = slice(at, at + rows)
            dense[part] = dequantize_weight(quantized.rows(part), self.scheme, k)
        return dense

    def _hold_portable(self, tensors: dict[str, Tensor]) -> None:
        self._name_parameters({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
        self.register_buffer("packed", None, persistent=False)
        self.layout = None

    def _name_parameters(self, named: Mapping[str, nn.Parameter | None]) -> None:
        """Hold these in place of the portable tensors."""
        for name in portable_names(self.scheme) - named.keys():
            self._parameters.pop(name, None)
        self._parameters.update(named)

    def _hold_packed(self, packed: Tensor, layout: str) -> None:
        # The layout is set first: another thread's forward must not see a packed weight without it.
        self.layout = layout
        self.packed = packed
        self._name_parameters(dict.fromkeys(self._spec()))
