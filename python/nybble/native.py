"""The compiled extension: tensors in, pointers and byte counts out. The only module that imports `_C`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

# torch first: its wheels bring the OpenMP library that the extension then shares.
import torch
from torch import Tensor

from . import _C, __version__
from .weights.form import USUAL, Form, split_layout
from .weights.rounding import QuantizedWeight, portable_spec
from .weights.scheme import Scheme
from .weights.sparsity import Block, NofM

if _C.version != __version__:
    raise ImportError(f"nybble {__version__} found a compiled extension of version {_C.version}: reinstall it")
DTYPES = {
    torch.float32: _C.F32,
    torch.bfloat16: _C.BF16,
    torch.float16: _C.F16,
    torch.int32: _C.S32,
}
# By the panel number of csrc/abi.h.
PANEL_DTYPES = (
    *(torch.float32, torch.int8, torch.int16, torch.uint8, torch.bfloat16, torch.uint8),
    *(torch.uint8, torch.int8, torch.bfloat16),  # lines
)
BF16_LINES = 8

# Weight bits of the sparse weights that it packs, and of the weights that it rounds.
SPARSE_BITS = _ROUNDED_BITS = (8, 4)

_Memory: TypeAlias = tuple[int, int]
_NOTHING = (0, 0)


def kernel_table() -> list[dict[str, Any]]:
    """The rows of csrc/kernels.def."""
    return _C.kernel_table()


def cuda_kernel_table() -> list[dict[str, Any]]:
    """The rows of csrc/cuda/kernels.def: name, scheme, target, layout, min_m, max_m (0: any), built."""
    return _C.cuda_kernel_table()


def cpu(tiles: bool = False) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """The CPU's brand, the instruction sets that it and the operating system offer, and those that the latter refuses,
    each with the reason. tiles: whether to ask the system for the tile registers of AMX, which this process then holds;
    else the answer is taken to be yes."""
    brand, features, refused = _C.cpu(tiles)
    return brand, tuple(features), refused


class Caches(NamedTuple):
    """Bytes of the data caches that a core uses; the last may be shared with other cores."""

    l1: int
    l2: int
    l3: int


def caches() -> Caches:
    """The sizes that products are cut for: NYBBLE_CACHE, read once, or what CPU or operating system tell.

    Raises:
        ValueError: NYBBLE_CACHE is not three ascending sizes.
    """
    return Caches(*_C.caches())


def blocks(
    kernel: str,
    scheme: Scheme,
    size: tuple[int, int],
    *,
    layout: str = "",
    rows: int,
    threads: int,
    caches: str,
) -> dict[str, int]:
    """How a linear kernel cuts its product with a weight of size (N, K), see csrc/blocking.h. caches: as NYBBLE_CACHE."""
    return _C.blocks(
        kernel,
        weight_shape(scheme, *size, layout),
        rows=rows,
        threads=threads,
        caches=caches,
    )


def probes() -> list[tuple[str, str, str]]:
    """The rows of csrc/probes.def that were built, slower ones first: name, kind, and why it cannot run here or ""."""
    return _C.probes()


def probe(
    name: str,
    threads: int,
    amount: int,
    *,
    passes: int = 1,
    runs: int = 1,
    huge_pages: bool = False,
) -> tuple[float, int]:
    """Seconds of the fastest of `runs`, and the work of a run: bytes read or operations.

    A run is `passes` times `amount` by each thread: bytes, a multiple of 4096, for a probe that reads; rounds else.

    Raises:
        ValueError: an unknown name, one that cannot run here, or a number below its least value.
        MemoryError: the memory to read cannot be had.
    """
    return _C.probe(
        name,
        threads=threads,
        amount=amount,
        passes=passes,
        runs=runs,
        huge_pages=huge_pages,
    )


def memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address of the first element, and the bytes from there to the end of the storage."""
    if tensor is None:
        return _NOTHING
    if tensor.is_contiguous():
        return tensor.data_ptr(), int(tensor.nbytes)
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr(), int(tensor.untyped_storage().nbytes()) - offset


