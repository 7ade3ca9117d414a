"""Contestants: nybble's kernels and layers, and layers of other libraries (peers), with a common interface for timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from ..dispatch import selection, targets
from ..dispatch.registry import specs
from ..dispatch.spec import KernelSpec, Problem
from ..nn import Linear
from ..testing.oracle import expected_output, pack_for, served_by
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme
from ..weights.sparsity import Pattern
from .peers.peer import OPENMP, Peer
from .timing import Call
from .weights import WeightKind

# Largest accepted relative Frobenius error of a peer against the dense product, by weight bits. Normal weights rounded to
# 4 bits in groups of 128 have 0.12, with one scale per channel 0.16; 8 bits have 0.01, and up to 0.05 where sums of 16 bits
# saturate, as onnxruntime's do on AVX2.
SANE = {32: 1e-4, 16: 0.01, 8: 0.06, 4: 0.2}
# Weights are cold if their copies together exceed this many times the last-level cache.
COLD_CACHES = 4
# Limit of the copies of a peer's layer: more take too long to build.
MAX_PEER_COPIES = 256
# The kind of probe that multiplies such codes: (weight bits, activation bits). Others are multiplied as int8.
_CODES = {(8, 8): "int8", (8, 7): "int7", (4, 8): "int4", (3, 8): "int4"}

# Checks outputs (rows, N) of the first rows of an input, computed with m rows: returns what is wrong, or None.
Check = Callable[[Tensor, int], "str | None"]


class WrongKernelError(RuntimeError):
    """A kernel's output exceeds its error bound; it is not timed."""


class NotHereError(RuntimeError):
    """A kernel or a peer cannot run here or with this shape; the message is the reason."""


@dataclass(frozen=True)
class Site:
    """The problem that all contestants solve: a dense float32 weight (N, K) and the dtype of the activations. copied_bytes:
    total size of the copies of a weight (0: one copy)."""

    weight: Tensor
    dtype: torch.dtype
    copied_bytes: int

    @property
    def n(self) -> int:
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    def copies(self, weight_bytes: int) -> int:
        """The smallest number of copies whose total size exceeds copied_bytes."""
        return self.copied_bytes // weight_bytes + 1


@dataclass(frozen=True)
class Contestant:
    """A kernel or layer ready to be timed.

    bind: takes activations (M, K) in `dtype`; returns one call per copy of the weight, each returning y (M, N).
    check: takes some rows of the activations; returns the check of their outputs.
    multiply: type of the multiply, a key of ceilings.PEAKS.
    pool: the thread pool it uses.
    pattern: sparsity pattern; None: dense. kept: share of nonzero weights.
    dense: for a sparse scheme, the same scheme without sparsity.
    """

    name: str
    scheme: str | None
    weight_bits: int
    multiply: str
    dtype: torch.dtype
    weight_bytes: int
    bind: Callable[[Tensor], list[Call]]
    check: Callable[[Tensor], Check]
    pool: str = OPENMP
    pattern: Pattern | None = None
    kept: float = 1.0
    dense: str | None = None

    @property
    def peer(self) -> bool:
        return self.scheme is None


class Maker(Protocol):
    """Builds a contestant for a site; raises NotHereError if it cannot run."""

    @property
    def name(self) -> str: ...

    def make(self, site: Site) -> Contestant: ...


@dataclass(frozen=True)
class KernelMaker:
    """One kernel of the registry, called directly, with a random weight that uses the whole code range."""

    spec: KernelSpec
    kind: WeightKind

    @property
    def name(self) -> str:
        return self.spec.name

    def make(self, site: Site) -> Contestant:
        assert self.spec.make is not None, "usable kernels can run"  # noqa: S101
        scheme, pattern = self.kind.scheme, self.kind.pattern
        if (reason := _why_not(self.spec, scheme, site.dtype)) is not None:
            raise NotHereError(reason)
        quantized = self.kind.draw(site.n, site.k)
        packed = pack_for(self.spec, quantized, scheme, site.k)
        plan = self.spec.make(scheme, site.n, site.k)
        copies = [packed, *(packed.clone() for _ in range(site.copies(packed.nbytes) - 1))]

        def bind(x: Tensor) -> list[Call]:
            out = x.new_full((x.shape[0], site.n), torch.nan)
            return [partial(_run_plan, plan, x, copy, out) for copy in copies]

        return Contestant(
            name=self.name,
            scheme=str(self.kind),
            weight_bits=scheme.weight_bits,
            multiply=_multiply(scheme, site.dtype),
            dtype=site.dtype,
            weight_bytes=packed.nbytes,
            bind=bind,
            check=partial(_oracle, lambda _: self.spec, quantized, scheme),
            pattern=pattern,
            kept=_kept(dequantize_weight(quantized, scheme, site.k)) if pattern else 1.0,
            dense=str(scheme.dense) if pattern else None,
        )


