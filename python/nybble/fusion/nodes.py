"""The vocabulary of fused chains: what a value is computed from, and how, in plain torch.

A value is a matrix of rows, one for each token, as the run that was watched computed it: float (batch * length, width).
``compute`` is the definition of a node in torch: the reference for the compiled steps, and what proves that a chain is
understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rows import ACTIVATIONS
from .tables import Rows, Table

IDENTITY = "identity"

Path = tuple[Any, ...]  # how to get at a value in (args, kwargs): keys of containers, names of attributes


@dataclass(eq=False, kw_only=True, repr=False)
class Node:
    """A value. ``rows`` is what was watched."""

    rows: Tensor = field(repr=False)

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.rows.shape[1]

    def inputs(self) -> Sequence[Ref]:
        """What it is computed from."""
        return ()

    def compute(self, run: Run) -> Tensor:
        """The value in a run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ref:
    """Columns [offset, offset + width) of a node."""

    node: Node
    offset: int
    width: int

    @property
    def whole(self) -> bool:
        """Whether these are all columns."""
        return self.width == self.node.width


@dataclass(eq=False)
class Run:
    """The values of a run of a chain in torch."""

    batch: int
    length: int
    values: dict[Node, Tensor]
    tables: dict[Any, Any]
    masks: dict[Mask, Tensor] = field(default_factory=dict)  # those that were computed

    def mask(self, mask: Mask) -> Tensor:
        """A mask, computed once."""
        if mask not in self.masks:
            self.masks[mask] = mask.of(self.tables)
        return self.masks[mask]

    def of(self, ref: Ref) -> Tensor:
        """The columns of a value, (rows, width)."""
        value = self.values[ref.node]
        return value if ref.whole else value[:, ref.offset : ref.offset + ref.width]

    def heads(self, ref: Ref, heads: int) -> Tensor:
        """The columns as (batch, heads, length, width / heads)."""
        return self.of(ref).reshape(self.batch, self.length, heads, -1).transpose(1, 2)


@dataclass(eq=False, kw_only=True, repr=False)
class Input(Node):
    """A tensor that the module is called with."""

    path: Path


@dataclass(eq=False, kw_only=True, repr=False)
class Lookup(Node):
    """Rows of a table by the integers (batch, length) of a tensor of the call; without one, by position from ``first``."""

    table: Table
    path: Path | None
    first: int = 0

    def __post_init__(self) -> None:
        self.read = Rows(self.table)

    def compute(self, run: Run) -> Tensor:
        if self.path is not None:
            return self.read.by_ids(run.tables[self.path]).reshape(run.batch * run.length, -1)
        rows = self.read.by_position(self.first, self.first + run.length)
        return rows if run.batch == 1 else rows.repeat(run.batch, 1)


@dataclass(eq=False, kw_only=True, repr=False)
class Linear(Node):
    """A Linear-like module, dense or quantized."""

    x: Ref
    layer: nn.Module
    name: str

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        out: Tensor = self.layer(run.of(self.x).contiguous())
        return out


@dataclass(eq=False, kw_only=True, repr=False)
class Inside(Node):
    """What a module inside computes from one value, by its own forward: a mixture of experts. ``flat``: whether it takes
    (tokens, width) instead of (batch, length, width)."""

    x: Ref
    module: nn.Module
    flat: bool

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        x = run.of(self.x).contiguous()
        out: Tensor = self.module(x if self.flat else x.view(run.batch, run.length, -1))
        return out.reshape(len(x), -1)


