"""The torch ops ``nybble::embedding`` and ``nybble::embedding_bag``: rows of an integer weight by their numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import profiler
from torch.compiler import is_compiling

from . import batching, gradients, layouts, native, ops
from .dispatch import targets
from .dispatch.explanation import Explanation
from .dispatch.reference import EmbeddingReference
from .dispatch.registry import all_specs, fastest
from .dispatch.spec import FLOATS, Problem
from .weights.form import split_layout
from .weights.scheme import Scheme

MODES = ("sum", "mean", "max")
REFERENCE = "embedding_reference"
_IDS = (torch.int32, torch.int64)

_Plan: TypeAlias = "native.Lookup | EmbeddingReference"

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define(
    "embedding(Tensor ids, Tensor packed, str scheme, str layout, int num_embeddings, int embedding_dim, "
    "ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "embedding_bag(Tensor ids, Tensor offsets, Tensor? per_sample_weights, Tensor packed, str scheme, str layout, "
    "int num_embeddings, int embedding_dim, ScalarType dtype, str mode, int padding_idx) -> Tensor"
)


def embedding(
    ids: Tensor,
    packed: Tensor,
    scheme: str,
    layout: str,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows (..., embedding_dim) of the weight by ids (...), int32 or int64, rounded once from float32 to dtype.

    packed, layout: a weight (num_embeddings, embedding_dim), in the layout plain or as ``ops.pack`` packs it for a
    linear layer on the CPU.

    Raises:
        IndexError: an id is not in [0, num_embeddings).
        ValueError: a shape, dtype, device or layout that does not fit, by name.
    """
    if is_compiling() or _watched(ids):
        out: Tensor = torch.ops.nybble.embedding.default(
            ids, packed, scheme, layout, num_embeddings, embedding_dim, dtype
        )
        return out
    usual = ids.dtype is torch.int64 and ids.is_cpu and packed.is_cpu and packed.dtype is torch.uint8
    if not (usual and dtype in FLOATS and ids.is_contiguous() and packed.is_contiguous()):
        return _embedding(ids, packed, scheme, layout, num_embeddings, embedding_dim, dtype)
    # The checks of _embedding, and the fastest way to a new tensor, if no mode of torch changes where it is.
    rows = torch.empty(*ids.shape, embedding_dim, dtype=dtype)
    _plan(scheme, layout, num_embeddings, embedding_dim, "cpu")(packed, ids, rows)
    return rows


def embedding_bag(
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    packed: Tensor,
    scheme: str,
    layout: str,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    mode: str = "mean",
    padding_idx: int = -1,
) -> Tensor:
    """Sums, means or maxima (bags, embedding_dim) of rows, in float32 in the order of the ids, rounded once to dtype.

    ids: (count,). offsets: (bags + 1,), ascending: bag i has ids[offsets[i]:offsets[i + 1]]; an empty one gives 0.
    per_sample_weights: (count,), float, by which rows are multiplied before they are summed. padding_idx: an id that is
    left out, or -1. The rest as in ``embedding``. Gradients flow to per_sample_weights.
    """
    out: Tensor = torch.ops.nybble.embedding_bag.default(
        ids,
        offsets,
        per_sample_weights,
        packed,
        scheme,
        layout,
        num_embeddings,
        embedding_dim,
        dtype,
        mode,
        padding_idx,
    )
    return out


class Reader:
    """Rows of a packed weight, for many calls: without the checks of ``embedding``, which take as long as a few rows.

    Args:
        packed: on the CPU; the rest as in ``embedding``.
    """

    def __init__(self, packed: Tensor, table: tuple[str, str, int, int], dtype: torch.dtype) -> None:
        self.packed, self.dtype = packed, dtype
        self._read, self._width = _plan(*table, "cpu"), table[3]

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows (..., embedding_dim) by ids (...), int32 or int64, contiguous and on the CPU. Raises as ``embedding``."""
        rows = torch.empty(*ids.shape, self._width, dtype=self.dtype)
        self._read(self.packed, ids, rows)
        return rows


def _watched(ids: Tensor) -> bool:
    """Whether the call must go through torch's dispatcher, as ops does it; integers have no gradients."""
    return (
        type(ids) is not Tensor
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    )


def kernel_for(scheme: Scheme, layout: str | None, device: str) -> str:
    """The name of what runs a lookup: a compiled kernel, or plain torch.

    Raises:
        ValueError: nothing reads the layout there.
    """
    compiled = device == "cpu" and scheme.sparsity is None and scheme.weight_bits in (4, 8) and not scheme.book
    base = None if layout is None else split_layout(layout)[0]
    if compiled and (base is None or base in native.LOOKUP_LAYOUTS):
        return fastest("rows")
    row = layouts.find(layouts.PLAIN if base is None else base)
    if row.rows is not None and row.device in (None, device):
        return REFERENCE
    raise ValueError(f"layout={layout!r}: no lookup reads it on {device}; must be {layouts.PLAIN!r}")