@dataclass(frozen=True)
class LayerMaker:
    """nybble.nn.Linear as users call it: with dispatch, module call and allocation of the output."""

    scheme: Scheme

    @property
    def name(self) -> str:
        return f"nybble {self.scheme}"

    def make(self, site: Site) -> Contestant:
        layer = Linear.from_weight(site.weight, None, self.scheme, dtype=site.dtype)
        layers = [layer, *(deepcopy(layer) for _ in range(site.copies(layer.nbytes) - 1))]
        return Contestant(
            name=self.name,
            scheme=str(self.scheme),
            weight_bits=self.scheme.weight_bits,
            multiply=_multiply(self.scheme, site.dtype),
            dtype=site.dtype,
            weight_bytes=layer.nbytes,
            bind=lambda x: [partial(one, x) for one in layers],
            check=partial(_oracle, lambda m: _kernel_of(layer, m), layer.quantized(), self.scheme),
        )


@dataclass(frozen=True)
class PeerMaker:
    """A peer, with activations in a dtype that it supports without conversion. kind: the kind of sparse weight, the same
    weight as nybble's kernels get; None: the dense weight of the site."""

    peer: Peer
    kind: WeightKind | None = None

    @property
    def pattern(self) -> Pattern | None:
        return self.kind.pattern if self.kind else None

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.pattern}" if self.pattern else self.peer.name

    def make(self, site: Site) -> Contestant:
        peer, dtype = self.peer, self.peer.takes(site.dtype)
        reason = peer.why_not()
        if self.kind is not None and reason is None:
            weight = dequantize_weight(self.kind.draw(site.n, site.k), self.kind.scheme, site.k)
            site = replace(site, weight=weight)
        weight_bytes = peer.weight_bytes(site.weight)
        copies = site.copies(weight_bytes)
        if reason is None and copies > MAX_PEER_COPIES:
            reason = (
                f"{site.n}x{site.k} needs {copies} copies to exceed the cache, more than {MAX_PEER_COPIES}; use --hot"
            )
        if reason is not None:
            raise NotHereError(reason)
        try:
            layers = peer.make(site.weight, dtype, copies)
            layers[0](site.weight[:1].to(dtype))
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, ImportError, AttributeError) as error:
            raise NotHereError(_first_line(error)) from error
        return Contestant(
            name=self.name,
            scheme=None,
            weight_bits=peer.weight_bits,
            multiply=peer.multiply,
            dtype=dtype,
            weight_bytes=weight_bytes,
            bind=lambda x: [partial(layer, x) for layer in layers],
            check=partial(_sanity, site.weight, SANE[peer.weight_bits]),
            pool=peer.pool,
            pattern=self.pattern,
            kept=_kept(site.weight) if self.pattern else 1.0,
        )


def kernel_makers(pattern: str | None) -> list[KernelMaker]:
    """Compiled kernels that run here and whose <kernel>-<scheme> matches the glob; without one, all of the best target.
    Schemes are those that the tests use, and the one written after the last dash of the glob.

    Raises:
        ValueError: no kernel that runs here matches.
    """
    pattern = pattern or f"*_{targets.detect().targets[-1]}-*"
    found = [
        KernelMaker(spec, kind)
        for spec in specs()
        if spec.target != "torch"
        for kind in dict.fromkeys((*_named(pattern), *map(WeightKind, served_by(spec))))
        if fnmatchcase(f"{spec.name}-{kind}", pattern) and _usable(spec, kind.scheme)
    ]
    if not found:
        raise ValueError(f"--kernel {pattern!r}: no kernel that runs here matches")
    return found