@dataclass(eq=False, kw_only=True, repr=False)
class Product(Node):
    """x w^T + bias with a dense weight that is a parameter of a module, not a layer of its own."""

    x: Ref
    weight: Tensor
    bias: Tensor | None

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        return F.linear(run.of(self.x), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class NormKind:
    """Layer norm or root-mean-square norm: ``kind`` "layer" or "rms"; the scale is weight + offset."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0

    def of(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * (self.weight + self.offset if self.offset else self.weight)


@dataclass(eq=False, kw_only=True, repr=False)
class Norm(Node):
    """A norm over the columns, or over those of each head."""

    x: Ref
    norm: NormKind
    heads: int = 1

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        x = run.of(self.x)
        return self.norm.of(x.reshape(len(x), self.heads, -1)).reshape(len(x), -1)


@dataclass(eq=False, kw_only=True, repr=False)
class Activate(Node):
    """An activation function."""

    x: Ref
    act: str

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        return ACTIVATIONS[self.act](run.of(self.x))


@dataclass(eq=False, kw_only=True, repr=False)
class Add(Node):
    """The sum of two values."""

    a: Ref
    b: Ref

    def inputs(self) -> Sequence[Ref]:
        return (self.a, self.b)

    def compute(self, run: Run) -> Tensor:
        return run.of(self.a) + run.of(self.b)


@dataclass(eq=False, kw_only=True, repr=False)
class Multiply(Node):
    """The product of two values, element by element."""

    a: Ref
    b: Ref

    def inputs(self) -> Sequence[Ref]:
        return (self.a, self.b)

    def compute(self, run: Run) -> Tensor:
        return run.of(self.a) * run.of(self.b)


@dataclass(eq=False, kw_only=True, repr=False)
class Scale(Node):
    """A value times a number."""

    x: Ref
    factor: float

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        return run.of(self.x) * self.factor


@dataclass(eq=False, kw_only=True, repr=False)
class Rotate(Node):
    """Rotary position embedding of heads. cos and sin are tensors of the call, (batch or 1, length, width of a head)."""

    x: Ref
    heads: int
    cos: Path
    sin: Path
    interleaved: bool

    def inputs(self) -> Sequence[Ref]:
        return (self.x,)

    def compute(self, run: Run) -> Tensor:
        cos, sin = (run.tables[path].unsqueeze(1) for path in (self.cos, self.sin))
        y = rotated(run.heads(self.x, self.heads), cos, sin, self.interleaved)
        return y.transpose(1, 2).reshape(run.batch * run.length, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x cos + turned(x) sin: pairs are halves of a head, or neighbours."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return x * cos + turned * sin


@dataclass(frozen=True)
class CacheStep:
    """The update of a key and value cache. ``rest`` and ``options``: further arguments, constants."""

    path: Path
    rest: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Mask:
    """The mask of attention: a tensor of the call, or torch functions of such, which run before the attention.

    ``path`` leads to the tensor; or ``what`` is a function with ``args``, each a Mask or a constant.
    """

    path: Path | None = None
    what: Any = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def of(self, tables: dict[Any, Any]) -> Tensor:
        """The mask in a run."""
        if self.path is not None:
            found: Tensor = tables[self.path]
            return found
        args = [arg.of(tables) if isinstance(arg, Mask) else arg for arg in self.args]
        kwargs = {name: arg.of(tables) if isinstance(arg, Mask) else arg for name, arg in self.kwargs}
        made: Tensor = self.what(*args, **kwargs)
        return made

    def paths(self) -> set[Path]:
        """The tensors of the call that it needs."""
        found = {self.path} if self.path is not None else set()
        for arg in (*self.args, *(value for _, value in self.kwargs)):
            if isinstance(arg, Mask):
                found |= arg.paths()
        return found


@dataclass(eq=False, kw_only=True, repr=False)
class Attend(Node):
    """Scaled dot product attention: softmax(q k^T * scale + mask) v, of ``heads`` heads of q, ``kv_heads`` of k and v."""

    q: Ref
    k: Ref
    v: Ref
    heads: int
    kv_heads: int
    scale: float
    causal: bool
    mask: Mask | None
    cache: CacheStep | None
    int8: bool = False  # whether the compiled step may multiply codes of 8 bits

    def inputs(self) -> Sequence[Ref]:
        return (self.q, self.k, self.v)

    def compute(self, run: Run) -> Tensor:
        q = run.heads(self.q, self.heads)
        k, v = run.heads(self.k, self.kv_heads), run.heads(self.v, self.kv_heads)
        if self.cache is not None:
            k, v = self.update(run.tables[self.cache.path], k, v)
        causal = self.causal and run.length > 1
        if causal:
            k, v = k[:, :, : run.length], v[:, :, : run.length]
        mask = None if self.mask is None else run.mask(self.mask)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )
        return out.transpose(1, 2).reshape(run.batch * run.length, -1)

    def update(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new keys and values (batch, heads, length, width) into the cache; returns all of them."""
        assert self.cache is not None  # noqa: S101
        keys, values = cache.update(k, v, *self.cache.rest, **dict(self.cache.options))
        return keys, values

    def held(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """As ``update``; of a cache with ``update_codes`` int8 keys and values, and their scales (batch, kv_heads, keys, 1)."""
        if not callable(getattr(cache, "update_codes", None)):
            return self.update(cache, k, v)
        assert self.cache is not None  # noqa: S101
        codes: tuple[Tensor, ...] = cache.update_codes(k, v, *self.cache.rest, **dict(self.cache.options))
        return codes