def explain(problem: Problem) -> Explanation:
    """Which kernel reads rows of a weight, and why each other does not. Nothing runs. Raises as ``kernel_for``."""
    chosen = kernel_for(problem.scheme, problem.layout, problem.device)
    missing, slower = targets.detect().missing, f"slower than {chosen}"
    others = [spec for spec in all_specs() if spec.op == "rows" and spec.name != chosen]
    note = f"which reads a row of {problem.scheme.weight_bits}-bit codes for each id"
    return Explanation(problem, chosen, {spec.name: missing.get(spec.target, slower) for spec in others}, notes=(note,))


@lru_cache(maxsize=4096)
def _plan(scheme: str, layout: str, num_embeddings: int, embedding_dim: int, device: str) -> _Plan:
    parsed = Scheme.parse(scheme)
    kernel = kernel_for(parsed, layout, device)
    if kernel == REFERENCE:
        return EmbeddingReference(parsed, num_embeddings, embedding_dim, layout)
    return native.Lookup(kernel, parsed, num_embeddings, embedding_dim, layout)


def _embedding(
    ids: Tensor,
    packed: Tensor,
    scheme: str,
    layout: str,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(ids, packed, dtype)
    rows = packed.new_empty((*ids.shape, embedding_dim), dtype=dtype)
    _plan(scheme, layout, num_embeddings, embedding_dim, packed.device.type)(packed, ids.contiguous(), rows)
    return rows


def _embedding_bag(
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    packed: Tensor,
    scheme: str,
    layout: str,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    mode: str,
    padding_idx: int,
) -> Tensor:
    _check(ids, packed, dtype)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {MODES}")
    if ids.dim() != 1:
        raise ValueError(f"ids: shape {tuple(ids.shape)}, must be (count,)")
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype not in _IDS or offsets.device != ids.device:
        raise ValueError(
            f"offsets: {offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}, must be (bags + 1,) of "
            f"{_IDS} on {ids.device}"
        )
    weights = per_sample_weights
    if weights is not None:
        if mode != "sum":
            raise ValueError(f"per_sample_weights: must be None with mode={mode!r}, only 'sum' takes them")
        if weights.shape != ids.shape or weights.dtype not in FLOATS or weights.device != ids.device:
            raise ValueError(
                f"per_sample_weights: {weights.dtype} of shape {tuple(weights.shape)} on {weights.device}, must be "
                f"{tuple(ids.shape)}, one of {FLOATS}, on {ids.device}"
            )
        weights = weights.float().contiguous()
    out = packed.new_empty((len(offsets) - 1, embedding_dim), dtype=dtype)
    plan = _plan(scheme, layout, num_embeddings, embedding_dim, packed.device.type)
    plan.bags(packed, ids.contiguous(), offsets.long().contiguous(), weights, out, mode, padding_idx)
    return out


def _check(ids: Tensor, packed: Tensor, dtype: torch.dtype) -> None:
    if ids.dtype is not torch.int64 and ids.dtype is not torch.int32:
        raise ValueError(f"ids: {ids.dtype}, must be one of {_IDS}")
    if not (ids.is_cpu and packed.is_cpu) and ids.device != packed.device:
        raise ValueError(f"ids: on {ids.device}, the weight is on {packed.device}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: must be one of {FLOATS}")
    ops._check_packed(packed)


def _setup_bag_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, offsets, weights, packed, *table, _, padding_idx = inputs
    ctx.save_for_backward(ids, offsets, packed)
    ctx.table, ctx.padding_idx = table[:-1], padding_idx
    ctx.weights_dtype = None if weights is None else weights.dtype


def _bag_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of per_sample_weights: the product of an id's row with the gradient of its bag, 0 for an id that is left out."""
    ids, offsets, packed = ctx.saved_tensors
    given = None
    if ctx.needs_input_grad[2]:
        rows = torch.ops.nybble.embedding(ids, packed, *ctx.table, torch.float32)
        bag = (
            torch.searchsorted(offsets, torch.arange(len(ids), device=ids.device, dtype=offsets.dtype), right=True) - 1
        )
        counts = (bag >= 0) & (bag < len(grad)) & (ids != ctx.padding_idx)
        products = (rows * grad.float()[bag.clamp(0, max(len(grad) - 1, 0))]).sum(-1) if len(grad) else rows.sum(-1)
        given = torch.where(counts, products, 0.0).to(ctx.weights_dtype)
    return None, None, given, *(None,) * 8


_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding_bag", _embedding_bag, "CompositeExplicitAutograd")
gradients.register(_LIBRARY, "embedding_bag", _bag_backward, _setup_bag_context)
batching.register(_LIBRARY, "embedding", batching.leading(0))
batching.register(_LIBRARY, "embedding_bag", batching.one_by_one)


@torch.library.register_fake("nybble::embedding", lib=_LIBRARY)
def _embedding_fake(
    ids: Tensor, packed: Tensor, scheme: str, layout: str, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((*ids.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("nybble::embedding_bag", lib=_LIBRARY)
def _embedding_bag_fake(
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    packed: Tensor,
    scheme: str,
    layout: str,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return packed.new_empty((offsets.shape[0] - 1, embedding_dim), dtype=dtype)
