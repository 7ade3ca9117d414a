"""What is timed: nybble's kernels and layers, and the peers, all behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..dispatch import reference, selection, targets
from ..dispatch.registry import specs
from ..dispatch.spec import KernelSpec, Problem
from ..nn import Linear
from ..testing.oracle import error_bound, pack_for, served_by
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme
from ..weights.sparsity import Pattern
from .peers.peer import OPENMP, Peer
from .timing import Call
from .weights import WeightKind

# Relative Frobenius error against the dense product, by weight bits, above which a peer computes something else.
# Normal weights rounded to 4 bits in groups of 128 come to 0.12, with one scale a channel to 0.16.
SANE = {32: 1e-4, 16: 0.01, 8: 0.03, 4: 0.2}
# Total size of the copies of a weight, in sizes of the last level of cache, above which it is cold.
COLD_CACHES = 4
# More copies of a peer's layer, each perhaps a session of its own, take too long to build.
MAX_PEER_COPIES = 256

# outputs (rows, N) of the first rows that it knows -> what is wrong with them, or None
Judge = Callable[[Tensor], "str | None"]


class WrongKernelError(RuntimeError):
    """A kernel's output is outside its error bound: it is not timed."""


class NotHereError(RuntimeError):
    """A peer cannot run this shape, or computes something else; the message says why."""


@dataclass(frozen=True)
class Site:
    """Where the entrants meet: a dense weight (N, K), float32, the dtype of the activations, and how many bytes the
    copies of a weight must come to (0: one copy)."""

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
        """The least number of copies that together exceed copied_bytes."""
        return self.copied_bytes // weight_bytes + 1


@dataclass(frozen=True)
class Entrant:
    """A contestant on a site.

    bind: from activations (M, K) in `dtype` to one call for each copy of the weight; a call returns y (M, N).
    judge: from the rows drawn from the activations to the check of their outputs.
    multiply: what the products are computed in: "int8", "bf16" or "fp32".
    pool: whose threads it runs on.
    pattern: which weights it leaves out; None: none. kept: the share that it multiplies.
    dense: the scheme of the same numbers with all weights stored, where it leaves some out.
    """

    name: str
    scheme: str | None
    weight_bits: int
    multiply: str
    dtype: torch.dtype
    weight_bytes: int
    bind: Callable[[Tensor], list[Call]]
    judge: Callable[[Tensor], Judge]
    pool: str = OPENMP
    pattern: Pattern | None = None
    kept: float = 1.0
    dense: str | None = None

    @property
    def peer(self) -> bool:
        return self.scheme is None


class Maker(Protocol):
    """Makes an entrant for a site; raises NotHereError for a reason not to."""

    @property
    def name(self) -> str: ...

    def make(self, site: Site) -> Entrant: ...


@dataclass(frozen=True)
class KernelMaker:
    """One kernel of the registry, called straight: its weight has codes over their whole range."""

    spec: KernelSpec
    kind: WeightKind

    @property
    def name(self) -> str:
        return self.spec.name

    def make(self, site: Site) -> Entrant:
        assert self.spec.make is not None, "usable kernels can run"  # noqa: S101
        scheme, pattern = self.kind.scheme, self.kind.pattern
        quantized = self.kind.draw(site.n, site.k)
        packed = pack_for(self.spec, quantized, scheme, site.k)
        plan = self.spec.make(scheme, site.n, site.k)
        copies = [packed, *(packed.clone() for _ in range(site.copies(packed.nbytes) - 1))]

        def bind(x: Tensor) -> list[Call]:
            out = x.new_full((x.shape[0], site.n), torch.nan)
            return [partial(_run_plan, plan, x, copy, out) for copy in copies]

        return Entrant(
            name=self.name,
            scheme=str(self.kind),
            weight_bits=scheme.weight_bits,
            multiply=_multiply(scheme, site.dtype),
            dtype=site.dtype,
            weight_bytes=packed.nbytes,
            bind=bind,
            judge=partial(_oracle, quantized, scheme),
            pattern=pattern,
            kept=_kept(dequantize_weight(quantized, scheme, site.k)) if pattern else 1.0,
            dense=str(scheme.dense) if pattern else None,
        )


@dataclass(frozen=True)
class LayerMaker:
    """nybble.nn.Linear as a user has it: the kernel that dispatch selects, module call and output tensor included."""

    scheme: Scheme

    @property
    def name(self) -> str:
        return f"nybble {self.scheme}"

    def make(self, site: Site) -> Entrant:
        layer = Linear.from_weight(site.weight, None, self.scheme, dtype=site.dtype)
        layers = [layer, *(deepcopy(layer) for _ in range(site.copies(layer.nbytes) - 1))]
        return Entrant(
            name=self.name,
            scheme=str(self.scheme),
            weight_bits=self.scheme.weight_bits,
            multiply=_multiply(self.scheme, site.dtype),
            dtype=site.dtype,
            weight_bytes=layer.nbytes,
            bind=lambda x: [partial(one, x) for one in layers],
            judge=partial(_oracle, layer.quantized(), self.scheme),
        )