def weight_shape(
    scheme: Scheme, out_features: int, in_features: int, layout: str = "", form: Form = USUAL
) -> _C.WeightShape:
    """layout "": the dense one."""
    block = scheme.sparsity if isinstance(scheme.sparsity, Block) else None
    return _C.WeightShape(
        bits=scheme.weight_bits,
        n=out_features,
        k=in_features,
        group_size=scheme.group_size or 0,
        symmetric=scheme.symmetric or form.minimum,
        minimum=form.minimum,
        layout=layout,
        block_n=block.rows if block else 0,
        block_k=block.columns if block else 0,
        ordered=scheme.ordered,
        four_bit_scale=DTYPES[form.scale or torch.bfloat16],
        book=bool(scheme.book),
    )


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


def _parts(quantized: QuantizedWeight) -> tuple[_Memory, _Memory, _Memory]:
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
    zero_point, minimum, order, book = (
        None if part is None else part.contiguous()
        for part in (quantized.zero_point, quantized.minimum, quantized.order, quantized.book)
    )
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
            memory(packed),
            threads,
        )
        return packed
    sparse = _C.SparsePack(shape, memory(qweight), memory(scale), threads)
    packed = torch.empty(sparse.nbytes, dtype=torch.uint8)
    sparse.write(memory(packed))
    return packed


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
        rest = memory(quantized.minimum), memory(quantized.order), memory(quantized.book)
        _C.unpack(shape, memory(packed), *parts, *rest, threads)
    else:
        _C.unpack_sparse(shape, memory(packed), *parts[:2], threads)
    return quantized


def check_packed(packed: Tensor, scheme: Scheme, out_features: int, in_features: int, layout: str) -> None:
    """Raises ValueError, naming the section, where a kernel could not follow the packed tensor of a sparse weight."""
    _C.check_packed(weight_shape(scheme, out_features, in_features, layout), memory(packed))


