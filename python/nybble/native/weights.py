"""Weights: rounded, ranked, packed and unpacked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..weights.form import USUAL, Form
from ..weights.rounding import QuantizedWeight, portable_spec
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, NofM
from .base import DTYPES, Memory, memory


class TiledLayout(NamedTuple):
    """bits: of a code. grouped: 8 bits with scales by group. paired: lines lie side by side, two by two."""

    bits: int
    grouped: bool
    paired: bool


# Weight bits of the sparse weights that it packs, and of the weights that it rounds.
SPARSE_BITS = (8, 4)
_ROUNDED_BITS = SPARSE_BITS
# The layouts of dense weights in tiles, by name: csrc/shape.cpp has them.
TILED: dict[str, TiledLayout] = {row[0]: TiledLayout(*row[1:]) for row in _C.dense_layouts()}
# Those of 8 bits with scales by group.
GROUPED = tuple(name for name, row in TILED.items() if row.grouped)


def weight_shape(
    scheme: Scheme, out_features: int, in_features: int, layout: str = "", form: Form = USUAL
) -> _C.WeightShape:
    """layout "": a dense one that holds such weights."""
    return _C.WeightShape(**shape_fields(scheme, out_features, in_features, layout, form))


def shape_fields(scheme: Scheme, out_features: int, in_features: int, layout: str, form: Form) -> dict[str, Any]:
    """The arguments of _C.WeightShape for a weight."""
    block, kind = scheme.sparsity if isinstance(scheme.sparsity, Block) else None, scheme.weight_type
    if not layout and kind.bits == 8 and (scheme.group_size or not scheme.symmetric or form != USUAL):
        layout = GROUPED[0]
    by_group = kind.bits != 8 or layout in GROUPED
    return {
        "bits": scheme.weight_bits,
        "n": out_features,
        "k": in_features,
        "group_size": scheme.group_size or 0,
        "symmetric": scheme.symmetric or form.minimum,
        "layout": layout,
        "block_n": block.rows if block else 0,
        "block_k": block.columns if block else 0,
        "ordered": scheme.ordered,
        "group_scale": DTYPES[form.scale or (kind.scale if by_group else torch.bfloat16)],
        "minimum": form.minimum or kind.levels,
        "book": bool(kind.table),
        "levels": kind.levels,
    }


def rounds(scheme: Scheme) -> bool:
    """Whether round_weight and squared_sums take the weights of a scheme."""
    return scheme.weight_bits in _ROUNDED_BITS and not scheme.book


def all_finite(weight: Tensor) -> bool:
    """Whether a weight (N, K), float32, bfloat16 or float16 with unit stride along K, has neither NaN nor Inf."""
    n, k = weight.shape
    return _C.all_finite(
        memory(weight),
        DTYPES[weight.dtype],
        n,
        k,
        weight.stride(0),
        torch.get_num_threads(),
    )


def round_weight(weight: Tensor, scheme: Scheme, to: QuantizedWeight) -> bool:
    """Rounds a weight (N, K) as all_finite takes it into `to`. False: it has NaN or Inf, and `to` is not defined."""
    args = (
        weight_shape(scheme, *weight.shape),
        memory(weight),
        DTYPES[weight.dtype],
        weight.stride(0),
    )
    return _C.round_weight(*args, *_parts(to), torch.get_num_threads())


def squared_sums(weight: Tensor, rounded: QuantizedWeight, scheme: Scheme) -> tuple[float, float]:
    """Sums of w^2 and (w - w')^2 of a weight (N, K) as all_finite takes it; w' is the rounded one, in the same dtype."""
    n, k = weight.shape
    args = (
        weight_shape(scheme, n, k, "", Form.of(rounded.tensors(), scheme)),
        memory(weight),
        DTYPES[weight.dtype],
        weight.stride(0),
    )
    held = QuantizedWeight(**{name: tensor.contiguous() for name, tensor in rounded.tensors().items()})
    return _C.squared_sums(*args, *_parts(held), memory(held.minimum), torch.get_num_threads())


def choose_smallest(scores: Tensor, counts: Tensor) -> Tensor:
    """ranking.smallest for contiguous float32 scores (N, K)."""
    n, k = scores.shape
    chosen, each = (
        torch.empty(n, k, dtype=torch.bool),
        counts.to(torch.int64).contiguous(),
    )
    _C.choose_smallest(memory(scores), memory(each), n, k, memory(chosen), torch.get_num_threads())
    return chosen


def keep_only(weight: Tensor, keep: Tensor) -> Tensor:
    """ranking.keep_only for contiguous tensors, not empty, with elements of 2 or 4 bytes."""
    kept = torch.empty_like(weight)
    spans, size = (
        [memory(tensor) for tensor in (weight, keep, kept)],
        weight.element_size(),
    )
    _C.keep_only(spans[0], spans[1], weight.numel(), size, spans[2], torch.get_num_threads())
    return kept


def check_kept(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> None:
    """Raises ValueError where codes break the scheme's n of m: where too many of m inputs are not zero."""
    if isinstance(scheme.sparsity, NofM):
        codes, form = quantized.qweight.contiguous(), scheme.sparsity
        _C.check_kept(
            weight_shape(scheme, len(codes), in_features),
            memory(codes),
            form.n,
            form.m,
            torch.get_num_threads(),
        )


def _parts(quantized: QuantizedWeight) -> tuple[Memory, Memory, Memory]:
    return (
        memory(quantized.qweight),
        memory(quantized.scale),
        memory(quantized.zero_point),
    )


def pack(quantized: QuantizedWeight, scheme: Scheme, in_features: int, layout: str) -> Tensor:
    """layouts.pack for the layouts of the CPU kernels, in parallel."""
    form = Form.of(quantized.tensors(), scheme)
    shape = weight_shape(scheme, quantized.qweight.shape[0], in_features, layout, form)
    qweight, scale = quantized.qweight.contiguous(), quantized.scale.contiguous()
    rest = (quantized.zero_point, quantized.minimum, quantized.order, quantized.book, quantized.levels)
    zero_point, minimum, order, book, levels = (None if part is None else part.contiguous() for part in rest)
    threads = torch.get_num_threads()
    if scheme.sparsity is None:
        packed = torch.empty(shape.packed_bytes, dtype=torch.uint8)
        _C.pack(
            shape,
            memory(qweight),
            memory(scale),
            memory(zero_point),
            memory(minimum),
            memory(order),
            memory(book),
            memory(levels),
            memory(packed),
            threads,
        )
        return packed
    sparse = _C.SparsePack(shape, memory(qweight), memory(scale), threads)
    packed = torch.empty(sparse.nbytes, dtype=torch.uint8)
    sparse.write(memory(packed))
    return packed


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Moves tensors of the CPU to huge pages, where the system has them: kernels then wait less for addresses of pages.
    The system waits for all cores meanwhile, so this is best called for many, and when the cores are idle."""
    _C.use_huge_pages([memory(tensor) for tensor in tensors])


def unpack(
    packed: Tensor, scheme: Scheme, out_features: int, in_features: int, layout: str, form: Form = USUAL
) -> QuantizedWeight:
    """layouts.unpack, in parallel. Sparse weights come back with their zeros.

    Raises:
        ValueError: the packed tensor of a sparse weight is damaged.
    """
    shape = weight_shape(scheme, out_features, in_features, layout, form)
    spec = portable_spec(scheme, out_features, in_features, form)
    quantized = QuantizedWeight(**{name: torch.empty(size, dtype=dtype) for name, (size, dtype) in spec.items()})
    parts, threads = _parts(quantized), torch.get_num_threads()
    if scheme.sparsity is None:
        rest = memory(quantized.minimum), memory(quantized.order), memory(quantized.book), memory(quantized.levels)
        _C.unpack(shape, memory(packed), *parts, *rest, threads)
    else:
        _C.unpack_sparse(shape, memory(packed), *parts[:2], threads)
    return quantized


def check_packed(packed: Tensor, scheme: Scheme, out_features: int, in_features: int, layout: str) -> None:
    """Raises ValueError, naming the section, where a kernel could not follow the packed tensor of a sparse weight."""
    _C.check_packed(weight_shape(scheme, out_features, in_features, layout), memory(packed))
