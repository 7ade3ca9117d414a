"""Chains of compiled steps on tensors, for tests and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch import registry
from ..dispatch.selection import compiled_plan
from ..nn import Linear, SparseLinear
from ..weights.scheme import Scheme
from .oracle import random_mask, random_weight


def layer(scheme: str, n: int, k: int, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> Linear:
    """A random layer; a sparse scheme gets its zeros at random places, an ordered one its columns in random order."""
    torch.manual_seed(seed)
    dense, parsed = torch.nn.Linear(k, n, bias, dtype=dtype), Scheme.parse(scheme)
    if parsed.ordered:
        return Linear.from_quantized(random_weight(parsed, n, k, seed), k, dense.bias, parsed, dtype)
    if parsed.sparsity is None:
        return Linear.from_dense(dense, parsed)
    with torch.no_grad():
        dense.weight *= random_mask(parsed, n, k, torch.Generator().manual_seed(seed))
    return SparseLinear.from_dense(dense, parsed)


def compiled(linear: Linear, dtype: torch.dtype, rows: int) -> Any:
    """The compiled kernel that serves so many rows, and the packed weight."""
    packed, layout = linear._pack()
    plan = compiled_plan(str(linear.scheme), layout, (linear.out_features, linear.in_features), dtype, rows)
    if plan is None:
        raise TypeError(f"{linear}: has no compiled kernel for {rows} rows")
    return plan.compiled, packed


@dataclass
class Tensors:
    """A chain between tensors: the first are given at each run, those of `inner` widths are the chain's own."""

    given: Sequence[Tensor]  # (rows, width)
    inner: Sequence[int] = ()
    rows: str = ""
    held: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = self.given[0].dtype
        widths = [tensor.shape[1] for tensor in self.given] + list(self.inner)
        rows = self.rows or registry.fastest("rows")
        attention = rows.replace("rows", "attention")
        self.chain = native.chain(self.dtype, widths, len(self.given), rows=rows, attention=attention)

    def vector(self, tensor: Tensor | None) -> Any:
        self.held += [] if tensor is None else [tensor]
        return native.vector(tensor)

    def norm(
        self, x: int, y: int, kind: str, weight: Tensor | None = None, bias: Tensor | None = None, **more: Any
    ) -> None:
        eps = more.pop("eps", 1e-5)
        self.chain.add_norm(x, y, kind, self.vector(weight), self.vector(bias), eps, **more)

    def weight(self, linear: Linear, y: int, act: str = "", **more: int) -> native.ChainWeight:
        plan, packed = compiled(linear, self.dtype, len(self.given[0]))
        self.held.append(packed)
        return native.ChainWeight(plan, native.memory(packed), self.vector(linear.bias), y, act, **more)

    def linears(self, x: int, weights: Sequence[native.ChainWeight], norm: Any = None, **more: int) -> None:
        if norm is not None:
            kind, weight, bias, eps = norm
            norm = (kind, self.vector(weight), self.vector(bias), eps, 0.0)
        self.chain.add_linears(x, list(weights), norm=norm, **more)

    def run(self, threads: int = 2, batch: int = 1, tables: Sequence[Tensor | None] = ()) -> None:
        external = [(*native.memory(tensor), tensor.stride(0)) for tensor in self.given]
        length = self.given[0].shape[0] // batch
        self.chain.run(batch, length, external, [native.table(table) for table in tables], threads)