def to_bitmask(qweight: Tensor, scheme: Scheme, in_features: int) -> tuple[Tensor, Tensor]:
    """The codes of a sparse weight as mask and values, see portable.py."""
    out_features = qweight.shape[0]
    shape, codes = (
        weight_shape(scheme, out_features, in_features),
        memory(qweight.contiguous()),
    )
    kept = _C.count_kept(shape, codes)
    mask = torch.empty(out_features, (in_features + 7) // 8, dtype=torch.uint8)
    kind = scheme.weight_type
    values = torch.empty(-(-kept // kind.per_byte), dtype=kind.stored)
    _C.to_bitmask(shape, codes, memory(mask), memory(values))
    return mask, values


def from_bitmask(mask: Tensor, values: Tensor, scheme: Scheme, out_features: int, in_features: int) -> Tensor:
    """The codes, with their zeros, of mask and values.

    Raises:
        ValueError: they do not belong together, or the mask breaks the scheme's n of m.
    """
    size, dtype = portable_spec(scheme, out_features, in_features)["qweight"]
    qweight = torch.empty(size, dtype=dtype)
    sparsity = scheme.sparsity
    most, of = (sparsity.n, sparsity.m) if isinstance(sparsity, NofM) else (0, 0)
    shape = weight_shape(scheme, out_features, in_features)
    _C.from_bitmask(
        shape,
        memory(mask.contiguous()),
        memory(values.contiguous()),
        most,
        of,
        memory(qweight),
    )
    return qweight


def check_blocks(start: Tensor, index: Tensor, width: int) -> None:
    """Raises ValueError unless int32 start (strips + 1,) and index (blocks,) are block rows of `width` blocks."""
    _C.check_blocks(memory(start.contiguous()), memory(index.contiguous()), width)


class KernelNames(NamedTuple):
    """What runs a product together; "" where there is none.

    linear multiplies, prepare makes its panel, expand makes its lines from the mask layout, few serves a few rows of the
    mask layout in place of both; layout is the weight's.
    """

    linear: str
    prepare: str
    layout: str
    expand: str = ""
    few: str = ""


class LinearPlan:
    """Compiled kernels bound to a scheme and a weight shape."""

    def __init__(
        self,
        kernels: KernelNames,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        form: Form = USUAL,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """rows: begin, a multiple of 16, and end: of a weight in a tiled layout only these outputs are computed."""
        self._made_of = (kernels, scheme, out_features, in_features, form)
        begin, end = rows or (0, out_features)
        shape = weight_shape(scheme, end - begin, in_features, kernels.layout, form)
        act = scheme.act_type
        plan = _C.LinearPlan(
            kernels.linear,
            kernels.prepare,
            kernels.expand,
            kernels.few,
            shape,
            static_activations=scheme.static,
            act_steps=act.steps if act.quantized else 0,
            first_row=begin,
            all_rows=0 if rows is None else out_features,
        )
        self.compiled, self._run = plan, plan.run
        self._in_features = in_features

    def of_rows(self, begin: int, end: int) -> LinearPlan:
        """The same kernels for the outputs [begin, end) of the weight."""
        return LinearPlan(*self._made_of, rows=(begin, end))

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N) = x (..., K) w^T + bias.

        x is contiguous, or (M, K) with unit stride along K; out is contiguous, of x's dtype, or int32 for the
        accumulators of w8a8.

        Raises:
            ValueError: a tensor is smaller than its shape says.
        """
        dtype, k = DTYPES[x.dtype], self._in_features
        if x.is_contiguous():
            span, stride = (x.data_ptr(), x.nbytes), k
        else:
            span, stride = memory(x), x.stride(0)
        self._run(
            span,
            dtype,
            x.numel() // k,
            stride,
            (packed.data_ptr(), packed.nbytes),
            _NOTHING if bias is None else (bias.data_ptr(), bias.nbytes),
            dtype if bias is None else DTYPES[bias.dtype],
            (out.data_ptr(), out.nbytes),
            dtype if out.dtype is x.dtype else DTYPES[out.dtype],
            torch.get_num_threads(),
        )


# The layouts of which a LinearPlan may multiply some of the rows.
TILED = ("n16k4", "n16k8")
# The layouts whose rows a Lookup reads, and whether they are in tiles.
LOOKUP_LAYOUTS = {"plain": False, "n16k4": True, "n16k8": True}
_ID_BYTES = {torch.int32: 4, torch.int64: 8}


class Lookup:
    """A compiled kernel that reads rows of a dense weight with 8 or 4 bits by their numbers.

    kernel: of the op rows. Calls raise IndexError for an id that is no row, ValueError for a tensor that is too small.
    """

    def __init__(self, kernel: str, scheme: Scheme, out_features: int, in_features: int, layout: str) -> None:
        base, form = split_layout(layout)
        shape = weight_shape(scheme, out_features, in_features, form=form)
        self._compiled = _C.Lookup(kernel, shape, LOOKUP_LAYOUTS[base])
        self._run = self._compiled.run

    def __call__(self, packed: Tensor, ids: Tensor, out: Tensor) -> None:
        """out (..., K) = the rows of ids (...), int32 or int64; all are contiguous."""
        self._run(
            packed.data_ptr(),
            packed.numel(),
            ids.data_ptr(),
            8 if ids.dtype is torch.int64 else 4,
            ids.numel(),
            out.data_ptr(),
            out.nbytes,
            DTYPES[out.dtype],
            torch.get_num_threads(),
        )

    def bags(
        self,
        packed: Tensor,
        ids: Tensor,
        start: Tensor,
        weights: Tensor | None,
        out: Tensor,
        mode: str,
        left_out: int,
    ) -> None:
        """out (bags, K) = the sum, mean or maximum of the rows ids[start[i]:start[i + 1]] of bag i.

        start: int64 (bags + 1,). weights: float32, of each id, for sums. left_out: an id that is skipped, or -1.
        """
        spans = memory(start), len(start) - 1, memory(weights)
        held = memory(packed), memory(ids), _ID_BYTES[ids.dtype], ids.numel(), memory(out), DTYPES[out.dtype]
        self._compiled.bag(*held, mode, *spans, left_out, torch.get_num_threads())


class AttentionHow(NamedTuple):
    """scale: of the scores; causal, window: which keys a query sees, see csrc/attention.h.

    scales: of keys and of values that are int8 codes, each (B, KH, S), float32.

    int8: the name of a kernel whose products are of 8 bits; "": none.
    """

    scale: float
    causal: bool = False
    window: int = 0
    scales: tuple[Tensor, Tensor] | None = None
    int8: str = ""


_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def _placed(heads: Tensor) -> tuple[_Memory, tuple[int, ...]]:
    return memory(heads), heads.stride()[:3]


def attention(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    how: AttentionHow,
) -> None:
    """out (B, H, L, Dv) = softmax(q k^T * scale + mask) v, with unit stride along the last dimension.

    All are of one dtype, but k and v are int8 with ``how.scales``: then a key is its codes times its scale.
    q: (B, H, L, D); k, v: (B, KH, S, D or Dv); mask: (B, H, L, S), bool or float; slopes: (H,) float32, contiguous.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, value_width = v.shape
    _C.attention(
        kernel,
        DTYPES[q.dtype],
        (batch, heads, kv_heads, queries, keys, width, value_width),
        (_placed(q), _placed(k), _placed(v), _placed(out)),
        None if mask is None else (memory(mask), _MASK_KINDS[mask.dtype], mask.stride()),
        memory(slopes),
        how.scale,
        how.causal,
        how.window,
        None if how.scales is None else (_placed(how.scales[0]), _placed(how.scales[1])),
        how.int8,
        torch.get_num_threads(),
    )


_Image: TypeAlias = tuple[Tensor, bool]  # whether its channels are last in memory
Code: TypeAlias = tuple[float, int, int, int] | None
_Codes: TypeAlias = tuple[Code, Code, Code]
_IMAGE_DTYPES = DTYPES | {torch.uint8: _C.U8}


def conv_call(
    plan: LinearPlan,
    kernel: str,
    sizes: tuple[int, ...],
    x: _Image,
    packed: Tensor,
    bias: Tensor | None,
    y: _Image,
    residual: Tensor | None = None,
    act: str = "",
    most: float = float("inf"),
    scale: Tensor | None = None,
    ranges: tuple[Tensor | None, Tensor | None] = (None, None),
    codes: _Codes = (None, None, None),
) -> _C.ConvCall:
    """A call y = min(act(conv(x) + bias + residual), most) for dense images, see csrc/conv.h, which `run_convs` runs. The
    caller keeps the tensors alive.

    plan: of the weight (N, K). kernel: the name of a kernel of the op "conv". sizes: batch, channels; then height and
    width of x, of y, of the kernel, the stride, the padding and the dilation; groups. y: of x's dtype, or int32 for the
    accumulators of w8a8. residual: as y. scale: float32, of N rounded up to a multiple of 16, in place of the scales of
    an 8-bit weight. ranges: of x, as found before, and of y, to be written; float32 (batch, 3). codes: of x, y and the
    residual, those that are bytes of code + 128 in frames: scale, zero point, and padding of the frame in pixels; only for
    a call that runs_direct. 64 bytes after their frames belong to the tensors.
    """
    images = [((t.data_ptr(), t.nbytes), _IMAGE_DTYPES[t.dtype], last) for t, last in (x, y)]
    added = (
        (_NOTHING, _C.F32)
        if residual is None
        else ((residual.data_ptr(), residual.nbytes), _IMAGE_DTYPES[residual.dtype])
    )
    return _C.ConvCall(
        plan.compiled,
        kernel,
        sizes,
        images[0],
        memory(packed),
        memory(scale),
        memory(bias),
        _C.F32 if bias is None else DTYPES[bias.dtype],
        images[1],
        added,
        act,
        most,
        memory(ranges[0]),
        memory(ranges[1]),
        codes,
    )


def pool_call(
    kernel: str,
    sizes: tuple[int, ...],
    pool: str,
    x: Tensor,
    y: Tensor,
    y_range: Tensor | None,
) -> _C.ConvCall:
    """A call of `run_convs` that writes the "max" or the "mean" of each window of x, both channels_last. sizes: as of
    conv_call, with a dilation of 1."""
    image = ((x.data_ptr(), x.nbytes), DTYPES[x.dtype], True)
    return _C.pool_call(kernel, sizes, pool, image, (y.data_ptr(), y.nbytes), memory(y_range))


def run_convs(calls: list[_C.ConvCall]) -> None:
    """Runs convolutions one after the other.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    _C.run_convs(calls, torch.get_num_threads())


ChainWeight = _C.ChainWeight


def chain(
    dtype: torch.dtype,
    widths: Sequence[int],
    externals: int,
    *,
    rows: str,
    attention: str,
) -> _C.Chain:
    """Steps between matrices (rows, width) of one dtype that run in one call, see csrc/chain.h. rows, attention: names of kernels."""
    return _C.Chain(DTYPES[dtype], list(widths), externals, rows=rows, attention=attention)


def vector(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """A contiguous vector of floats, as the steps of a chain take weights of norms and biases."""
    return None if tensor is None else (*memory(tensor), DTYPES[tensor.dtype])


_TABLE_DTYPES = DTYPES | {torch.int8: _C.S8, torch.bool: _C.BOOL}


def table(
    tensor: Tensor | None,
) -> tuple[int, int, int, int, int, int, int, int, int, int, int] | None:
    """A tensor of four dimensions, as a run of a chain takes it."""
    if tensor is None:
        return None
    kind = _TABLE_DTYPES[tensor.dtype]
    s0, s1, s2, s3 = tensor.shape
    t0, t1, t2, t3 = tensor.stride()
    return (*memory(tensor), kind, s0, s1, s2, s3, t0, t1, t2, t3)


_RecurrentWeight: TypeAlias = tuple[_C.LinearPlan, _Memory, tuple[int, int, int] | None]


def recurrent(
    rows: str,
    cell: str,
    directions: list[tuple[_RecurrentWeight | None, _RecurrentWeight]],
    sizes: list[int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """A layer of an LSTM or GRU, see csrc/recurrent.h.

    rows: name of the row kernels; cell: "lstm" or "gru"; directions: for each the weights of the input and of the state,
    as compiled plan, memory and vector; sizes: the rows of each step; tensors: x (rows, inputs) with unit stride along
    inputs, y (rows, directions * units), h (directions, batch, units) of the same dtype, and c, float32, as h. Without
    weights of the inputs, x are the products with them, float32.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    x, y, h, c = tensors
    _C.recurrent(
        rows,
        cell,
        dtype=DTYPES[y.dtype],
        directions=directions,
        sizes=sizes,
        x=memory(x),
        stride=x.stride(0),
        y=memory(y),
        h=memory(h),
        c=memory(c),
        threads=torch.get_num_threads(),
    )


class ExpertsSide(NamedTuple):
    """One of the two weights of all experts: packed, with biases, by expert; and the kernels that serve it, from so many
    rows on each, ascending."""

    plans: Sequence[tuple[int, LinearPlan]]
    packed: Sequence[Tensor]
    bias: Sequence[Tensor | None]


class Gate(NamedTuple):
    """What experts compute between their two products: act(gate) * up, or act(up) if not gated.

    The outputs of the first product are gates, then ups; or, interleaved, a gate and an up in turns. With a limit that
    is not 0, gates are at most that, ups are clamped to [-limit, limit], and other_offset is added to them.
    """

    act: str
    gated: bool = True
    interleaved: bool = False
    limit: float = 0.0
    other_offset: float = 0.0


class Experts:
    """The experts of a layer in one call, see csrc/experts.h. It holds addresses, so the packed weights must stay."""

    def __init__(self, dtype: torch.dtype, rows: str, up: ExpertsSide, down: ExpertsSide, gate: Gate) -> None:
        sides = [
            (
                [(least, plan.compiled) for least, plan in side.plans],
                [memory(packed) for packed in side.packed],
                [vector(bias) for bias in side.bias],
            )
            for side in (up, down)
        ]
        self._run = _C.Experts(DTYPES[dtype], rows, sides[0], sides[1], gate).run

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
        """out (T, N) from x (T, K) with unit stride along K, index (T, top_k) int64 and weight (T, top_k) float32.

        All but x are contiguous.

        Raises:
            ValueError: a tensor is smaller than its shape says, or index names no expert.
        """
        tokens, top_k = index.shape
        sizes = tokens, x.stride(0), top_k
        self._run(sizes, memory(x), memory(index), memory(weight), memory(out), torch.get_num_threads())
