"""What a layout is: how the bytes of a packed weight lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.form import USUAL, Form
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme

ALIGNMENT = 64  # bytes, of each section

Spec = tuple[tuple[int, ...], torch.dtype]
# (scheme, out_features, in_features) -> name, shape and dtype of each section, in order.
Sections = Callable[[Scheme, int, int], dict[str, Spec]]
# (weight, scheme, in_features) -> the contents of each section, and the reverse.
Fill = Callable[[QuantizedWeight, Scheme, int], dict[str, Tensor]]
Collect = Callable[[dict[str, Tensor], Scheme, int, int], QuantizedWeight]
# (sections, numbers of rows) -> the sections of a weight of these rows, for collect.
Rows = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
# (scheme, out_features, in_features) -> both as the layout pads them.
Padded = Callable[[Scheme, int, int], tuple[int, int]]
Pack = Callable[[QuantizedWeight, Scheme, int], Tensor]
Unpack = Callable[[Tensor, Scheme, int, int], QuantizedWeight]


def not_padded(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """Of layouts without padding."""
    return out_features, in_features


@dataclass(frozen=True)
class Layout:
    """A layout: a row of the table.

    A packed weight is one uint8 tensor. Most layouts divide it into sections whose sizes follow from scheme and shape,
    each aligned to 64 bytes: `sections`, `fill` and `collect` define these in plain torch. `own_pack` and `own_unpack`
    take the place of that definition where there is a faster way, such as the compiled library, or where the sizes
    depend on the weight. A layout has one of the two, or both, which then agree byte for byte.

    Args:
        name: unique in the table.
        sections, fill, collect, padded: the definition, see the types above.
        own_pack, own_unpack: other functions to pack and unpack with.
        device: the type of device that these need the weight on; None: any.
        mask: the layout of sparse weights that kernels expand to this one, line by line; "": none.
        least_zeros: share of zeros from which this layout is faster than its alternatives.
        form: of the weights that it holds.
        a_scale_a_row: whether it holds only symmetric weights with one scale for each row.
        rows: finds some rows, for lookups in plain torch; None: those do not read the layout.
        of_form: makes the row for another form; None: it holds weights of this form only.
    """

    name: str
    sections: Sections | None = None
    fill: Fill | None = None
    collect: Collect | None = None
    padded: Padded = not_padded
    own_pack: Pack | None = None
    own_unpack: Unpack | None = None
    device: str | None = None
    mask: str = ""
    least_zeros: float = 0.0
    form: Form = USUAL
    a_scale_a_row: bool = False
    rows: Rows | None = None
    of_form: Callable[[Form], Layout] | None = None

    def spec(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
        """Name, shape and dtype of each section, in order.

        Raises:
            ValueError: the sizes of the sections depend on the weight.
        """
        if self.sections is None:
            raise ValueError(f"layout={self.name!r}: has no sections of fixed size")
        return self.sections(scheme, out_features, in_features)

    def offsets(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, int]:
        """The first byte of each section; "" is the end of the last one."""
        found, at = {}, 0
        for name, spec in self.spec(scheme, out_features, in_features).items():
            found[name] = at
            at += round_up(_nbytes(*spec), ALIGNMENT)
        return {**found, "": at}

    def views(self, packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Tensor]:
        """The sections of a packed weight by name, sharing its memory."""
        begin = self.offsets(scheme, out_features, in_features)
        return {
            name: packed[begin[name] : begin[name] + _nbytes(shape, dtype)].view(dtype).view(shape)
            for name, (shape, dtype) in self.spec(scheme, out_features, in_features).items()
        }

    def pack(self, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
        """The packed weight, by `own_pack` if there is one."""
        if self.own_pack is None:
            return self.pack_sections(quantized, scheme, in_features)
        self._check_form(quantized, scheme)
        self._check_device(quantized.qweight)
        return self.own_pack(quantized, scheme, in_features)

    def unpack(self, packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
        """The inverse of pack."""
        if self.own_unpack is None:
            return self.unpack_sections(packed, scheme, out_features, in_features)
        self._check_device(packed)
        return self.own_unpack(packed, scheme, out_features, in_features)

    def pack_sections(self, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
        """The packed weight by the definition in torch."""
        self._check_form(quantized, scheme)
        rows = quantized.qweight.shape[0]
        spec, begin = self.spec(scheme, rows, in_features), self.offsets(scheme, rows, in_features)
        assert self.fill is not None, "sections come with fill"  # noqa: S101
        filled = self.fill(quantized, scheme, in_features)
        packed = quantized.qweight.new_empty(begin[""], dtype=torch.uint8)
        for name, (shape, dtype) in spec.items():
            section = filled[name].to(dtype).reshape(shape).contiguous().view(-1).view(torch.uint8)
            end = begin[name] + section.numel()
            packed[begin[name] : end] = section
            packed[end : round_up(end, ALIGNMENT)] = 0
        return packed

    def unpack_sections(self, packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
        """The inverse of pack_sections."""
        parts = self.views(packed, scheme, out_features, in_features)
        assert self.collect is not None, "sections come with collect"  # noqa: S101
        return self.collect(parts, scheme, out_features, in_features)

    def read_rows(
        self, packed: Tensor, scheme: Scheme, out_features: int, in_features: int, rows: Tensor
    ) -> QuantizedWeight:
        """Some rows of a packed weight, by their numbers (count,)."""
        assert self.rows is not None and self.collect is not None, "of a layout whose rows are read"  # noqa: S101, PT018
        parts = self.rows(self.views(packed, scheme, out_features, in_features), rows)
        return self.collect(parts, scheme, len(rows), in_features)

    def _check_form(self, quantized: QuantizedWeight, scheme: Scheme) -> None:
        if Form.of(quantized.tensors(), scheme) != self.form:
            wanted = self.form.scale or scheme.weight_type.scale
            raise ValueError(f"scale: {quantized.scale.dtype}; layout {self.name!r} holds {wanted}")

    def _check_device(self, tensor: Tensor) -> None:
        if self.device not in (None, tensor.device.type):
            raise ValueError(f"weight: is on {tensor.device}; layout {self.name!r} is packed on {self.device}")

    def why_not(self, scheme: Scheme) -> str | None:
        """Why it holds no weights of a dense scheme of its bits; None: it does."""
        if self.a_scale_a_row and (scheme.group_size or not scheme.symmetric):
            return f"layout {self.name} has one scale for each row, and no zero points"
        return None

    def incomplete(self) -> str | None:
        """Why the row is no layout; None if it is one."""
        defined = {self.sections is None, self.fill is None, self.collect is None}
        own = {self.own_pack is None, self.own_unpack is None}
        if len(defined) == 2:
            return "needs all of sections, fill and collect, or none"
        if len(own) == 2:
            return "needs both of own_pack and own_unpack, or none"
        return "needs sections, fill and collect, or own_pack and own_unpack" if defined == own == {True} else None


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return dtype.itemsize * math.prod(shape)