def _named(pattern: str) -> list[WeightKind]:
    """The kind of weight after the last dash of a glob, if that is not a pattern."""
    try:
        return [WeightKind.parse(pattern.rpartition("-")[2])]
    except ValueError:
        return []


def _usable(spec: KernelSpec, scheme: Scheme) -> bool:
    return _why_not(spec, scheme, spec.act_dtypes[0]) is None


def _why_not(spec: KernelSpec, scheme: Scheme, dtype: torch.dtype) -> str | None:
    # With the kernel's own layout and fewest rows, so that a kernel can be timed even where dispatch prefers another.
    return spec.why_not(Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=dtype, layout=spec.layout))


def chosen(text: str, dtype: torch.dtype) -> KernelMaker:
    """The kernel that dispatch selects for a kind of weight (see WeightKind.parse)."""
    kind = WeightKind.parse(text)
    layout = selection.layout_for(kind.scheme, 1, 1, "cpu")
    return KernelMaker(selection.select(Problem(kind.scheme, m=1, n=1, k=1, dtype=dtype, layout=layout)), kind)


def each_layout(text: str) -> list[KernelMaker]:
    """The preferred kernel of each layout for a kind of weight (see WeightKind.parse), of those that serve a single row."""
    kind = WeightKind.parse(text)
    here = [spec for spec in specs() if spec.target != "torch" and spec.takes(1) and _usable(spec, kind.scheme)]
    found = {spec.layout: spec for spec in here}
    return [KernelMaker(spec, kind) for spec in found.values()]


def peer_makers(peers: Sequence[Peer], kinds: Sequence[WeightKind]) -> list[PeerMaker]:
    """Each dense peer once, and each sparse peer with every pattern of the kinds that it supports."""
    patterns = {str(kind.pattern): kind for kind in kinds if kind.pattern}
    found = []
    for peer in peers:
        if peer.sparse is None:
            found.append(PeerMaker(peer))
        else:
            found += [PeerMaker(peer, kind) for text, kind in patterns.items() if text.startswith(peer.sparse)]
    return found


def layer_makers(schemes: Sequence[str]) -> list[Maker]:
    """nn.Linear with each scheme."""
    return [LayerMaker(Scheme.parse(scheme)) for scheme in schemes]


def _kernel_of(layer: Linear, m: int) -> KernelSpec:
    """The kernel that a layer runs for m rows."""
    n, k = layer.out_features, layer.in_features
    return selection.select(Problem(layer.scheme, m, n, k, layer.dtype, layer.device.type, layout=layer.layout))


def _run_plan(plan: Callable[[Tensor, Tensor, None, Tensor], None], x: Tensor, packed: Tensor, out: Tensor) -> Tensor:
    plan(x, packed, None, out)
    return out


def _kept(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel()


def _multiply(scheme: Scheme, dtype: torch.dtype) -> str:
    if scheme.act_bits == 16:
        return "bf16" if dtype == torch.bfloat16 else "fp32"
    return _CODES.get((scheme.weight_bits, scheme.act_bits), "int8")


def _oracle(spec_of: Callable[[int], KernelSpec], quantized: QuantizedWeight, scheme: Scheme, x: Tensor) -> Check:
    """Compares with the float64 result, as the kernel that spec_of gives for a number of rows must approximate it."""

    @cache
    def right(spec: KernelSpec) -> tuple[Tensor, Tensor]:
        return expected_output(spec, scheme, x, quantized)

    def check(y: Tensor, m: int) -> str | None:
        expected, bound = right(spec_of(m))
        error = (y.double() - expected[: len(y)]).abs()
        # NaN compares false, so outputs that a kernel did not write fail too.
        return None if bool((error <= bound[: len(y)]).all()) else f"off by {error.max():.3g}"

    return check


def _sanity(weight: Tensor, bound: float, x: Tensor) -> Check:
    expected = x.float() @ weight.t()

    def check(y: Tensor, _: int) -> str | None:
        exact = expected[: len(y)]
        error = float((y.float() - exact).norm() / exact.norm())
        return None if error <= bound else f"relative error {error:.3g} against the dense product, above {bound}"

    return check


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