@dataclass(frozen=True)
class PeerMaker:
    """A peer, with activations in a dtype that it takes as they are. kind: of a sparse weight, the same as that of
    nybble's kernels; None: the weight of the site."""

    peer: Peer
    kind: WeightKind | None = None

    @property
    def pattern(self) -> Pattern | None:
        return self.kind.pattern if self.kind else None

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.pattern}" if self.pattern else self.peer.name

    def make(self, site: Site) -> Entrant:
        peer, dtype = self.peer, self.peer.takes(site.dtype)
        reason = peer.why_not()
        if self.kind is not None and reason is None:
            weight = dequantize_weight(self.kind.draw(site.n, site.k), self.kind.scheme, site.k)
            site = replace(site, weight=weight)
        weight_bytes = peer.weight_bytes(site.weight)
        copies = site.copies(weight_bytes)
        if reason is None and copies > MAX_PEER_COPIES:
            reason = f"{site.n}x{site.k} is too small to be cold: it takes {copies} copies; use --hot"
        if reason is not None:
            raise NotHereError(reason)
        try:
            layers = peer.make(site.weight, dtype, copies)
            layers[0](site.weight[:1].to(dtype))
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, ImportError, AttributeError) as error:
            raise NotHereError(_first_line(error)) from error
        return Entrant(
            name=self.name,
            scheme=None,
            weight_bits=peer.weight_bits,
            multiply=peer.multiply,
            dtype=dtype,
            weight_bytes=weight_bytes,
            bind=lambda x: [partial(layer, x) for layer in layers],
            judge=partial(_sanity, site.weight, SANE[peer.weight_bits]),
            pool=peer.pool,
            pattern=self.pattern,
            kept=_kept(site.weight) if self.pattern else 1.0,
        )


def kernel_makers(pattern: str | None) -> list[KernelMaker]:
    """Compiled kernels that run here and whose <kernel>-<scheme> matches the glob, with each of the schemes that the
    tests have, and with the one that ends the glob; those of the best target where there is no glob.

    Raises:
        ValueError: the glob matches nothing that runs here.
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
    """The kind of weight after the last dash of a glob, where one is written out there."""
    try:
        return [WeightKind.parse(pattern.rpartition("-")[2])]
    except ValueError:
        return []


def _usable(spec: KernelSpec, scheme: Scheme) -> bool:
    # Packed for it, so that a layout can be measured where another is preferred.
    return spec.why_not(Problem(scheme, m=1, n=1, k=1, layout=spec.layout)) is None


def chosen(text: str, dtype: torch.dtype) -> KernelMaker:
    """The kernel that dispatch selects for a kind of weight, see WeightKind.parse."""
    kind = WeightKind.parse(text)
    layout = selection.layout_for(kind.scheme, 1, 1, "cpu")
    return KernelMaker(selection.select(Problem(kind.scheme, m=1, n=1, k=1, dtype=dtype, layout=layout)), kind)


def each_layout(text: str) -> list[KernelMaker]:
    """The fastest kernel of each layout that a kind of weight can be packed in, see WeightKind.parse."""
    kind = WeightKind.parse(text)
    found = {spec.layout: spec for spec in specs() if spec.target != "torch" and _usable(spec, kind.scheme)}
    return [KernelMaker(spec, kind) for spec in found.values()]


def peer_makers(rivals: Sequence[Peer], kinds: Sequence[WeightKind]) -> list[PeerMaker]:
    """Each dense peer once, and each sparse one with every pattern among the kinds that it is for."""
    patterns = {str(kind.pattern): kind for kind in kinds if kind.pattern}
    found = []
    for peer in rivals:
        if peer.sparse is None:
            found.append(PeerMaker(peer))
        else:
            found += [PeerMaker(peer, kind) for text, kind in patterns.items() if text.startswith(peer.sparse)]
    return found


def layer_makers(schemes: Sequence[str]) -> list[Maker]:
    """nn.Linear with each scheme."""
    return [LayerMaker(Scheme.parse(scheme)) for scheme in schemes]


def _run_plan(plan: Callable[[Tensor, Tensor, None, Tensor], None], x: Tensor, packed: Tensor, out: Tensor) -> Tensor:
    plan(x, packed, None, out)
    return out


def _kept(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel()


def _multiply(scheme: Scheme, dtype: torch.dtype) -> str:
    if scheme.act_bits == 8:
        return "int8"
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _oracle(quantized: QuantizedWeight, scheme: Scheme, x: Tensor) -> Judge:
    expected = reference.linear(x, quantized, None, scheme, torch.float64)
    bound = error_bound(x, quantized, scheme, expected, x.dtype)

    def judge(y: Tensor) -> str | None:
        error = (y.double() - expected[: len(y)]).abs()
        # NaN compares false, so a kernel that left an output out is caught too.
        return None if bool((error <= bound[: len(y)]).all()) else f"off by {error.max():.3g}"

    return judge


def _sanity(weight: Tensor, bound: float, x: Tensor) -> Judge:
    expected = x.float() @ weight.t()

    def judge(y: Tensor) -> str | None:
        exact = expected[: len(y)]
        error = float((y.float() - exact).norm() / exact.norm())
        return None if error <= bound else f"relative error {error:.3g} against the dense product, above {bound}"

    return judge


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
